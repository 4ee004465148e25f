"""The training loop of all training stages."""

import contextlib
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from mvd.batch import Batch
from mvd.config import ConfigError, dataset_of
from mvd.data.annotations import fingerprint
from mvd.data.datasets import build_dataset
from mvd.data.device_batches import DeviceBatches
from mvd.data.loader import LoaderStats, steps_per_epoch, train_loader
from mvd.data.on_device import prepare
from mvd.data.sample_check import check_samples
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.workers import kill_workers
from mvd.distributed.preflight import preflight
from mvd.distributed.process import PendingMean, Process, exit_together, gather
from mvd.distributed.signals import Interrupted, stop_requested
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.batch_pictures import BatchPictures
from mvd.evaluation.evaluator import build_evaluators
from mvd.monitoring.metrics import Metrics, gpu_throughput, peak_memory_gb
from mvd.monitoring.progress import Progress, training_text
from mvd.monitoring.rank_times import RankTimes
from mvd.provenance import record_training
from mvd.stage import Stage
from mvd.train.bad_updates import BadUpdates, RollBack
from mvd.train.checkpoint_policy import CheckpointPolicy
from mvd.train.engine import build_engine, take_step
from mvd.train.evaluations import Evaluations
from mvd.train.optimizer import build_optimizer
from mvd.train.sample_seeded_dropout import SampleSeededLayers
from mvd.train.schedule import cosine_schedule
from mvd.train.skipped_files import SkippedFiles
from mvd.train.stateful import Stateful, collect, restore
from mvd.train.tasks import Task, build_task
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
        with contextlib.suppress(RollBack):
            return {**_train_from_newest(stage, process), "wall_seconds": time.monotonic() - started}
        gc.collect()  # frees the first engine, which the exception referenced: two would not fit on a GPU
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # otherwise the checks before the start find the GPU's memory in use


def _train_from_newest(stage: Stage, process: Process) -> dict[str, Any]:
    run = TrainingRun(stage, process)
    try:
        run.to_the_end()
        latest = run.metrics.latest()
    finally:
        run.close()
    return {
        "epochs": stage.recipe.optimization.epochs,
        "updates": run.total_updates,
        "weights": stage.files.weights.name,
        "unreadable": sorted(run.skipped_files.named),
        "skipped_updates": run.bad_updates.skipped,
        **{name: latest[name] for name in ("loss", "val_top1") if name in latest},
    }


class TrainingRun:
    """A stage in training: its engine, its update in schedule and data, and its metrics."""

    def __init__(self, stage: Stage, process: Process) -> None:
        self.stage, self.process = stage, process
        recipe, how = stage.recipe, stage.execution
        settings = recipe.optimization
        heartbeat("starting", 0)
        with exit_together():
            self.dataset = build_dataset(stage)
            self.dataset.timeout = ReadTimeout.of_run(stage.files.timed_out, how.faults.video_seconds)
            evaluators = build_evaluators(stage, process)
            self.steps_per_epoch = steps_per_epoch(len(self.dataset), settings.global_batch)
        with exit_together():
            preflight(stage, process, check_samples(self.dataset.entries, how.reader))
        heartbeat("starting", 0)
        with exit_together():
            torch.manual_seed(recipe.seed)  # the same first weights on every process
            self.task: Task = build_task(stage, dataset_of(recipe).classes, process.device)
        self.total_updates = self.steps_per_epoch * settings.epochs
        self.learning_rates = cosine_schedule(
            settings.peak_lr, settings.floor_lr, settings.laid_out_epochs, settings.warmup_epochs, self.steps_per_epoch
        )
        batch = Batch(how.micro_batch, how.accumulation, process.world_size)
        model = self.task.model.to(process.device)
        self.seeded_layers = SampleSeededLayers(model, how.precision)
        self.bad_updates = BadUpdates(stage, process)
        self.skipped_files = SkippedFiles(stage, process, len(self.dataset))
        self.window = Window()
        made_by = {"precision": how.precision, "training list": fingerprint(self.dataset.entries)}
        self.checkpoints = CheckpointPolicy(stage, process, self.steps_per_epoch, made_by)
        with exit_together():
            self.engine = build_engine(model, build_optimizer(model, settings), how.deepspeed, batch, how.precision)
            torch.manual_seed(recipe.seed * 1_000_003 + process.rank + 1)
            restore(self.stateful(), self.checkpoints.load(self.engine))
            self.update = self.checkpoints.newest
            loader = train_loader(stage, self.dataset, process.rank, self.update)
        self.batches = DeviceBatches(iter(loader), process.device)
        self.loading, self.rank_times = LoaderStats(), RankTimes(process)
        self.pictures = BatchPictures(stage, process, self.task.watched, self.steps_per_epoch, self.total_updates)
        self.metrics = Metrics.of_stage(stage, process, self.update)
        self.metrics.text(self.update, "4_hosts", self.rank_times.table())
        self.evaluations = Evaluations(evaluators, self.metrics, self.steps_per_epoch, self.total_updates)
        self.progress = Progress(stage.kind, self.total_updates, self.update) if process.is_first else None
        self.stopping = self.saving = 0.0  # above 0 if a process asked for it; the same on all processes

    @property
    def epoch(self) -> int:
        """The epoch in progress, counted from 0."""
        return self.update // self.steps_per_epoch

    def stateful(self) -> dict[str, Stateful]:
        """The parts of the run that a checkpoint includes; to add one, create it in `__init__` and list it here."""
        return {"bad_updates": self.bad_updates, "skipped_files": self.skipped_files, "window": self.window}

    def to_the_end(self) -> None:
        """Runs the remaining updates with checkpoints, evaluations and reports, then writes the weights.

        Raises:
            RunFailed, Interrupted: see `train`.
            RollBack: the run must start again from its newest checkpoint.
        """
        record_training(self.stage, self.process.is_first)
        self._evaluate_if_due()  # the last attempt may have ended during an evaluation
        self.engine.train()
        while self.update < self.total_updates:
            learning_rate = float(self.learning_rates[self.update])
            self._one_update(learning_rate)
            self.update += 1
            finished = self.update == self.total_updates
            self.pictures.draw(self.update, self.metrics)
            if self.update % self.stage.execution.log_every == 0 or finished:
                self._report(learning_rate)
            if finished:
                self._save_at_the_end(self._save)
            elif self.stopping or self.saving or self.checkpoints.due(self.update):
                self._save()
            if self.stopping and not finished:
                raise self._interrupted()
            self._evaluate_if_due()
        self._save_at_the_end(lambda: self.checkpoints.save_weights(self.engine, self.stage.files.weights, self.update))

    def _one_update(self, learning_rate: float) -> None:
        """One optimizer step over `accumulation` micro-batches; skipped if the loss or the gradient is not finite."""
        started, self.batches.waited = time.monotonic(), 0.0
        self.rank_times.start()
        number, accumulation = self.update + 1, self.stage.execution.accumulation
        if self.bad_updates.skips(number):
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
            heartbeat("in forward and backward", number)
            if step:
                self.engine.step()  # within an update it only counts the micro-batch
            batch = prepare(raw, self.stage.recipe, self.process.device)
            self.seeded_layers.draw(raw["layer_seeds"], self.process.device)
            with self.pictures.watching(number, batch):
                named = self.task.losses(self.engine, batch)
            losses.append(torch.stack([loss.detach().float() for loss in named.values()]))
            loss = named["loss"]
            if step == accumulation - 1:
                self.rank_times.arrive()
                agreed = self._agree(torch.stack(losses))
                loss = loss * (1 + 0 * torch.stack(losses).sum())  # NaN on one rank: all gradients are, all skip it
            self.engine.backward(loss)
        agreed.start_copy()
        heartbeat("reading videos", number)
        self.batches.read_ahead()
        heartbeat("updating weights", number)
        norm = take_step(self.engine)
        self.rank_times.add()
        *means, self.stopping, self.saving = agreed.read()
        values = dict(zip(named, means, strict=True)) | {"grad_norm": norm}
        if math.isfinite(norm):
            spike = self.bad_updates.record_good(number, means[0], self.checkpoints.newest)
            self.window.add(values, time.monotonic() - started, self.batches.waited)
            if spike:
                self.metrics.write(number, self.epoch + 1, spike)
        else:
            self._note_bad(number, torch.stack(losses), samples, lossy=not all(map(math.isfinite, means)))

    def _next_batch(self) -> dict[str, Any]:
        """The loader's next micro-batch; records the time it took and the files that could not be read."""
        heartbeat("reading videos", self.update + 1)
        raw = next(self.batches)
        if "failed" in raw:
            raise ConfigError(f"{self.stage.id}: {raw['failed']}; check the data set's root")
        self.loading.note(raw, self.batches.source)
        self.skipped_files.found.update(raw["unreadable"])
        return raw

    def _agree(self, losses: torch.Tensor) -> PendingMean:
        """Means over the micro-batches of all ranks; losses: (micro-batches, names).

        The same all-reduce tells every rank whether any was asked to stop or wants a checkpoint.
        """
        heartbeat("waiting for the others' losses", self.update + 1)
        asked = torch.tensor([stop_requested(), self.checkpoints.wanted()], dtype=losses.dtype)
        asked = asked.to(losses.device, non_blocking=True)
        pending = PendingMean(torch.cat([losses.mean(dim=0), asked]))
        heartbeat("in forward and backward", self.update + 1)
        return pending

    def _note_bad(self, number: int, losses: torch.Tensor, samples: list[list[int]], lossy: bool) -> None:
        """Records a skipped update with the videos of its non-finite losses, or all if the gradient is at fault."""
        finite = losses.isfinite().all(dim=1).tolist()
        suspects = [part for part, fine in zip(samples, finite, strict=True) if not (lossy and fine)]
        videos = [self.dataset.entries[index].path for part in suspects for index in part]
        self.bad_updates.record_bad(number, "loss" if lossy else "gradient", videos, self.checkpoints.newest)

    def _report(self, learning_rate: float) -> None:
        """Logs the metrics accumulated since the last report."""
        settings, epoch = self.stage.recipe.optimization, (self.update - 1) // self.steps_per_epoch + 1
        replaced = self.skipped_files.share(epoch)
        values = {"lr": learning_rate, "weight_decay": settings.weight_decay, **replaced}
        values["epochs_done"] = self.update / self.steps_per_epoch
        memory = peak_memory_gb(self.process.device)
        values |= {"memory_gb": memory, "speed/save_seconds": self.checkpoints.take_seconds()}
        if self.window.updates:
            values |= self.window.means(settings.global_batch) | self.loading.report()
            values |= gpu_throughput(self.stage.recipe, values["samples_per_second"], self.process)
        values |= self.rank_times.report()
        self.window.clear()
        self.metrics.write(self.update, epoch, values)
        if self.progress is not None:
            unit = "images" if self.stage.kind == "image_teacher" else "clips"
            text = training_text(f"{epoch}/{settings.epochs}", values, unit)
            self.progress.show(self.update, text + self.rank_times.straggler(values))

    def _save(self) -> bool:
        """Saves a checkpoint, except during a series of bad updates, which the weights may cause; returns if it did."""
        if self.bad_updates.in_a_row and self.update < self.total_updates:
            return False
        heartbeat("saving", self.update)
        self.skipped_files.share((self.update - 1) // self.steps_per_epoch + 1)
        self.metrics.flush()
        saved = self.checkpoints.save(self.engine, self.update, collect(self.stateful()))
        if not saved:
            self.metrics.write(self.update, self.epoch + 1, {"failed_saves": self.checkpoints.failures})
        return saved

    def _save_at_the_end(self, save: Callable[[], bool]) -> None:
        """Retries the save until the disk accepts it."""
        while not save():
            for _ in range(math.ceil(self.stage.execution.faults.save_again_seconds)):
                heartbeat("waiting for disk space", self.update)
                time.sleep(1)
                if any(gather(stop_requested())):
                    raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"{self.stage.id}: stopped by a signal after update {self.update} of {self.total_updates}; "
            f"update {self.checkpoints.newest} is saved; start it again to go on from there",
            self.checkpoints.newest,
        )

    def _evaluate_if_due(self) -> None:
        if self.evaluations.run_due(self.engine, self.update):
            return
        if self.checkpoints.newest < self.update:
            self._save()
        raise self._interrupted()

    def close(self) -> None:
        """Ends the loader processes, the progress line, the writers and the engine."""
        self.batches = DeviceBatches(iter(()), self.process.device)
        kill_workers()
        if self.progress is not None:
            self.progress.close()
        self.metrics.close()
        self.engine.destroy()
