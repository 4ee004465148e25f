"""The training loop of all four training kinds: from a stage to its weights."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

from mvd.accuracy import validate
from mvd.batch import Batch
from mvd.config import DATASETS, Finetune, Stage
from mvd.data.datasets import build_dataset
from mvd.data.device import prepare
from mvd.data.loader import steps_per_epoch, train_loader
from mvd.files import write_atomically
from mvd.train.checkpoint import load_newest_checkpoint, save_checkpoint
from mvd.train.engine import Process, build_engine, full_state_dict, mean_across_processes, take_step
from mvd.train.monitor import Monitor, Progress, peak_memory_gb
from mvd.train.optimizer import build_optimizer
from mvd.train.schedule import cosine_schedule
from mvd.train.tasks import Task, build_task

WEIGHTS = "weights.safetensors"


class NonFiniteLoss(RuntimeError):
    """A loss was not a finite number; the update it belongs to was not applied."""


def train(stage: Stage, process: Process) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, or its start, to its end; returns what result.json says of it.

    Leaves `weights.safetensors`, metrics, events and checkpoints in the run directory.
    """
    started = time.monotonic()
    run = TrainingRun(stage, process)
    run.to_the_end()
    write_weights(run)
    run.close()
    return {
        "epochs": stage.recipe.optimization.epochs,
        "updates": run.total_updates,
        "wall_seconds": time.monotonic() - started,
        "weights": WEIGHTS,
        "unreadable": sorted(run.unreadable),
        **run.last_values,
    }


class TrainingRun:
    """A stage in training: its engine, its place in the schedule and what it has to report."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        recipe, how = stage.recipe, stage.execution
        settings = recipe.optimization
        torch.manual_seed(recipe.seed)  # the same first weights on every process
        self.task: Task = build_task(stage, DATASETS[recipe.dataset].classes, process.device)
        self.dataset = build_dataset(stage)
        self.steps_per_epoch = steps_per_epoch(len(self.dataset), settings.global_batch)
        self.total_updates = self.steps_per_epoch * settings.epochs
        self.learning_rates = cosine_schedule(
            settings.peak_lr, settings.floor_lr, settings.laid_out_epochs, settings.warmup_epochs, self.steps_per_epoch
        )
        batch = Batch(how.micro_batch, how.accumulation, process.world_size)
        optimizer = build_optimizer(self.task.model, settings)
        self.engine = build_engine(self.task.model.to(process.device), optimizer, how.deepspeed, batch, how.precision)
        torch.manual_seed(recipe.seed * 1_000_003 + process.rank + 1)  # drop path and dropout differ by process
        self.checkpoints = stage.directory / "checkpoints"
        self.update = load_newest_checkpoint(self.engine, self.checkpoints, process)
        self.monitor = Monitor(stage.directory, process, self.update)
        self.unreadable: set[str] = set()
        self.last_values: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return self.update // self.steps_per_epoch

    def to_the_end(self) -> None:
        """Runs the remaining updates with their checkpoints, validations and reports."""
        how = self.stage.execution
        batches = iter(train_loader(self.stage, self.dataset, self.process.rank, self.update))
        window = Window()
        progress = self._progress()
        self.engine.train()
        while self.update < self.total_updates:
            learning_rate = float(self.learning_rates[self.update])
            values = self._one_update(batches, learning_rate, window)
            epoch = self.epoch
            self.update += 1
            window.add(values)
            finished = self.update == self.total_updates
            if self.update % how.log_every == 0 or finished:
                self._report(window, learning_rate, epoch, progress)
                window = Window()
            if self.update % self.steps_per_epoch == 0:
                self._end_of_epoch(epoch, finished)
            if self.update % how.checkpoint_every == 0 or finished:
                save_checkpoint(self.engine, self.checkpoints, self.update, self.process, how.keep_checkpoints)
        if progress is not None:
            progress.close()

    def _one_update(self, batches: Iterator[Any], learning_rate: float, window: "Window") -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns losses averaged over all of them and ranks."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        sums: dict[str, torch.Tensor] = {}
        videos: list[int] = []
        for step in range(self.stage.execution.accumulation):
            if step:
                self.engine.step()  # inside an update this only counts the micro-batch
            asked = time.monotonic()
            raw = next(batches)
            window.waited += time.monotonic() - asked
            self.unreadable.update(raw["unreadable"])
            videos += raw["indices"].tolist()
            losses = self.task.losses(self.engine, prepare(raw, self.stage.recipe, self.process.device))
            self.engine.backward(losses["loss"])
            sums = {name: loss.detach() + sums.get(name, 0.0) for name, loss in losses.items()}
        values = self._averaged(sums, videos)
        return values | {"grad_norm": take_step(self.engine)}

    def _averaged(self, sums: dict[str, torch.Tensor], videos: list[int]) -> dict[str, float]:
        mine = torch.stack(list(sums.values())).float() / self.stage.execution.accumulation
        mean = mean_across_processes(mine.clone())
        if not torch.isfinite(mean).all():  # the same verdict on every process, before the weights change
            culprit = "" if torch.isfinite(mine).all() else f"; rank {self.process.rank} had videos {videos}"
            raise NonFiniteLoss(f"the loss is not finite at update {self.update + 1}{culprit}")
        return dict(zip(sums, mean.tolist(), strict=True))

    def _report(self, window: "Window", learning_rate: float, epoch: int, progress: Progress | None) -> None:
        settings = self.stage.recipe.optimization
        seconds = time.monotonic() - window.started
        rate = window.updates * settings.global_batch / seconds
        values = window.means() | {
            "lr": learning_rate,
            "weight_decay": settings.weight_decay,
            "samples_per_second": rate,
            "data_wait_share": window.waited / seconds,
            "memory_gb": peak_memory_gb(self.process.device),
            "unreadable": len(self.unreadable),
        }
        self.last_values["loss"] = values["loss"]
        self.monitor.write(self.update, epoch + 1, values)
        if progress is not None:
            losses = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
            unit = "images" if self.stage.kind == "image_teacher" else "clips"
            progress.show(self.update, f"epoch {epoch + 1}/{settings.epochs} {losses} {rate:.1f} {unit}/s")

    def _end_of_epoch(self, epoch: int, finished: bool) -> None:
        """Validates a classifier every few epochs and at the end, on one centre view of each validation video."""
        every = self.stage.execution.validate_every
        if isinstance(self.stage.recipe, Finetune) and (finished or (epoch + 1) % every == 0):
            accuracy = validate(self.engine, self.stage, self.process)
            self.engine.train()
            self.last_values["val_top1"] = accuracy["val_top1"]
            self.monitor.write(self.update, epoch + 1, accuracy)

    def _progress(self) -> Progress | None:
        if not self.process.is_first:
            return None
        return Progress(self.stage.kind, self.total_updates, self.update)

    def close(self) -> None:
        self.monitor.close()
        self.engine.destroy()


class Window:
    """What is gathered between two reports."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.waited = 0.0
        self.updates = 0
        self.sums: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        self.updates += 1
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}

    def means(self) -> dict[str, float]:
        return {name: total / self.updates for name, total in self.sums.items()}


def write_weights(run: TrainingRun) -> None:
    """Leaves the final weights, in the official layout, as weights.safetensors."""
    state = full_state_dict(run.engine)
    if run.process.is_first:
        metadata = {"format": "pt", "stage": run.stage.id, "updates": str(run.update)}
        write_atomically(run.stage.directory / WEIGHTS, lambda path: save_file(state, path, metadata))

