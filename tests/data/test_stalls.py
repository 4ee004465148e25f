"""Files that hang: the process that reads them says so and ends; the second time they count as unreadable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvd.data.stalls import HUNG, ReadLimit
from mvd.data.unreadable import Unreadable

READ = """
import sys
from pathlib import Path
from mvd.data.reader import open_video
from mvd.data.stalls import ReadLimit
pipe = sys.argv[1]
with ReadLimit.of_run(Path(sys.argv[2]), 0.5).reading(pipe):
    open_video(pipe)
"""


def test_a_file_that_hangs_is_named_twice_and_then_counts_as_unreadable(tmp_path):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", READ, str(pipe), str(tmp_path)]
    for times in (1, 2):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == HUNG and f"has been reading {pipe} for 0.5 s" in run.stderr
        assert (tmp_path / "hanging.txt").read_text().splitlines() == [str(pipe)] * times
    with pytest.raises(Unreadable, match="took more than 0.5 s, 2 times"):
        with ReadLimit.of_run(tmp_path, 0.5).reading(str(pipe)):
            raise AssertionError("it is not to be read again")


def test_a_file_that_is_read_in_time_leaves_no_trace(tmp_path):
    with ReadLimit.of_run(tmp_path, 60.0).reading("fine.mp4"):
        pass
    assert list(Path(tmp_path).iterdir()) == []
