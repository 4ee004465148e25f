"""The command line shared by the launcher's commands: rows, suites and `key=value` settings."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch.cli.output import sentence_of
from launch.cluster import Cluster, load_cluster
from launch.plan.rows import load_rows
from mvd.config import KINDS, ConfigError, Row
from mvd.config.typed import Override, parse_override, paths_of
from mvd.run_directory import RunDirectory

RUN_NAME = re.compile(rf"(.*/)?({'|'.join(KINDS)})-.+-[0-9a-f]{{8}}/?")


@dataclass(frozen=True)
class Request:
    """A parsed command line.

    words: its arguments, to repeat them in another command. stages: names of run directories among the targets, for
    commands that accept them.
    """

    words: list[str]
    rows: list[Row]
    stages: list[str]
    cluster: Cluster
    options: argparse.Namespace

    @property
    def plan_words(self) -> list[str]:
        """The words with the options of submit.py that decide which stages there are, and which share a job."""
        until = [] if self.options.until == "test" else ["--until", self.options.until]
        return [*self.words, *until, *(word for rows in self.options.together for word in ("--together", rows))]

    @property
    def row_words(self) -> list[str]:
        """The words for a command that does not take names of run directories, such as submit.py."""
        return [word for word in self.words if word not in self.stages]


class Parser(argparse.ArgumentParser):
    """Parses targets and settings in any order; a wrong argument raises ConfigError."""

    def __init__(self, prog: str, description: str, epilog: str, *, takes_stages: bool = False) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=formatter)
        self.takes_stages = takes_stages
        self.add_argument("words", nargs="*", metavar="TARGET|KEY=VALUE", help="rows or suites, and settings")
        self.add_argument("--cluster", metavar="FILE", help="cluster profile (default: $MVD_CLUSTER, or cluster.yaml)")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def read(self, argv: Sequence[str], needs_target: bool = True) -> Request:
        """Loads the rows and the cluster profile of a command line.

        Raises:
            ConfigError: an unknown option, target or setting, or an invalid value.
        """
        options = self.parse_intermixed_args(argv)
        settings = [parse_override(word) for word in options.words if "=" in word]
        for_cluster = [s for s in settings if s.path[0] == "cluster" and len(s.path) > 1]
        for_rows = [s for s in settings if s not in for_cluster]
        cluster = load_cluster(options.cluster, [dataclasses.replace(s, path=s.path[1:]) for s in for_cluster])
        _refuse_cluster_settings(for_rows)
        targets = [word for word in options.words if "=" not in word]
        found = {word: name for word in targets if self.takes_stages and (name := _run_directory(word, cluster.runs))}
        stages, names = list(found.values()), [word for word in targets if word not in found]
        if self.takes_stages and (gone := next(filter(RUN_NAME.fullmatch, names), None)):
            raise ConfigError(f"there is no run directory {gone} in {cluster.runs}; see status.py")
        if not names and (for_rows or (needs_target and not stages)):
            raise ConfigError("no TARGET given; add a row or a suite of experiments/, such as experiments/demo")
        words = [found.get(word, word) for word in options.words]
        words += ["--cluster", options.cluster] if options.cluster else []
        rows = load_rows(names, for_rows) if names else []
        return Request(words, rows, stages, _with_ceilings(cluster, for_rows), options)


def _run_directory(word: str, runs: str) -> str | None:
    """The name of a run directory that is given by its name in the runs folder, or as a path; None if it is none."""
    for path in (Path(os.path.abspath(place)) for place in (Path(runs) / word, word)):  # which may be a link
        if path.parent.resolve() == Path(runs).resolve() and RunDirectory(path).stage.is_file():
            return path.name
    return None


def _with_ceilings(cluster: Cluster, settings: Sequence[Override]) -> Cluster:
    """The profile with a row's micro_batch of the command line as an upper limit, also of what gpu_memory_gb allows."""
    for setting in settings:
        kind, *rest = setting.path
        if rest == ["optimization", "micro_batch"]:
            resources = getattr(cluster, kind)
            limit = min(setting.value, resources.micro_batch or setting.value)
            changed: Any = {kind: dataclasses.replace(resources, micro_batch=limit)}
            cluster = dataclasses.replace(cluster, **changed)
    return cluster


def _refuse_cluster_settings(settings: Sequence[Override]) -> None:
    """Says where a setting of the profile belongs that was given without its `cluster.`."""
    for setting in settings:
        key = ".".join(setting.path)
        if key in paths_of(Cluster) and key not in paths_of(Row):
            raise ConfigError(f"{setting.text}: {key} belongs to the cluster profile; write cluster.{setting.text}")


def run_command(main: Callable[[Sequence[str]], int]) -> int:
    """Runs a command and returns its exit code; an error that is no bug is printed as one line, with exit code 2."""
    try:
        return main(sys.argv[1:])
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, OSError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
