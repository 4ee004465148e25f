"""The launcher starts fast: no command imports torch before it has made its plan."""

import subprocess
import sys

import pytest

from launch.cluster import ROOT

COMMANDS = ("submit", "status", "report", "cancel", "logs", "prepare")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_launcher_starts_without_torch(command):
    check = f"import launch.{command}, sys; print(sorted({{'torch', 'deepspeed', 'timm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_is_made_without_torch(tmp_path):
    (tmp_path / "cluster.yaml").write_text(f"runs: {tmp_path / 'runs'}\n")
    plan = ["launch/submit.py", "experiments/demo", "--dry-run", "--cluster", str(tmp_path / "cluster.yaml")]
    script = f"import runpy, sys\nsys.argv = {plan}\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    script += "finally:\n    assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pretrain-tiny_from_tiny" in done.stdout
