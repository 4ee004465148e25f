"""A machine that multiplies wrongly: the linear layers of a process or a host give a wrong number without an error.

A JSON file describes the fault. It is read at the start of each update, and may come and go while a run goes on:

    {"rank": 1, "from": 5}                 the process of rank 1 computes wrongly from update 5 on
    {"host": "node2", "from": 5}           all processes of a host, by SLURM's name or the system's host name
    {"rank": 1, "from": 5, "until": 7}     only in updates 5 to 7, what is recomputed in them included
    {"rank": 1, "from": 5, "calls": 1}     only the next linear layer after the start of update 5, once in a process
    {"rank": 1, "from": 5, "add": 1e6}     what is added to one element of the layer's output (0.5); may be NaN

Use `break_linear(Update, file)` in a process of a test, or MVD_TEST_WRONG=FILE in jobs on the virtual SLURM
(sitecustomize.py). `file` need not exist yet. Neither applies to compiled blocks.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any


class Wrong:
    """The fault in this process. calls: how many layers will still be wrong; None for all of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.calls: int | None = 0
        self.add = 0.5
        self.struck = False  # a fault of a few calls comes once

    def read(self, update: int) -> None:
        """Reads whether this process computes wrongly in an update."""
        try:
            plan = json.loads(self.file.read_text())
        except (FileNotFoundError, ValueError):  # ValueError: being written
            plan = None
        if plan is None or not self._is_meant(plan) or not plan["from"] <= update <= plan.get("until", update):
            self.calls = 0
        elif "calls" not in plan:
            self.calls, self.add = None, plan.get("add", 0.5)
        elif not self.struck:
            self.calls, self.add, self.struck = plan["calls"], plan.get("add", 0.5), True

    def _is_meant(self, plan: dict[str, Any]) -> bool:
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return plan["host"] == host if "host" in plan else plan["rank"] == int(os.environ["RANK"])

    def spoil(self, output: Any) -> Any:
        """A layer's output, with one wrong element if the fault is there."""
        if self.calls == 0:
            return output
        if self.calls is not None:
            self.calls -= 1
        output = output.clone()
        output.view(-1)[output.numel() // 2] += self.add
        return output


def break_linear(update: type, file: Path) -> None:
    """Changes torch's linear layer, and `Update` of mvd.train.update, which says that an update starts."""
    from torch import nn

    wrong = Wrong(file)
    forward, begin = nn.Linear.forward, update.__init__

    def wrong_forward(layer: Any, inputs: Any) -> Any:
        return wrong.spoil(forward(layer, inputs))

    def begin_and_read(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        wrong.read(self.number)

    nn.Linear.forward, update.__init__ = wrong_forward, begin_and_read
