"""Files that hang: the process that reads them says so and ends; the second time they count as unreadable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvd.data.video.errors import Unreadable
from mvd.data.video.read_timeout import RETRYABLE, ReadTimeout
from tests.waiting import LIMIT

READ = """
import sys
from pathlib import Path
from mvd.data.reader import open_video
from mvd.data.stalls import ReadLimit
pipe = sys.argv[1]
limit = ReadLimit.of_run(Path(sys.argv[2]), 0.5)
print("ready", flush=True)
sys.stdin.readline()
with limit.reading(pipe):
    open_video(pipe)
"""


def test_a_file_that_hangs_is_named_twice_and_then_counts_as_unreadable(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for times in (1, 2):
        _hang(pipe, tmp_path, processes=1)
        assert (tmp_path / "hanging.txt").read_text().splitlines()[-1] == f"{times} {pipe}"
    with pytest.raises(Unreadable, match="took more than 0.5 s, 2 times"):
        with ReadTimeout.of_run(tmp_path, 0.5).reading(str(pipe)):
            raise AssertionError("it is not to be read again")


def test_two_processes_that_hang_on_a_file_at_once_count_once(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    _hang(pipe, tmp_path, processes=2)
    assert (tmp_path / "hanging.txt").read_text().splitlines() == [f"1 {pipe}"] * 2
    with ReadTimeout.of_run(tmp_path, 60.0).reading(str(pipe)):
        pass  # it is tried once more


def _hang(pipe: Path, folder: Path, processes: int) -> None:
    """Has processes of one attempt read the pipe; all of them look up earlier attempts before the first one reads."""
    command = [sys.executable, "-c", READ, str(pipe), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(processes)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        _, said = process.communicate("go\n", timeout=LIMIT)
        assert process.returncode == RETRYABLE and f"has been reading {pipe} for 0.5 s" in said


def test_a_file_that_is_read_in_time_leaves_no_trace(tmp_path):
    with ReadTimeout.of_run(tmp_path, 60.0).reading("fine.mp4"):
        pass
    assert list(Path(tmp_path).iterdir()) == []
