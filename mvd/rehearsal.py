"""A rehearsal: a stage's own loop in its real layout for a few updates, with a save and a resume, to measure it.

launch/rehearsal.py plans rehearsals; `execution.rehearsal` says how one differs from the stage. A test is rehearsed
with a few videos. Each has a run directory of its own.
"""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mvd.config import ConfigError, DatasetPaths, Test
from mvd.data.datasets import load_entries
from mvd.data.loader import worker_count
from mvd.data.sample_check import check_samples
from mvd.distributed.faults import RunFailed
from mvd.distributed.preflight import all_reduce_bandwidth, preflight
from mvd.distributed.process import Process, exit_together, gather
from mvd.distributed.signals import Interrupted
from mvd.distributed.watchdog import heartbeat
from mvd.evaluation.multiview import load_classifier, write_logits
from mvd.monitoring.metrics import gpu_throughput, peak_memory_gb
from mvd.monitoring.progress import Progress
from mvd.run_directory import RunDirectory
from mvd.stage import Rehearsal, Stage
from mvd.stand_ins import write_samples, write_weights
from mvd.train.bad_updates import RollBack
from mvd.train.loop import TrainingRun
from mvd.train.shared import free_memory

RESUMED_UPDATES = 2  # after a resume
VIDEOS_PER_PROCESS = 4  # of a test, beside those of its loader
STAND_INS = "stand-ins"  # in the run directory, deleted at the end


def rehearse(stage: Stage, process: Process) -> dict[str, Any]:
    """Rehearses a stage with `execution.rehearsal`; returns the content of result.json, figures under `rehearsal`.

    Figures: gpus, micro_batch, gpu (its name, None on a CPU), gpu_memory_gb, memory_gb (the peak of a process),
    loader_workers, generated_data, generated_samples, samples_per_second, data_wait_share, save_seconds,
    save_stall_seconds (for which training stood still), save_gb, resume_seconds, all_reduce_gb_per_second and those of
    mvd.flops.throughput, as far as they apply.

    Raises:
        What `mvd.train.loop.train` and `mvd.evaluation.multiview.run_test` raise.
    """
    started, how = time.monotonic(), stage.execution.rehearsal or Rehearsal()
    if stage.kind != "test":
        how = dataclasses.replace(how, updates=how.updates + _read_before(stage))
    samples = _samples_needed(stage, how, process) if how.generated_data else 0
    real = _with_stand_ins(stage, how, samples, process)
    try:
        measured = _test(real, process) if stage.kind == "test" else _train(real, how, process)
    finally:
        if process.is_first:
            shutil.rmtree(stage.directory / STAND_INS, ignore_errors=True)
    if process.world_size > 1:
        measured["all_reduce_gb_per_second"] = min(gather(all_reduce_bandwidth(process)))
    on_gpu = process.device.type == "cuda"
    figures = {
        "gpus": process.world_size,
        "micro_batch": stage.execution.micro_batch,
        "gpu": torch.cuda.get_device_name(process.device) if on_gpu else None,
        **({"gpu_memory_gb": torch.cuda.get_device_properties(process.device).total_memory / 1e9} if on_gpu else {}),
        "loader_workers": worker_count(stage.execution.workers),
        "generated_data": how.generated_data,
        "generated_samples": samples,
        **measured,
    }
    if process.is_first:
        _clean(stage.files, how)
    return {"rehearsal": figures, "wall_seconds": time.monotonic() - started}


class ShortRun(TrainingRun):
    """A run that ends after so many more updates and leaves `spare` ones for a resume; without evaluations.

    save_seconds: how long the checkpoint took that it ends with. save_stall_seconds: the part of it for which training
    stood still.
    """

    def __init__(self, stage: Stage, process: Process, updates: int, spare: int) -> None:
        super().__init__(stage, process)
        self.total_updates = min(self.total_updates, self.update + updates, max(self.total_updates - spare, 1))
        self.evaluations.evaluators = []
        self.save_seconds = self.save_stall_seconds = 0.0
        if self.progress is not None:
            self.progress.close()
            self.progress = Progress(f"rehearsal of {stage.kind}", self.total_updates, self.update)

    def _save(self) -> bool:
        started = time.monotonic()
        try:
            return super()._save()
        finally:
            self.save_stall_seconds = time.monotonic() - started

    def _save_at_the_end(self, save: Callable[[], bool]) -> None:
        started = time.monotonic()
        super()._save_at_the_end(save)
        self.save_seconds = self.save_seconds or time.monotonic() - started  # the second call is for the weights


def _train(stage: Stage, how: Rehearsal, process: Process) -> dict[str, Any]:
    if how.resume_from is not None:
        with exit_together():
            if process.is_first and not stage.files.complete_checkpoints():
                _link_checkpoint(RunDirectory(Path(how.resume_from)), stage.files)
        return _run(stage, process, RESUMED_UPDATES, spare=0)
    read_before = _read_before(stage)
    figures = _run(stage, process, how.updates, spare=2 * RESUMED_UPDATES)
    if process.is_first:
        figures |= rates(stage.files.read_metrics(), stage, read_before)
        figures |= gpu_throughput(stage.recipe, figures["samples_per_second"], process)
    resumed = _run(stage, process, RESUMED_UPDATES, spare=RESUMED_UPDATES)
    return {**figures, "resume_seconds": resumed["resume_seconds"]}


def _run(stage: Stage, process: Process, updates: int, spare: int) -> dict[str, Any]:
    """Trains from the newest checkpoint, saves and returns the figures. resume_seconds: until it could train."""
    while True:
        with suppress(RollBack):
            return _run_from_newest(stage, process, updates, spare)
        free_memory()


def _run_from_newest(stage: Stage, process: Process, updates: int, spare: int) -> dict[str, Any]:
    started = time.monotonic()
    run = ShortRun(stage, process, updates, spare)
    ready = time.monotonic()
    try:
        run.to_the_end()
        figures = {
            "memory_gb": max(gather(peak_memory_gb(process.device))),
            "resume_seconds": ready - started,
            "save_seconds": run.save_seconds,
            "save_stall_seconds": run.save_stall_seconds,
        }
        if process.is_first:
            size = sum(path.stat().st_size for path in stage.files.complete_checkpoints()[-1].rglob("*"))
            figures["save_gb"] = size / 1e9
    finally:
        run.close()
    del run
    free_memory()  # two engines would not fit on a GPU
    return figures


def _read_before(stage: Stage) -> int:
    """Updates whose samples the loader may have read while the run starts: its processes read two batches each."""
    batches = 2 * worker_count(stage.execution.workers)
    largest: int = max(gather(math.ceil(batches / stage.execution.accumulation)))
    return largest


def rates(records: Sequence[dict[str, Any]], stage: Stage, read_before: int = 0) -> dict[str, float]:
    """Samples/s and the share of the time spent waiting for data, from the reports in metrics.jsonl.

    Those that begin in the first quarter of the updates, or in the first `read_before`, are left out: the loader
    starts, blocks are compiled, and samples are there already.
    """
    batch = stage.recipe.optimization.global_batch
    reports, begun = [], 0
    for record in records:
        if "samples_per_second" in record:
            reports.append((begun, record["update"] - begun, record))
            begun = record["update"]
    if not reports:
        raise RunFailed(f"{stage.id}: no update had a finite loss, so there is nothing to measure; check its inputs")
    measured = [report for report in reports if report[0] >= max(begun / 4, read_before)] or reports[-1:]
    seconds = [updates * batch / record["samples_per_second"] for _, updates, record in measured]
    waited = [spent * record["data_wait_share"] for spent, (_, _, record) in zip(seconds, measured, strict=True)]
    samples = batch * sum(updates for _, updates, _ in measured)
    return {"samples_per_second": samples / sum(seconds), "data_wait_share": sum(waited) / sum(seconds)}


def _test(stage: Stage, process: Process) -> dict[str, Any]:
    count = _test_videos(stage, process)
    with exit_together():
        entries = load_entries(stage, "test")[:count]
    with exit_together():
        preflight(stage, process, check_samples(entries, stage.execution.reader))
        model = load_classifier(stage).to(process.device)
    stage.files.logits(process.rank).unlink(missing_ok=True)  # of an attempt before
    tested = write_logits(model, stage, entries, process)
    if tested.stopped:
        raise Interrupted(f"{stage.id}: stopped by a signal; start it again", update=0)
    if tested.unreadable:
        raise RunFailed(f"{stage.id}: {next(iter(tested.unreadable.values()))}; prepare the data set again")
    figures = {"memory_gb": max(gather(peak_memory_gb(process.device)))}
    if tested.videos_per_second is not None:
        figures["samples_per_second"] = tested.videos_per_second
        figures |= gpu_throughput(stage.recipe, tested.videos_per_second, process)
    return figures


def _test_videos(stage: Stage, process: Process) -> int:
    """The videos of a rehearsed test: its loader's processes read two each before the rate counts, and then two."""
    largest: int = max(gather(worker_count(stage.execution.workers)))
    return (VIDEOS_PER_PROCESS + 4 * largest) * process.world_size


def _with_stand_ins(stage: Stage, how: Rehearsal, samples: int, process: Process) -> Stage:
    """The stage with the inputs and the data that stand in for missing ones, which the first process writes.

    A fine-tuning begins from random weights without a file.
    """
    folder, recipe = stage.directory / STAND_INS, stage.recipe
    inputs = {role: folder / f"{role}.safetensors" for role in how.random_weights if role != "pretrain"}
    data = DatasetPaths(root=str(folder / "data")) if how.generated_data else stage.execution.data
    with exit_together():
        if process.is_first:
            heartbeat("writing stand-ins", 0)
            shutil.rmtree(folder, ignore_errors=True)
            for role, path in inputs.items():
                write_weights(role, recipe, path)
            if how.generated_data:
                write_samples(recipe, folder / "data", samples)
    return dataclasses.replace(
        stage,
        inputs=stage.inputs | {role: str(path) for role, path in inputs.items()},
        execution=dataclasses.replace(stage.execution, data=data),
    )


def _samples_needed(stage: Stage, how: Rehearsal, process: Process) -> int:
    """Generated samples with which training does not come to the end of an epoch.

    To resume another rehearsal, they must be as many as there, whatever the layout.
    """
    recipe = stage.recipe
    if isinstance(recipe, Test):
        return _test_videos(stage, process)
    if how.resume_from is not None:
        source = RunDirectory(Path(how.resume_from))
        result: dict[str, Any] = gather(source.read_result() if process.is_first else None)[0] or {}
        samples: int | None = result.get("rehearsal", {}).get("generated_samples")
        if samples is None:
            raise ConfigError(f"{how.resume_from} does not say how many samples it had; rehearse it again with --force")
        return samples
    batch: int = recipe.optimization.global_batch
    return batch * (how.updates + 2 * RESUMED_UPDATES + 1)


def _link_checkpoint(source: RunDirectory, target: RunDirectory) -> None:
    """Makes the newest checkpoint of a run directory that of another one, by hard links."""
    complete = source.complete_checkpoints()
    if not complete:
        raise ConfigError(f"{source.path} has no checkpoint to resume; remove that folder and rehearse again")
    shutil.rmtree(target.checkpoints, ignore_errors=True)
    shutil.copytree(complete[-1], target.checkpoints / complete[-1].name, copy_function=os.link)


def _clean(files: RunDirectory, how: Rehearsal) -> None:
    """Deletes what is large and of no further use, of this rehearsal and of the one that it resumed."""
    folders = [] if how.keep_checkpoint else [files.checkpoints]
    if how.resume_from is not None:
        folders.append(RunDirectory(Path(how.resume_from)).checkpoints)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    files.weights.unlink(missing_ok=True)
