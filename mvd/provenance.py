"""provenance.json: where a run's numbers come from, one entry per attempt; and the same in short for result.json."""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mvd.config import ConfigError, dataset_of
from mvd.files import sha256, write_json
from mvd.host import hostname
from mvd.owner import VARIABLE
from mvd.run_directory import RunDirectory
from mvd.stage import Stage
from mvd.version import code_version

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "av", "decord", "numpy", "opencv-python-headless", "pillow")
SLURM = ("SLURM_JOB", "SLURM_ARRAY", "SLURM_RESTART")

logger = logging.getLogger(__name__)


def record_attempt(stage: Stage, world_size: int) -> int:
    """Appends this attempt to the run directory's provenance.json and returns its number, counted from 1.

    Each shard of a test has a file of its own.

    Raises:
        ConfigError: an input file is missing, or its content has changed since the stage was submitted or started.
    """
    path = stage.job_files.provenance
    attempts: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for role, file in stage.inputs.items():
        if not Path(file).is_file():
            raise ConfigError(
                f"{stage.id}: its {role} file {file} does not exist; put it there, or submit the row with another"
            )
    inputs = {role: {"path": file, "sha256": sha256(Path(file))} for role, file in stage.inputs.items()}
    for role, entry in inputs.items():
        if stage.digests.get(role, entry["sha256"]) != entry["sha256"]:
            raise ConfigError(f"{entry['path']} has changed since {stage.id} was submitted; submit the row again")
        if stage.execution.rehearsal is None and attempts and attempts[0]["inputs"][role]["sha256"] != entry["sha256"]:
            raise ConfigError(
                f"{entry['path']} is not the {role} this run started from (its content changed since "
                f"{attempts[0]['started']}); put the old file back, or remove {stage.directory} to start again"
            )
    if attempts and "ended" not in attempts[-1]:
        attempts[-1]["ended"] = stage.job_files.last_sign(attempts[-1]["started"])
    attempts.append(
        {
            "attempt": len(attempts) + 1,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "owner": os.environ.get(VARIABLE),
            "command": sys.argv,
            "host": hostname(),
            "processes": world_size,
            "execution": dataclasses.asdict(stage.execution),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "slurm": {key: value for key, value in os.environ.items() if key.startswith(SLURM)},
            "inputs": inputs,
            **code_version(),
        }
    )
    write_json(path, attempts)
    return len(attempts)


def record_training(stage: Stage, is_first: bool) -> None:
    """Notes in provenance.json when the attempt begins to train, if this is its first process.

    Before that it was starting. A disk that does not take it is logged and no more.
    """
    path = stage.job_files.provenance
    if not is_first:
        return
    try:
        attempts = json.loads(path.read_text())
        attempts[-1]["training"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, attempts)
    except OSError as error:
        logger.error("FAULT (log): %s cannot be written: %s", path, error)


def earlier_seconds(stage: Stage) -> float:
    """Wall time of the earlier attempts in seconds; a killed attempt counts until the last file it wrote."""
    attempts = json.loads(stage.job_files.provenance.read_text())[:-1]
    spans = [[datetime.fromisoformat(attempt[when]) for when in ("started", "ended")] for attempt in attempts]
    return sum((ended - started).total_seconds() for started, ended in spans)


def result_facts(stage: Stage) -> dict[str, Any]:
    """What result.json says of where a result comes from, under `provenance` (docs/results.md).

    Reads provenance.json, of all shards if the stage is a test in shards; call it on one process, at the end.
    """
    jobs = [part.job_files for part in stage.in_shards()]
    attempts = [(files, entry) for files in jobs for entry in json.loads(files.provenance.read_text())]
    last = attempts[-1][1]
    weights = sha256(stage.files.weights) if stage.files.weights.exists() else None
    if stage.kind == "test":
        weights = last["inputs"].get("finetune", {}).get("sha256")
    return {
        "seeds": _seeds(stage),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": last["commit"],
        "modified": bool(last["diff"]),
        "gpu": last["gpu"],
        "processes": last["processes"] * stage.execution.shards,
        "gpu_hours": sum(files.gpu_hours(entry) for files, entry in attempts),
        "weights_sha256": weights,
        "lists": _lists(stage),
    }


def _seeds(stage: Stage) -> dict[str, int]:
    """Kind of stage -> seed, of this stage and of those it starts from, as far as they are run directories."""
    seeds: dict[str, int] = {}
    for file in stage.inputs.values():
        try:
            result = RunDirectory(Path(file).parent).read_result() or {}
            seeds |= result.get("provenance", {}).get("seeds", {})
        except ConfigError as error:
            logger.warning("%s: the seeds of an earlier stage are not recorded: %s", stage.id, error)
    return seeds | ({stage.kind: stage.recipe.seed} if hasattr(stage.recipe, "seed") else {})


def _lists(stage: Stage) -> dict[str, dict[str, str]]:
    """Split -> path and SHA-256 of each list of videos that the stage reads."""
    data = stage.execution.data
    if data is None or dataset_of(stage.recipe).media == "image":
        return {}
    splits = {"finetune": ("train", "val"), "test": ("test",)}.get(stage.kind, ("train",))
    files = {split: Path(data.root).absolute() / getattr(data, split) for split in splits}
    return {split: {"path": str(file), "sha256": sha256(file)} for split, file in files.items() if file.is_file()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # another build of the package may be installed under another name
        return None
