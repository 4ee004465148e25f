"""A new user's path: the commands of the README and its pages, typed in a fresh copy and an empty shell."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import ROOT
from tests.waiting import LIMIT

SHORT = "finetune.optimization.epochs=1 finetune.optimization.warmup_epochs=0"


def made_here(folder: str, names: list[str]) -> set[str]:
    """What a clone does not have."""
    return {".git", ".venv", "runs", "data", "cluster.yaml"}.intersection(names) if Path(folder) == ROOT else set()


class Shell:
    """A shell that knows nothing but a copy of the project and its virtual environment."""

    def __init__(self, home: Path) -> None:
        self.project, self.home = home / "mvd", home
        shutil.copytree(ROOT, self.project, ignore=made_here)
        (self.project / ".venv").symlink_to(sys.prefix)  # instead of `make .venv/installed`, which takes minutes

    def type(self, command: str) -> str:
        """Runs a command and returns its output; fails if the command does."""
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), "LANG": "C.UTF-8", "CUDA_VISIBLE_DEVICES": ""}
        line = ["bash", "-c", f". .venv/bin/activate\n{command}"]
        done = subprocess.run(
            line, cwd=self.project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)


def test_from_a_folder_of_videos_to_predictions_and_a_report(shell, class_folders):
    new = shell.project / "new-videos"
    new.mkdir()
    for name in ("left", "up"):
        shutil.copy(next((class_folders / name).iterdir()), new / f"{name}.mp4")
    class_folders.rename(shell.project / "my-videos")
    page = (shell.project / "docs" / "own_videos.md").read_text()
    said = []
    for command in re.findall(r"^\$ ([^#\n]*)", page, flags=re.MULTILINE):
        line = f"{command} {SHORT}" if "launch.submit" in command else command
        if match := re.search(r"runs/finetune-mine_tiny-\S+", line):  # the page has the name of its own run
            (run,) = shell.project.glob("runs/finetune-mine_tiny-*")
            line = line.replace(match[0], f"runs/{run.name}")
        said.append(shell.type(line))
    everything = "\n".join(said)
    for expected in ("24 files to check", "next:", "test top-1", "95 % interval", "new-videos/left.mp4", "wrote"):
        assert expected in everything
    rows = list(csv.DictReader((shell.project / "predictions.csv").open()))
    assert len(rows) == 2 and {row["class"] for row in rows} <= {"left", "right", "up"}
    assert (shell.project / "features.npz").stat().st_size > 0
    assert (shell.project / "mine-timm" / "config.json").is_file()

    row = f"data/mine/mine_tiny.py {SHORT}"
    assert "mine_tiny" in shell.type(f"python launch/report.py {row} --html report.html")
    assert "confusion" in (shell.project / "report.html").read_text().lower()
    assert "done" in shell.type(f"python launch/status.py {row}")
    assert "rank 0" in shell.type(f"python launch/logs.py {row} --stage finetune")


def test_the_plans_that_the_readme_shows(shell):
    readme = (shell.project / "README.md").read_text()
    (plan,) = set(re.findall(r"^(python launch/submit\.py experiments/\S+ --dry-run)  ", readme, flags=re.MULTILINE))
    printed = shell.type(plan)
    for cells in re.findall(r"^\d  (?:pretrain|finetune|test) .*$", readme, flags=re.MULTILINE):
        assert re.sub(r" +", " ", cells) in re.sub(r" +", " ", printed)
    assert "3 fine-tunings, 3 tests" in shell.type("python launch/submit.py experiments/demo --dry-run")
