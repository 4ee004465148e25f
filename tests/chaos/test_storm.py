"""Short storms; `make chaos FAULTS=200` and `make chaos FAULTS=60 GROUP=3` run long ones."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("students", "faults"), [(1, 6), (2, 4)], ids=["fine-tuning", "group"])
def test_a_run_that_meets_many_faults_ends_as_the_undisturbed_one(students, faults):
    options = ["--faults", str(faults), "--group", str(students), "--seed", "1"]
    command = [sys.executable, "-m", "tests.chaos.storm", *options]
    storm = subprocess.run(command, capture_output=True, text=True, check=False)
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert "all weights are equal to the undisturbed run's, bit for bit" in storm.stdout
    assert int(storm.stdout.split(" faults in ")[0].split()[-1]) >= faults
