"""The log of a training process: time, rank and level on every line, by default of rank 0 only."""

import logging
import re

import pytest

from mvd.distributed.logs import PACKAGES, configure_logging


@pytest.fixture(autouse=True)
def restored_loggers():
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    yield
    for logger, (logger.level, logger.propagate, logger.handlers) in zip(loggers, before, strict=True):
        assert logger.name in PACKAGES


def printed(capsys, rank: int, logger: str = "mvd.train.loop") -> tuple[list[str], list[str]]:
    """What a message and a warning of a process leave on stdout and stderr."""
    configure_logging(rank)
    configure_logging(rank)
    logging.getLogger(logger).info("update %d", 7)
    logging.getLogger(logger).warning("bad update")
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize("logger", ["mvd.train.loop", "launch.job.stage_job"])
def test_rank_0_logs_everything_with_time_rank_and_level(capsys, monkeypatch, logger):
    monkeypatch.delenv("MVD_LOG_RANKS", raising=False)
    (out,), (err,) = printed(capsys, 0, logger)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 0 INFO update 7", out)
    assert err.endswith(" rank 0 WARNING bad update")


def test_the_other_ranks_log_warnings_only(capsys, monkeypatch):
    monkeypatch.delenv("MVD_LOG_RANKS", raising=False)
    out, (err,) = printed(capsys, 3)
    assert out == [] and err.endswith(" rank 3 WARNING bad update")


def test_all_ranks_log_everything_on_request(capsys, monkeypatch):
    monkeypatch.setenv("MVD_LOG_RANKS", "all")
    (out,), (err,) = printed(capsys, 3)
    assert out.endswith(" rank 3 INFO update 7") and err.endswith(" rank 3 WARNING bad update")
