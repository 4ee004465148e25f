"""Whether a compute node can run the jobs; `python -m launch.checks.node FOLDER GPUS` runs on it, in a test job."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.checks.finding import Finding, examine
from mvd.config import ConfigError
from mvd.host import hostname

CLIENTS = ("scontrol", "squeue")  # a job requeues itself with these
END = "doctor|end"  # printed after the last check
MODULES = ("torch", "deepspeed", "av", "submitit")


def check_node(runs: Path, gpus: int) -> Iterator[Finding]:
    """Clients, modules, GPUs and the runs folder, as seen from this node."""
    yield examine(f"SLURM clients on {hostname()}", _check_clients)
    yield examine(f"Python on {hostname()}", _check_python)
    if gpus and os.environ.get("MVD_EXPECT_GPU") != "0":  # the profile can say that a cluster's GPUs are not real
        yield examine(f"GPUs on {hostname()}", lambda: _check_gpus(gpus))
    yield examine(f"runs folder on {hostname()}", lambda: _check_runs(runs))


def _check_clients() -> str:
    missing = [name for name in CLIENTS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not found on compute nodes, so a job cannot requeue itself; "
            "load the site's SLURM module in slurm.setup, or ask the administrators"
        )
    return ", ".join(CLIENTS)


def _check_python() -> str:
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{sys.executable} lacks {', '.join(missing)}; install the project where the nodes see it")
    return f"{sys.executable}, {', '.join(MODULES)} found"


def _check_gpus(gpus: int) -> str:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no usable GPU; check the driver, and gpus_per_node and slurm.options in the profile"
        )
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    if torch.cuda.device_count() != gpus:
        raise ConfigError(f"{torch.cuda.device_count()} GPUs are visible, expected {gpus}; correct gpus_per_node")
    return f"{gpus} x {', '.join(sorted(names))}"


def _check_runs(runs: Path) -> str:
    note = runs / f".doctor-{os.getpid()}"
    if not runs.is_dir():
        raise ConfigError(f"{runs} does not exist on this node; set runs to a folder on a disk that the nodes share")
    try:
        note.write_text("x")
    finally:
        note.unlink(missing_ok=True)
    return f"{runs} can be written"


if __name__ == "__main__":
    for finding in check_node(Path(sys.argv[1]), int(sys.argv[2])):
        print(f"doctor|{'ok' if finding.ok else 'FIX'}|{finding.subject}|{finding.text}", flush=True)
    print(END, flush=True)
