"""A wheel built from the tree plans rows from any folder, as a checkout does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.cluster import ROOT

SOURCES = (
    "mvd",
    "launch",
    "experiments",
    "ds_configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "cluster.example.yaml",
)


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    """The content of a wheel, which an installation unpacks into site-packages."""
    tree, wheels, site = (tmp_path_factory.mktemp(name) for name in ("tree", "wheels", "site-packages"))
    for name in SOURCES:  # a copy, since building leaves files in the tree
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(tree)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture
def run(site_packages, tmp_path):
    """Runs a module of the wheel in an empty folder, without cluster profile."""

    def call(*words):
        environment = {**os.environ, "PYTHONPATH": str(site_packages)}
        environment.pop("MVD_CLUSTER", None)
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return call


def test_the_wheel_holds_all_packages_and_their_files(site_packages):
    packages = {path.parent.relative_to(ROOT) for name in ("mvd", "launch") for path in (ROOT / name).rglob("*.py")}
    assert all((site_packages / package).is_dir() for package in packages)
    assert {path.name for path in (site_packages / "ds_configs").iterdir()} == {
        path.name for path in (ROOT / "ds_configs").iterdir()
    }
    example = site_packages / "launch" / "cluster.example.yaml"
    assert not example.is_symlink() and example.read_text() == (ROOT / "cluster.example.yaml").read_text()
    tops = {path.name for path in site_packages.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"mvd", "launch", "experiments", "ds_configs"}


def test_rows_are_planned_from_another_folder(run, tmp_path):
    done = run("launch.submit", "experiments/all", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "7 pre-trainings, 14 fine-tunings, 14 tests" in done.stdout
    assert "python -m launch.report experiments/all" in done.stdout
    (copy,) = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("cp ")]
    assert copy[2] == "cluster.yaml" and Path(copy[1]).is_file()
    shutil.copy(copy[1], tmp_path / "cluster.yaml")
    planned = run("launch.submit", "experiments/vith_k400", "--dry-run")
    assert planned.returncode == 0 and "/data/kinetics-400 does not exist" in planned.stdout


def test_relative_paths_start_at_the_current_folder(run, tmp_path):
    shown = run("launch.submit", "demo", "--local", "--show")
    assert shown.returncode == 0, shown.stderr
    assert "\nruns/finetune-demo-" in shown.stdout
    (tmp_path / "cluster.yaml").write_text("runs: results\n")
    assert "\nresults/finetune-demo-" in run("launch.submit", "demo", "--local", "--show").stdout
