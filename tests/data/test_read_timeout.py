"""Files that hang: the process that reads one logs it and exits; after the second time it is unreadable."""

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
from mvd.data.video.read_timeout import ReadTimeout
from mvd.data.video.reader import open_video
pipe = sys.argv[1]
timeout = ReadTimeout.of_run(Path(sys.argv[2]), 0.5, [Path(sys.argv[2]).with_name("another.txt")])
print("ready", flush=True)
sys.stdin.readline()
with timeout.reading(pipe):
    open_video(pipe)
"""


def test_a_file_that_hangs_is_logged_twice_and_then_unreadable(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for times in (1, 2):
        _hang(pipe, tmp_path, processes=1)
        assert (tmp_path / "hanging.txt").read_text().splitlines()[-1] == f"{times} {pipe}"
    for log in ("hanging.txt", "another.txt"):
        with pytest.raises(Unreadable, match="took more than 0.5 s, 2 times"):
            with ReadTimeout.of_run(tmp_path / log, 0.5).reading(str(pipe)):
                raise AssertionError("it must not be read again")


def test_a_file_that_hung_in_another_run_of_the_same_processes_is_unreadable_too(tmp_path):
    (tmp_path / "another.txt").write_text("1 a.mp4\n2 b.mp4\n")
    timeout = ReadTimeout.of_run(tmp_path / "hanging.txt", 60.0, [tmp_path / "another.txt"])
    with timeout.reading("a.mp4"), pytest.raises(Unreadable), timeout.reading("b.mp4"):
        raise AssertionError("it must not be read again")


def test_two_processes_that_hang_on_a_file_at_once_count_once(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    _hang(pipe, tmp_path, processes=2)
    assert (tmp_path / "hanging.txt").read_text().splitlines() == [f"1 {pipe}"] * 2
    with ReadTimeout.of_run(tmp_path / "hanging.txt", 60.0).reading(str(pipe)):
        pass  # one more attempt is allowed


def _hang(pipe: Path, folder: Path, processes: int) -> None:
    """Several processes of one attempt read the pipe; all look up earlier attempts before the first one reads."""
    command = [sys.executable, "-c", READ, str(pipe), str(folder / "hanging.txt")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(processes)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        _, said = process.communicate("go\n", timeout=LIMIT)
        assert process.returncode == RETRYABLE and f"has been reading {pipe} for 0.5 s" in said


def test_a_file_that_is_read_in_time_leaves_no_trace(tmp_path):
    with ReadTimeout.of_run(tmp_path / "hanging.txt", 60.0).reading("fine.mp4"):
        pass
    assert list(Path(tmp_path).iterdir()) == []
