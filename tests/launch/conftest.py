import json
import os
import subprocess
import sys

import pytest

from launch.cluster import ROOT
from tests.launch.fake_slurm import FakeSlurm
from tests.waiting import LIMIT


@pytest.fixture
def fake_slurm(monkeypatch):
    """SLURM's commands, stood in for in this process."""
    fake = FakeSlurm()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A cluster profile of the test's own, without data or teachers; run directories go to tmp_path/runs."""
    path = tmp_path / "cluster.yaml"
    path.write_text(f"runs: {tmp_path / 'runs'}\nlocal_processes: 2\n")
    monkeypatch.setenv("MVD_CLUSTER", str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return path


@pytest.fixture
def launch(profile, tmp_path):
    """Runs a script of launch/ as a user does, in a folder outside the project."""

    def run(script, *words):
        command = [sys.executable, str(ROOT / "launch" / script), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ.copy(), capture_output=True, text=True, timeout=LIMIT
        )

    return run


@pytest.fixture
def write_result(tmp_path):
    """Puts a result.json into a run directory, as a complete stage does."""

    def write(stage_id, **values):
        directory = tmp_path / "runs" / stage_id
        directory.mkdir(parents=True, exist_ok=True)
        result = {"stage": stage_id, "complete": True, "wall_seconds": 12.0, "unreadable": [], **values}
        (directory / "result.json").write_text(json.dumps(result))
        return directory

    return write
