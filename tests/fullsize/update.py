"""One update of a stage, in a process of its own: `python -m tests.fullsize.update STAGE_YAML`, prints JSON."""

import json
import sys
import time

import torch

from benchmarks.real_size import GradientWatch
from mvd.distributed.process import Process, start_processes
from mvd.monitoring.metrics import peak_memory_gb
from mvd.stage import Stage
from mvd.train.loop import TrainingRun
from tests.runs import read_metrics


def corners(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A few values of every parameter: copies of all would not fit beside a ViT-H's optimizer."""
    return {name: parameter.detach().flatten()[:64].clone() for name, parameter in model.named_parameters()}


class OneUpdate(TrainingRun):
    """A run that ends after one update, without a checkpoint: copying a ViT-H's optimizer would take as much again."""

    def __init__(self, stage: Stage, process: Process) -> None:
        super().__init__(stage, process)
        self.total_updates = 1

    def _save(self) -> bool:
        return True


def main(path: str) -> None:
    process = start_processes()
    stage = Stage.from_yaml(path)
    run = OneUpdate(stage, process)
    model, teachers = run.engine.module, getattr(run.task, "teachers", ())
    watch, before = GradientWatch(model), corners(model)
    started = time.monotonic()
    run.to_the_end()
    seconds = time.monotonic() - started
    (values,) = read_metrics(stage)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    changed = {name for name, value in corners(model).items() if not torch.equal(value, before[name])}
    of_teachers = [parameter for teacher in teachers for parameter in teacher.parameters()]
    print(
        json.dumps(
            {
                "values": {name: value for name, value in values.items() if name.endswith(("loss", "grad_norm"))},
                "problems": watch.problems(),
                "changed": sorted(changed & trainable),
                "frozen_but_changed": sorted(changed - trainable),
                "teacher_parameters": len(of_teachers),
                "teacher_gradients": sum(p.requires_grad or p.grad is not None for p in of_teachers),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "seconds": seconds,
                "memory_gb": peak_memory_gb(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
