"""The training loop of all four training kinds: from a stage to its weights."""

import math
import time
from typing import Any

import torch
from safetensors.torch import save_file

from mvd.accuracy import load_entries, validate
from mvd.batch import Batch
from mvd.config import DATASETS, Finetune
from mvd.data.datasets import build_dataset
from mvd.data.device import prepare
from mvd.data.loader import steps_per_epoch, train_loader
from mvd.files import write_atomically
from mvd.stage import Stage
from mvd.train.checkpoint import load_newest_checkpoint, save_checkpoint
from mvd.train.engine import (
    Process,
    agreeing,
    build_engine,
    full_state_dict,
    gather,
    mean_across_processes,
    take_step,
)
from mvd.train.interrupt import Interrupted, stop_requested
from mvd.train.monitor import Monitor, Progress, UnreadableFiles, peak_memory_gb
from mvd.train.optimizer import build_optimizer
from mvd.train.schedule import cosine_schedule
from mvd.train.tasks import Task, build_task

WEIGHTS = "weights.safetensors"


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was not a finite number; nothing of the update it belongs to has been saved."""


def train(stage: Stage, process: Process) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, or its start, to its end; returns what result.json says of it.

    Leaves `weights.safetensors`, metrics, events and checkpoints in the run directory.

    Raises:
        ConfigError: something the user gave cannot work.
        NonFiniteLoss: training diverged; raised on every process.
        Interrupted: a signal asked for it, and the last update is saved; raised on every process.
    """
    started = time.monotonic()
    run = TrainingRun(stage, process)
    try:
        run.to_the_end()
        write_weights(run)
        latest = run.monitor.latest()
    finally:
        run.close()
    return {
        "epochs": stage.recipe.optimization.epochs,
        "updates": run.total_updates,
        "wall_seconds": time.monotonic() - started,
        "weights": WEIGHTS,
        "unreadable": sorted(run.unreadable.named),
        **{name: latest[name] for name in ("loss", "val_top1") if name in latest},
    }


class TrainingRun:
    """A stage in training: its engine, its place in the schedule and what it has to report."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        recipe, how = stage.recipe, stage.execution
        settings = recipe.optimization
        with agreeing():
            torch.manual_seed(recipe.seed)  # the same first weights on every process
            self.task: Task = build_task(stage, DATASETS[recipe.dataset].classes, process.device)
            self.dataset = build_dataset(stage)
            self.validation = load_entries(stage, "val") if isinstance(recipe, Finetune) else []
            self.steps_per_epoch = steps_per_epoch(len(self.dataset), settings.global_batch)
        self.total_updates = self.steps_per_epoch * settings.epochs
        self.learning_rates = cosine_schedule(
            settings.peak_lr, settings.floor_lr, settings.laid_out_epochs, settings.warmup_epochs, self.steps_per_epoch
        )
        self.checkpoints = stage.directory / "checkpoints"
        batch = Batch(how.micro_batch, how.accumulation, process.world_size)
        model = self.task.model.to(process.device)
        with agreeing():
            optimizer = build_optimizer(model, settings)
            self.engine = build_engine(model, optimizer, how.deepspeed, batch, how.precision)
            torch.manual_seed(recipe.seed * 1_000_003 + process.rank + 1)  # drop path and dropout differ by process
            self.update = load_newest_checkpoint(self.engine, self.checkpoints, process)
            self.batches = iter(train_loader(stage, self.dataset, process.rank, self.update))
        self.monitor = Monitor(stage.directory, process, self.update)
        self.unreadable = UnreadableFiles(stage.directory, process)
        self.progress = Progress(stage.kind, self.total_updates, self.update) if process.is_first else None
        self.stopping = False  # agreed by all processes

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return self.update // self.steps_per_epoch

    def to_the_end(self) -> None:
        """Runs the remaining updates with their checkpoints, validations and reports.

        Raises:
            NonFiniteLoss, Interrupted: see `train`.
        """
        how = self.stage.execution
        window = Window()
        self.engine.train()
        while self.update < self.total_updates:
            learning_rate = float(self.learning_rates[self.update])
            epoch = self.epoch
            self._one_update(learning_rate, window)
            self.update += 1
            finished = self.update == self.total_updates
            if self.update % how.log_every == 0 or finished:
                self._report(window, learning_rate, epoch)
                window = Window()
            if self.update % self.steps_per_epoch == 0:
                self._end_of_epoch(epoch, finished)
            if self.update % how.checkpoint_every == 0 or finished or self.stopping:
                self.unreadable.share()
                self.monitor.flush()
                save_checkpoint(self.engine, self.checkpoints, self.update, self.process, how.keep_checkpoints)
            if self.stopping and not finished:
                raise Interrupted(
                    f"{self.stage.id}: stopped by a signal after update {self.update} of {self.total_updates}, which "
                    "is saved; start it again to go on",
                    self.update,
                )

    def _one_update(self, learning_rate: float, window: "Window") -> None:
        """One optimizer step over `accumulation` micro-batches; notes losses averaged over all of them and ranks."""
        started = time.monotonic()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        losses: list[torch.Tensor] = []  # (names,) each
        samples: list[list[int]] = []
        for step in range(self.stage.execution.accumulation):
            if step:
                self.engine.step()  # inside an update this only counts the micro-batch
            asked = time.monotonic()
            raw = next(self.batches)
            window.waited += time.monotonic() - asked
            self.unreadable.found.update(raw["unreadable"])
            samples.append(raw["indices"].tolist())
            named = self.task.losses(self.engine, prepare(raw, self.stage.recipe, self.process.device))
            self.engine.backward(named["loss"])
            losses.append(torch.stack([loss.detach().float() for loss in named.values()]))
        means = self._means(torch.stack(losses), samples)
        norm = take_step(self.engine)
        if math.isnan(norm):
            raise NonFiniteLoss(
                f"the gradient is not finite at update {self.update + 1}, though the loss is {means[0]}"
            )
        window.add(dict(zip(named, means, strict=True)) | {"grad_norm": norm}, time.monotonic() - started)

    def _means(self, losses: torch.Tensor, samples: list[list[int]]) -> list[float]:
        """Means over the micro-batches (micro-batches, names) of all ranks, once they are all known to be finite.

        Whether any rank was asked to stop comes to all with them.
        """
        asked = losses.new_tensor([stop_requested()])
        agreed = mean_across_processes(torch.cat([losses.mean(dim=0), asked]))
        means, self.stopping = agreed[:-1], bool(agreed[-1])
        if torch.isfinite(means).all():  # the same verdict on every process, before the weights change
            return means.tolist()
        finite = losses.isfinite().all(dim=1).tolist()
        mine = [
            self.dataset.entries[i].path for part, fine in zip(samples, finite, strict=True) if not fine for i in part
        ]
        culprits = [f"rank {rank}: {', '.join(paths)}" for rank, paths in enumerate(gather(mine)) if paths]
        raise NonFiniteLoss(f"the loss is not finite at update {self.update + 1} ({'; '.join(culprits)})")

    def _report(self, window: "Window", learning_rate: float, epoch: int) -> None:
        settings = self.stage.recipe.optimization
        rate = window.updates * settings.global_batch / window.seconds
        self.unreadable.share()
        values = window.means() | {
            "lr": learning_rate,
            "weight_decay": settings.weight_decay,
            "samples_per_second": rate,
            "data_wait_share": window.waited / window.seconds,
            "memory_gb": peak_memory_gb(self.process.device),
            "unreadable": len(self.unreadable.named),
        }
        self.monitor.write(self.update, epoch + 1, values)
        if self.progress is not None:
            losses = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
            unit = "images" if self.stage.kind == "image_teacher" else "clips"
            self.progress.show(self.update, f"epoch {epoch + 1}/{settings.epochs} {losses} {rate:.1f} {unit}/s")

    def _end_of_epoch(self, epoch: int, finished: bool) -> None:
        """Validates a classifier every few epochs and at the end, on one centre view of each validation video."""
        every = self.stage.execution.validate_every
        if isinstance(self.stage.recipe, Finetune) and (finished or (epoch + 1) % every == 0):
            accuracy = validate(self.engine, self.validation, self.stage, self.process)
            self.engine.train()
            self.monitor.write(self.update, epoch + 1, accuracy)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        self.monitor.close()
        self.engine.destroy()


class Window:
    """What is gathered between two reports; its seconds are those of updates, not of checkpoints or validations."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waited = 0.0
        self.updates = 0
        self.sums: dict[str, float] = {}

    def add(self, values: dict[str, float], seconds: float) -> None:
        self.updates += 1
        self.seconds += seconds
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}

    def means(self) -> dict[str, float]:
        return {name: total / self.updates for name, total in self.sums.items()}


def write_weights(run: TrainingRun) -> None:
    """Leaves the final weights, in the official layout, as weights.safetensors."""
    state = full_state_dict(run.engine)
    if run.process.is_first:
        metadata = {"format": "pt", "stage": run.stage.id, "updates": str(run.update)}
        write_atomically(run.stage.directory / WEIGHTS, lambda path: save_file(state, path, metadata))
