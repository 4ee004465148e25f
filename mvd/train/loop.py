"""The training loop of all training stages."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch

from mvd.batch import Batch
from mvd.config import ConfigError, dataset_of
from mvd.data.annotations import fingerprint
from mvd.data.datasets import build_dataset
from mvd.data.loader import LoaderStats, steps_per_epoch
from mvd.data.on_device import prepare
from mvd.data.workers import kill_workers
from mvd.distributed.process import Process, exit_together
from mvd.distributed.signals import Interrupted, stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.batch_pictures import BatchPictures
from mvd.evaluation.evaluator import build_evaluators
from mvd.monitoring.metrics import Metrics, gpu_throughput, peak_memory_gb
from mvd.monitoring.progress import Progress, training_text
from mvd.monitoring.rank_times import RankTimes
from mvd.provenance import record_training
from mvd.stage import Stage
from mvd.train.audit import Audits
from mvd.train.bad_updates import BadUpdates, RollBack
from mvd.train.checkpoint_policy import CheckpointPolicy
from mvd.train.compilation import Compilation
from mvd.train.engine import build_engine
from mvd.train.evaluations import Evaluations
from mvd.train.optimizer import build_optimizer
from mvd.train.sample_seeded_dropout import SampleSeededLayers
from mvd.train.schedule import cosine_schedule
from mvd.train.shared import Shared, check_start, free_memory, start_batches
from mvd.train.skipped_files import SkippedFiles
from mvd.train.stateful import Stateful, collect, restore
from mvd.train.tasks import Task, build_task
from mvd.train.update import ForwardPass, Update
from mvd.train.window import Window


def train(stage: Stage, process: Process) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, if there is one, to its end; returns the content of result.json.

    Writes `weights.safetensors`, metrics, events and checkpoints to the run directory.

    Raises:
        ConfigError: an invalid setting or input.
        RunFailed: training diverged, or its data or disk is unusable; raised on every process.
        HostFault: a machine failed the checks before the start; raised on every process.
        Interrupted: stopped by a signal; the last update is saved. Raised on every process.
    """
    started = time.monotonic()
    while True:
        run = TrainingRun(stage, process)
        try:
            run.to_the_end()
            return {**run.result(), "wall_seconds": time.monotonic() - started}
        except RollBack:
            process = replace(process, hosts_checked=True)  # a disk that is full by now must not end the run
        finally:
            run.close()
            del run
        free_memory()


class TrainingRun:
    """A stage in training: its engine, its update in schedule and data, and its metrics."""

    def __init__(self, stage: Stage, process: Process, shared: Shared | None = None) -> None:
        """shared: what the stages of a group have in common (mvd.train.group)."""
        self.stage, self.process = stage, process
        recipe, how = stage.recipe, stage.execution
        settings = recipe.optimization
        heartbeat("starting", 0)
        with exit_together():
            self.dataset = build_dataset(stage) if shared is None else shared.dataset
            evaluators = build_evaluators(stage, process)
            self.steps_per_epoch = steps_per_epoch(len(self.dataset), settings.global_batch)
        if shared is None:
            check_start(stage, process, self.dataset)
        with exit_together():
            torch.manual_seed(recipe.seed)  # the same first weights on every process
            self.task: Task = build_task(stage, dataset_of(recipe).classes, process.device, shared and shared.teachers)
        self.total_updates: int = self.steps_per_epoch * settings.epochs
        self.learning_rates = cosine_schedule(
            settings.peak_lr, settings.floor_lr, settings.laid_out_epochs, settings.warmup_epochs, self.steps_per_epoch
        )
        model = self.task.model.to(process.device)
        layers = SampleSeededLayers(model, how.precision)
        self.bad_updates, self.window = BadUpdates(stage, process), Window()
        self.skipped_files = SkippedFiles(stage, process, len(self.dataset))
        made_by = {"precision": how.precision, "training list": fingerprint(self.dataset.entries)}
        self.checkpoints = CheckpointPolicy(stage, process, self.steps_per_epoch, made_by, self._note_failed_save)
        with exit_together():
            batch = Batch(how.micro_batch, how.accumulation, process.world_size)
            self.engine = build_engine(model, build_optimizer(model, settings), how.deepspeed, batch, how.precision)
            self.compilation = Compilation(stage, process, self.engine, self.task.watched)
            self.forward = ForwardPass(self.engine, self.task, layers, self.compilation, process.device)
            self.audits = Audits(stage, process, self.forward, self.bad_updates, self.checkpoints.newest_finished)
            torch.manual_seed(recipe.seed * 1_000_003 + process.rank + 1)
            restore(self.stateful(), self.checkpoints.load(self.engine))
            self.update: int = self.checkpoints.newest
            self.batches = shared.batches if shared else start_batches(stage, self.dataset, process, self.update)
        self.loading, self.rank_times = LoaderStats(), RankTimes(stage, process)
        self.pictures = BatchPictures(stage, process, self.task.watched, self.steps_per_epoch, self.total_updates)
        self.metrics = Metrics.of_stage(stage, process, self.update)
        self.metrics.text(self.update, "4_hosts", self.rank_times.table())
        self.evaluations = Evaluations(evaluators, self.metrics, self.steps_per_epoch, self.total_updates)
        title = stage.recipe.name if shared else stage.kind
        self.progress = Progress(title, self.total_updates, self.update) if process.is_first else None
        self.is_sharing, self.postponed = shared is not None, False  # a save, to the end of a series of bad updates
        self.stopping = self.saving = self.written = 0.0  # of which share of the processes it is true
        self.running: Update | None = None

    def stateful(self) -> dict[str, Stateful]:
        """The parts of the run that a checkpoint includes; to add one, create it in `__init__` and list it here."""
        return {"bad_updates": self.bad_updates, "skipped_files": self.skipped_files, "window": self.window}

    @property
    def is_finished(self) -> bool:
        """Whether all updates are made; `write_weights` is left."""
        return self.update == self.total_updates

    def to_the_end(self) -> None:
        """Runs the remaining updates with checkpoints, evaluations and reports, then writes the weights.

        Raises:
            RunFailed, Interrupted: see `train`.
            RollBack: the run must start again from its newest checkpoint.
        """
        self.begin()
        while not self.is_finished:
            self._one_update(learning_rate := float(self.learning_rates[self.update]))
            self.complete_update(learning_rate)
        self.write_weights()

    def begin(self) -> None:
        """Runs the evaluations that the last attempt may have left out, and turns to training."""
        record_training(self.stage, self.process.is_first)
        self._evaluate_if_due()
        self.engine.train()

    def _one_update(self, learning_rate: float) -> None:
        """One optimizer step over `accumulation` micro-batches; skipped if the loss or the gradient is not finite."""
        self.begin_update(learning_rate)
        for _ in range(self.stage.execution.accumulation):
            raw = self.next_batch()
            if self.running is None:
                self.learn(raw, {})
                continue
            batch = prepare(raw, self.stage.recipe, self.process.device)
            with self.pictures.watching(self.update + 1, batch):
                self.learn(raw, batch)
        self.finish_update()

    def begin_update(self, learning_rate: float) -> None:
        """Begins the next update; `running` is None if it is skipped because of an earlier rollback."""
        self.rank_times.start()
        if self.bad_updates.skips(number := self.update + 1):
            return
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.running = Update(self.forward, self.batches, number, self.stage.execution.accumulation)

    def learn(self, raw: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
        """Adds the gradient of a micro-batch to the update that runs, if it is not skipped; see Update.learn."""
        self.loading.note(raw, self.batches.source)
        self.skipped_files.found.update(raw["unreadable"])
        if self.running is not None:
            self.running.learn(raw, batch, self._flags)

    def _flags(self) -> tuple[bool, ...]:
        """Whether this process was asked to stop; and of checkpoints wanted and written. Its part is over by then."""
        self.rank_times.arrive()
        return stop_requested(), *self.checkpoints.flags()

    def finish_update(self) -> None:
        """Makes the optimizer step of the update that runs, and records its losses."""
        running, self.running = self.running, None
        self.stopping = self.saving = self.written = 0.0  # nobody is asked in an update that is skipped
        if running is None:
            return
        values, (self.stopping, self.saving, self.written) = running.step(self.audits.recompute_if_bad)
        self.rank_times.add(running.waited, running.waited_ahead)
        if not math.isfinite(values["grad_norm"]):
            what, samples = running.suspects(values)
            videos = [self.dataset.entries[index].path for index in samples]
            self.bad_updates.record_bad(running.number, what, videos, self.checkpoints.newest_finished)
            return
        spike = self.bad_updates.record_good(running.number, values["loss"], self.checkpoints.newest_finished)
        self.window.add(values, time.monotonic() - running.started, running.waited)
        if spike:
            self.metrics.write(running.number, self.update // self.steps_per_epoch + 1, spike)

    def complete_update(self, learning_rate: float) -> None:
        """Counts the update; draws, reports, saves and evaluates as far as that is due. Raises as `to_the_end`."""
        self.update += 1
        if self.written == 1:
            self.checkpoints.finish()
        self.audits.check(self.update)
        self.pictures.draw(self.update, self.metrics)
        if self.update % self.stage.execution.log_every == 0 or self.is_finished:
            self._report(learning_rate)
        if self.is_finished:
            self._save_at_the_end(lambda: self._save() and self.checkpoints.finish())
        elif self.stopping:
            self.stop()
        elif self.saving or self.postponed or self.checkpoints.due(self.update):
            self._save()
        self._evaluate_if_due()

    def write_weights(self) -> None:
        """Writes weights.safetensors, after the last update."""
        self._save_at_the_end(lambda: self.checkpoints.save_weights(self.engine, self.stage.files.weights, self.update))

    def result(self) -> dict[str, Any]:
        """The content of result.json after the last update, without the stage's name and its duration."""
        return {
            "epochs": self.stage.recipe.optimization.epochs,
            "updates": self.total_updates,
            "weights": self.stage.files.weights.name,
            "unreadable": sorted(self.skipped_files.named),
            "skipped_updates": self.bad_updates.skipped,
            **{name: value for name, value in self.metrics.latest().items() if name in ("loss", "val_top1")},
        }

    def next_batch(self) -> dict[str, Any]:
        """The loader's next micro-batch."""
        heartbeat("reading videos", self.update + 1)
        if "failed" in (raw := next(self.batches)):
            raise ConfigError(f"{self.stage.id}: {raw['failed']}; check the data set's root")
        return raw

    def _report(self, learning_rate: float) -> None:
        """Logs the metrics accumulated since the last report."""
        settings, epoch = self.stage.recipe.optimization, (self.update - 1) // self.steps_per_epoch + 1
        values = {"lr": learning_rate, "weight_decay": settings.weight_decay, **self.skipped_files.share(epoch)}
        values |= {"epochs_done": self.update / self.steps_per_epoch, "memory_gb": peak_memory_gb(self.process.device)}
        if self.window.updates:
            values |= self.window.means(settings.global_batch) | self.loading.report()
            values |= gpu_throughput(self.stage.recipe, values["samples_per_second"], self.process)
        values |= self.rank_times.report(self.update) | self.checkpoints.report()
        self.compilation.keep()
        self.window.clear()
        self.metrics.write(self.update, epoch, values)
        if self.progress is not None:
            unit = "images" if self.stage.kind == "image_teacher" else "clips"
            text = training_text(f"{epoch}/{settings.epochs}", values, unit) + self.rank_times.straggler(values)
            self.progress.show(self.update, text)

    def _save(self) -> bool:
        """Starts to save, after a series of bad updates (the weights may be their cause); returns whether it did."""
        self.postponed = bool(self.bad_updates.in_a_row) and self.update < self.total_updates
        if self.postponed:
            return False
        self.audits.check(self.update, before_save=True)
        heartbeat("saving", self.update)
        self.skipped_files.share((self.update - 1) // self.steps_per_epoch + 1)
        self.metrics.flush()
        return self.checkpoints.save(self.engine, self.update, collect(self.stateful()))

    def _note_failed_save(self, update: int, failures: int) -> None:
        self.metrics.write(update, (update - 1) // self.steps_per_epoch + 1, {"failed_saves": failures})

    def _save_at_the_end(self, save: Callable[[], bool]) -> None:
        if not self.checkpoints.retry(save, self.update):
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        newest = self.checkpoints.newest_finished()
        done = f"{self.stage.id}: stopped by a signal after update {self.update} of {self.total_updates}"
        return Interrupted(f"{done}; update {newest} is saved; start it again to go on from there", newest)

    def _evaluate_if_due(self) -> None:
        if self.evaluations.due(self.update):
            self.checkpoints.finish()  # an evaluation may take long
        with self.compilation.paused():
            if not self.evaluations.run_due(self.engine, self.update):
                self.stop()

    def stop(self) -> NoReturn:
        """Saves what is not saved yet and raises Interrupted; an update in progress is lost."""
        if self.checkpoints.newest_finished() < self.update:
            self._save()
        raise self._interrupted()

    def close(self) -> None:
        """Ends the loader, the progress line, the writers and the engine."""
        if not self.is_sharing:
            self.batches.end()  # before its processes are killed: a thread of it may be reading from them
            kill_workers()
        self.checkpoints.abandon()
        if self.progress is not None:
            self.progress.close()
        self.metrics.close()
        self.engine.destroy()
