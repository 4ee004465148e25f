"""Preparing a data set as an array of jobs, one of which is stopped, killed and submitted again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture
def blocked(class_folders) -> Path:
    """The last of the videos, whose reading does not end."""
    path = class_folders / "up" / "zzz.mp4"
    os.mkfifo(path)
    return path


def checked(output: Path) -> Counter[str]:
    """How often each file has been checked."""
    lines = [line for path in output.glob("records*.jsonl") for line in path.read_text().splitlines() if line]
    return Counter(json.loads(line)["source"] for line in lines)


def test_shares_survive_a_stop_a_death_and_are_put_together(site, lab, class_folders, blocked, tmp_path):
    output = tmp_path / "prepared"
    words = [str(class_folders), str(output), "--short-side", "32", "--array", "2", "--workers", "1"]
    words.append("cluster.slurm.time_limit_hours=0.15")  # so short that submitit takes every USR2 for its end

    plan = site.run("prepare.py", *words, "--dry-run")
    assert "25 files to check" in plan and "check-prepared" in plan and "2000M" in plan
    assert not output.exists() and not site.runs.exists()
    printed = site.run("prepare.py", *words)
    array, last = site.jobs()
    assert f"{array}[0-1] checks the videos, {last} then writes the lists" in printed
    (script,) = output.glob(f"jobs/*/{array}_submission.sh")
    assert "gpu" not in script.read_text() and "#SBATCH --mem=2000M" in script.read_text()

    log = script.with_name(f"{array}_0_0_log.out")
    site.wait("all files but the last", lambda: len(checked(output)) == 24)
    assert "queued or running already" in site.run("prepare.py", *words)
    lab.run("scancel", "--signal=USR2", f"{array}_0")  # as before a time limit
    site.wait("the second attempt", lambda: log.read_text().count("=== job") == 2)
    site.wait("its task", lambda: lab.tasks(raw_id(lab, f"{array}_0")))
    (task,) = lab.tasks(raw_id(lab, f"{array}_0")).values()
    os.kill(task, signal.SIGKILL)
    site.wait_until_idle()
    assert not (output / "train.csv").exists() and set(checked(output).values()) == {1}

    blocked.unlink()
    shutil.copy(next(class_folders.glob("up/*.mp4")), blocked)
    site.run("prepare.py", *words)
    site.wait_until_idle()
    assert len(checked(output)) == 25 and set(checked(output).values()) == {1}
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "mvd.data.prepare", *words[:1], str(alone), *words[2:4], "--workers", "2"]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    for name in ("train.csv", "val.csv", "test.csv"):
        assert (output / name).read_text() == (alone / name).read_text()


def raw_id(lab, job: str) -> str:
    return lab.run("squeue", "-h", "-j", job, "-o", "%A").strip()
