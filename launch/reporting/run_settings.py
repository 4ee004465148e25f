"""The settings of finished and unfinished runs, from the run directories alone, and in which of them runs differ."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli.output import sentence_of
from mvd.config import KINDS, ConfigError
from mvd.identity import identity
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

Settings = dict[str, Any]  # for instance {"finetune.seed": 0.0, "pretrain.optimization.epochs": 400.0}


@dataclass(frozen=True)
class Run:
    """A run directory with its stage and the settings of the stage and of those it starts from.

    parents: ids of the run directories that it starts from.
    """

    stage: Stage
    files: RunDirectory
    settings: Settings
    parents: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.files.path.name

    @property
    def group(self) -> str:
        """The id without its hash: runs of one group can be compared."""
        return self.id.rpartition("-")[0]

    @property
    def seeds(self) -> dict[str, int]:
        """Kind of stage -> seed."""
        return {kind: int(self.settings[f"{kind}.seed"]) for kind in KINDS if f"{kind}.seed" in self.settings}


def read_runs(runs: Path) -> tuple[list[Run], list[str]]:
    """All runs of a folder, parents before children; and a sentence for each that cannot be read."""
    stages: dict[str, Stage] = {}
    problems: list[str] = []
    for path in sorted(runs.glob("*/stage.yaml")):
        try:
            stages[path.parent.name] = Stage.from_yaml(path)
        except (ConfigError, OSError) as error:
            problems.append(sentence_of(error))
    found = [
        Run(stage, RunDirectory(runs / name), _settings(name, stages), tuple(_parents(stage, stages)))
        for name, stage in stages.items()
    ]
    return sorted(found, key=lambda run: (KINDS.index(run.stage.kind), run.id)), problems


def differing(runs: Sequence[Run]) -> dict[str, str]:
    """Id -> the settings in which a run differs from others of its group, as `finetune.seed=1`; empty if in none."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    texts: dict[str, str] = {}
    for group in groups.values():
        keys = {key for run in group for key in run.settings}
        varying = sorted(key for key in keys if len({_text(run.settings.get(key)) for run in group}) > 1)
        for run in group:
            texts[run.id] = ", ".join(f"{key}={_text(run.settings.get(key))}" for key in varying)
    return texts


def _parents(stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """The run directories of this folder that a stage starts from; the folder may have been moved since."""
    names = [
        Path(file).parent.name for file in stage.inputs.values() if Path(file).name == RunDirectory(Path()).weights.name
    ]
    return [name for name in names if name in stages]


def _settings(name: str, stages: Mapping[str, Stage]) -> Settings:
    stage = stages[name]
    settings = _flat(identity(stage.recipe), f"{stage.kind}.")
    settings |= {f"{role}.weights": digest[:8] for role, digest in stage.digests.items()}
    for parent in _parents(stage, stages):
        settings = _settings(parent, stages) | settings
    return settings


def _flat(settings: Mapping[str, Any], prefix: str) -> Settings:
    values: Settings = {}
    for name, value in settings.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)
