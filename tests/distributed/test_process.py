"""The process group: its timeouts, and leaving together."""

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mvd.config import Faults
from mvd.distributed.process import group_timeout, start_processes
from mvd.distributed.watchdog import SECONDS_FOR_STACKS
from mvd.files import write_json
from tests.runs import succeed


@pytest.mark.parametrize("hang_minutes", [0.1, 15.0, 120.0])
def test_collectives_never_time_out_before_the_watchdog_has_said_which_rank_hangs(hang_minutes):
    watchdog = timedelta(minutes=2 * hang_minutes, seconds=60 + SECONDS_FOR_STACKS)
    assert group_timeout(hang_minutes) > watchdog


def note_timeouts(folder: Path) -> None:
    """Writes down the timeouts, in seconds, of the group and of one that DeepSpeed would make."""
    start_processes(limits=Faults(hang_minutes=40))
    groups = [dist.group.WORLD, dist.new_group([0])]
    seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    write_json(folder / "timeouts.json", [*seconds, int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])])


def test_every_group_and_nccl_s_own_monitor_have_that_timeout(tmp_path):
    succeed(note_timeouts, tmp_path, count=1)
    assert json.loads((tmp_path / "timeouts.json").read_text()) == [5100, 5100, 5100]
