"""The training loop of all four training kinds: from a stage to its weights."""

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mvd.accuracy import load_entries, validate
from mvd.batch import Batch
from mvd.config import ConfigError, Finetune, facts_of
from mvd.data.annotations import fingerprint
from mvd.data.datasets import build_dataset
from mvd.data.device import prepare
from mvd.data.loader import LoaderHealth, steps_per_epoch, train_loader
from mvd.data.stalls import ReadLimit
from mvd.data.workers import kill_workers
from mvd.stage import WEIGHTS, Stage
from mvd.train.engine import (
    Process,
    agreeing,
    build_engine,
    gather,
    mean_across_processes,
    take_step,
)
from mvd.train.health import Health, RollBack
from mvd.train.interrupt import Interrupted, stop_requested
from mvd.train.keeper import Keeper
from mvd.train.monitor import Monitor, Progress, peak_memory_gb
from mvd.train.noise import SampleNoise
from mvd.train.optimizer import build_optimizer
from mvd.train.preflight import preflight
from mvd.train.schedule import cosine_schedule
from mvd.train.tasks import Task, build_task
from mvd.train.unreadable import UnreadableFiles
from mvd.train.watchdog import doing


def train(stage: Stage, process: Process) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, or its start, to its end; returns what result.json says of it.

    Leaves `weights.safetensors`, metrics, events and checkpoints in the run directory.

    Raises:
        ConfigError: something the user gave cannot work.
        GivenUp: training diverged, or what it needs is gone; raised on every process.
        HostFault: a machine failed the checks before the start; raised on every process.
        Interrupted: a signal asked for it, and the last update is saved; raised on every process.
    """
    started = time.monotonic()
    while True:
        with contextlib.suppress(RollBack):
            return {**_train_from_newest(stage, process), "wall_seconds": time.monotonic() - started}
        gc.collect()  # two engines would not fit into a GPU; the exception, which is gone here, held the first one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else the checks before the start find the GPU taken


def _train_from_newest(stage: Stage, process: Process) -> dict[str, Any]:
    run = TrainingRun(stage, process)
    try:
        run.to_the_end()
        latest = run.monitor.latest()
    finally:
        run.close()
    return {
        "epochs": stage.recipe.optimization.epochs,
        "updates": run.total_updates,
        "weights": WEIGHTS,
        "unreadable": sorted(run.unreadable.named),
        "skipped_updates": run.health.left_out,
        **{name: latest[name] for name in ("loss", "val_top1") if name in latest},
    }


class TrainingRun:
    """A stage in training: its engine, its place in the schedule and what it has to report."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        recipe, how = stage.recipe, stage.execution
        settings = recipe.optimization
        doing("starting", 0)
        with agreeing():
            self.dataset = build_dataset(stage)
            self.dataset.limit = ReadLimit.of_run(stage.directory, how.faults.video_seconds)
            self.validation = load_entries(stage, "val") if isinstance(recipe, Finetune) else []
            self.steps_per_epoch = steps_per_epoch(len(self.dataset), settings.global_batch)
        with agreeing():
            preflight(stage, process, self.dataset.entries)
        doing("starting", 0)
        with agreeing():
            torch.manual_seed(recipe.seed)  # the same first weights on every process
            self.task: Task = build_task(stage, facts_of(recipe).classes, process.device)
        self.total_updates = self.steps_per_epoch * settings.epochs
        self.learning_rates = cosine_schedule(
            settings.peak_lr, settings.floor_lr, settings.laid_out_epochs, settings.warmup_epochs, self.steps_per_epoch
        )
        batch = Batch(how.micro_batch, how.accumulation, process.world_size)
        model = self.task.model.to(process.device)
        self.noise = SampleNoise(model)
        self.health = Health(stage, process)
        made_by = {"precision": how.precision, "training list": fingerprint(self.dataset.entries)}
        self.keeper = Keeper(stage, process, self.steps_per_epoch, made_by)
        with agreeing():
            self.engine = build_engine(model, build_optimizer(model, settings), how.deepspeed, batch, how.precision)
            torch.manual_seed(recipe.seed * 1_000_003 + process.rank + 1)
            state = self.keeper.load(self.engine)
            self.update = self.keeper.newest
            self.batches = iter(train_loader(stage, self.dataset, process.rank, self.update))
        self.loading = LoaderHealth()
        self.health.restore(state)
        self.window = Window(**state.get("window", {}))
        self.monitor = Monitor(stage.directory, process, self.update)
        self.validated = gather(self.monitor.newest("val_top1"))[0]
        self.unreadable = UnreadableFiles(stage, process, len(self.dataset), state)
        self.progress = Progress(stage.kind, self.total_updates, self.update) if process.is_first else None
        self.stopping = self.saving = False  # agreed by all processes
        self.waited = 0.0  # for the data of the update in progress, in seconds

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return self.update // self.steps_per_epoch

    def to_the_end(self) -> None:
        """Runs the remaining updates with their checkpoints, validations and reports, and leaves the weights.

        Raises:
            GivenUp, Interrupted: see `train`.
            RollBack: the run is to be started again from its newest checkpoint.
        """
        how = self.stage.execution
        self._validate_if_due()  # the last attempt may have ended before it did
        self.engine.train()
        while self.update < self.total_updates:
            learning_rate = float(self.learning_rates[self.update])
            self._one_update(learning_rate)
            self.update += 1
            finished = self.update == self.total_updates
            if self.update % how.log_every == 0 or finished:
                self._report(learning_rate)
            if finished:
                self._insist(self._save)
            elif self.stopping or self.saving or self.keeper.due(self.update):
                self._save()
            if self.stopping and not finished:
                raise self._interrupted()
            self._validate_if_due()
        self._insist(lambda: self.keeper.save_weights(self.engine, self.stage.directory / WEIGHTS, self.update))

    def _one_update(self, learning_rate: float) -> None:
        """One optimizer step over `accumulation` micro-batches, unless their losses or gradient are not finite."""
        started, self.waited = time.monotonic(), 0.0
        number, accumulation = self.update + 1, self.stage.execution.accumulation
        if self.health.leaves_out(number):
            for _ in range(accumulation):
                self._next_batch()
            return
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        losses: list[torch.Tensor] = []  # (names,) each
        samples: list[list[int]] = []
        for step in range(accumulation):
            raw = self._next_batch()
            samples.append(raw["indices"].tolist())
            doing("in forward and backward", number)
            if step:
                self.engine.step()  # inside an update this only counts the micro-batch
            batch = prepare(raw, self.stage.recipe, self.process.device)
            self.noise.draw(raw["layer_seeds"], self.process.device)
            named = self.task.losses(self.engine, batch)
            losses.append(torch.stack([loss.detach().float() for loss in named.values()]))
            loss = named["loss"]
            if step == accumulation - 1:
                means = self._agree(torch.stack(losses))
                if not all(map(math.isfinite, means)):
                    loss = loss * math.nan  # so that every ZeRO stage leaves its update out
            self.engine.backward(loss)
        doing("updating weights", number)
        norm = take_step(self.engine)
        values = dict(zip(named, means, strict=True)) | {"grad_norm": norm}
        if all(map(math.isfinite, values.values())):
            spike = self.health.note_good(number, means[0], self.keeper.newest)
            self.window.add(values, time.monotonic() - started, self.waited)
            if spike:
                self.monitor.write(number, self.epoch + 1, spike)
        else:
            self._note_bad(number, torch.stack(losses), samples, lossy=not all(map(math.isfinite, means)))

    def _next_batch(self) -> dict[str, Any]:
        """The loader's next micro-batch; notes the wait for it and the files that others replaced in it."""
        doing("reading videos", self.update + 1)
        asked = time.monotonic()
        raw = next(self.batches)
        self.waited += time.monotonic() - asked
        if "failed" in raw:
            raise ConfigError(f"{self.stage.id}: {raw['failed']}; check the data set's root")
        self.loading.note(raw, self.batches)
        self.unreadable.found.update(raw["unreadable"])
        return raw

    def _agree(self, losses: torch.Tensor) -> list[float]:
        """Means over the micro-batches (micro-batches, names) of all ranks.

        Whether any rank was asked to stop, or wants a checkpoint, comes to all with them.
        """
        doing("waiting for the others' losses", self.update + 1)
        asked = losses.new_tensor([stop_requested(), self.keeper.wanted()])
        *means, stopping, saving = mean_across_processes(torch.cat([losses.mean(dim=0), asked])).tolist()
        self.stopping, self.saving = stopping > 0, saving > 0
        doing("in forward and backward", self.update + 1)
        return means

    def _note_bad(self, number: int, losses: torch.Tensor, samples: list[list[int]], lossy: bool) -> None:
        """Names the videos behind a loss that is not finite; a gradient tells nothing of them, so all are named."""
        finite = losses.isfinite().all(dim=1).tolist()
        suspects = [part for part, fine in zip(samples, finite, strict=True) if not (lossy and fine)]
        videos = [self.dataset.entries[index].path for part in suspects for index in part]
        self.health.note_bad(number, "loss" if lossy else "gradient", videos, self.keeper.newest)

    def _report(self, learning_rate: float) -> None:
        """Writes what happened since the last report, and shows it."""
        settings, epoch = self.stage.recipe.optimization, (self.update - 1) // self.steps_per_epoch + 1
        replaced = self.unreadable.share(epoch)
        window, self.window = self.window, Window()
        values = {"lr": learning_rate, "weight_decay": settings.weight_decay, **replaced}
        values["epochs_done"] = self.update / self.steps_per_epoch
        values["memory_gb"] = peak_memory_gb(self.process.device)
        if window.updates:
            values |= window.means(settings.global_batch) | self.loading.report()
        self.monitor.write(self.update, epoch, values)
        if self.progress is not None:
            losses = " ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
            unit = "images" if self.stage.kind == "image_teacher" else "clips"
            rate = f" {values['samples_per_second']:.1f} {unit}/s" if window.updates else " (updates left out)"
            self.progress.show(self.update, f"epoch {epoch}/{settings.epochs} {losses}{rate}")

    def _save(self) -> bool:
        """Saves a checkpoint, but never of weights that may be what makes updates fail; returns whether it did."""
        if self.health.in_a_row and self.update < self.total_updates:
            return False
        doing("saving", self.update)
        self.unreadable.share((self.update - 1) // self.steps_per_epoch + 1)
        self.monitor.flush()
        state = {**self.health.state(), **self.unreadable.state(), "window": vars(self.window)}
        saved = self.keeper.save(self.engine, self.update, state)
        if not saved:
            self.monitor.write(self.update, self.epoch + 1, {"failed_saves": self.keeper.failures})
        return saved

    def _insist(self, save: Callable[[], bool]) -> None:
        """Saves what the run has come to; where the disk does not take it, nothing is left but to wait for room."""
        while not save():
            for _ in range(math.ceil(self.stage.execution.faults.save_again_seconds)):
                doing("waiting for room on the disk", self.update)
                time.sleep(1)
                if any(gather(stop_requested())):
                    raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"{self.stage.id}: stopped by a signal after update {self.update} of {self.total_updates}; "
            f"update {self.keeper.newest} is saved; start it again to go on from there",
            self.keeper.newest,
        )

    def _validate_if_due(self) -> None:
        """Validates a classifier every few epochs and at the end, on one centre view of each validation video.

        Told to stop meanwhile, it leaves that to the next attempt.
        """
        epoch, rest = divmod(self.update, self.steps_per_epoch)
        due = epoch % self.stage.execution.validate_every == 0 or self.update == self.total_updates
        if not isinstance(self.stage.recipe, Finetune) or rest or not due or self.update <= self.validated:
            return
        accuracy = validate(self.engine, self.validation, self.stage, self.process)
        self.engine.train()
        if accuracy is None:
            if self.keeper.newest < self.update:
                self._save()
            raise self._interrupted()
        self.monitor.write(self.update, epoch, accuracy)
        self.monitor.flush()
        self.validated = self.update

    def close(self) -> None:
        """Ends what runs beside the training: loader processes, the progress line, the writers, the engine."""
        self.batches = iter(())
        kill_workers()
        if self.progress is not None:
            self.progress.close()
        self.monitor.close()
        self.engine.destroy()


@dataclass
class Window:
    """What is gathered between two reports; its seconds are those of updates, not of checkpoints or validations."""

    seconds: float = 0.0
    waited: float = 0.0
    updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], seconds: float, waited: float) -> None:
        self.updates += 1
        self.seconds += seconds
        self.waited += waited
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in values.items()}

    def means(self, global_batch: int) -> dict[str, float]:
        """The mean of each value over the updates, and how fast they were."""
        return {name: total / self.updates for name, total in self.sums.items()} | {
            "samples_per_second": self.updates * global_batch / self.seconds,
            "data_wait_share": self.waited / self.seconds,
        }
