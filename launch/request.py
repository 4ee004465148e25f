"""The command line that submit.py and report.py share: rows, suites, and `key=value` settings."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from launch.cluster import Cluster, load_cluster
from launch.rows import load_rows
from launch.settings import parse_override
from mvd.config import ConfigError, Row


@dataclass(frozen=True)
class Request:
    """What a command line asks for; `words` repeats it in another command."""

    words: list[str]
    rows: list[Row]
    cluster: Cluster
    options: argparse.Namespace


class Parser(argparse.ArgumentParser):
    """Takes targets and settings, in any order, and says what is wrong in one sentence."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=formatter)
        self.add_argument("words", nargs="+", metavar="TARGET|KEY=VALUE", help="rows or suites; settings to change")
        self.add_argument("--cluster", metavar="FILE", help="cluster profile (default: $MVD_CLUSTER, or cluster.yaml)")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def read(self, argv: Sequence[str]) -> Request:
        """Loads the rows and the cluster profile that a command line names.

        Raises:
            ConfigError: anything given that cannot work.
        """
        options = self.parse_intermixed_args(argv)
        settings = [parse_override(word) for word in options.words if "=" in word]
        targets = [word for word in options.words if "=" not in word]
        if not targets:
            raise ConfigError("no row is named; give one or more of experiments/, such as experiments/demo")
        for_cluster = [s for s in settings if s.path[0] == "cluster" and len(s.path) > 1]
        for_rows = [s for s in settings if s not in for_cluster]
        cluster = load_cluster(options.cluster, [dataclasses.replace(s, path=s.path[1:]) for s in for_cluster])
        words = [*options.words, *(["--cluster", options.cluster] if options.cluster else [])]
        return Request(words, load_rows(targets, for_rows), cluster, options)


def run_command(main: Callable[[Sequence[str]], int]) -> int:
    """Runs a command; what the user got wrong becomes one line and exit code 2."""
    try:
        return main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
