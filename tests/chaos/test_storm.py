"""A short storm; `make chaos FAULTS=200` runs a long one."""

import subprocess
import sys

FAULTS = 20


def test_a_run_that_meets_many_faults_ends_as_the_undisturbed_one():
    command = [sys.executable, "-m", "tests.chaos.storm", "--faults", str(FAULTS), "--seed", "1"]
    storm = subprocess.run(command, capture_output=True, text=True, check=False)
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert "all weights are equal to the undisturbed run's, bit for bit" in storm.stdout
    assert int(storm.stdout.split(" faults in ")[0].split()[-1]) >= FAULTS
