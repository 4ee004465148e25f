"""The demo over several seeds, with a control that is fine-tuned from an untrained student: `make bench-demo`.

For each seed, all stages of the first two rows of experiments/demo run with it, and then the fine-tuning of `demo` once
more from a student with its initial weights. Student and classifier are initialised differently (as in the official
release), so only this control tells what distillation adds to `demo_from_scratch`. Complete stages are skipped, so that
it can be interrupted.

    python -m benchmarks.demo --seeds 5
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from launch.cluster import ROOT
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config import Row
from mvd.config.typed import parse_override
from mvd.models import build_student
from mvd.run_directory import RunDirectory

ROWS = """from experiments.demo import rows as known

rows = known[:2]  # without the smaller student
"""
TRAININGS = ("image_teacher", "video_teacher", "pretrain", "finetune")


def settings_of(seed: int) -> list[str]:
    """The demo with another seed in every stage."""
    return [f"{kind}.seed={seed}" for kind in TRAININGS]


def untrained_student(seed: int, runs: Path) -> Path:
    """The weights file of a student that was not trained; the seed draws its weights."""
    path = runs / f"untrained-{seed}.safetensors"
    if not path.exists():
        torch.manual_seed(seed)
        weights = build_student("tiny", teacher="tiny").state_dict()
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    return path


def run_demo(settings: Sequence[str], runs: Path) -> list[Row]:
    """Runs the demo's first two rows with these settings and returns them."""
    file = runs / "two_rows.py"
    file.write_text(ROWS)
    command = [sys.executable, "launch/submit.py", str(file), *settings, f"cluster.runs={runs}", "--local"]
    subprocess.run(command, cwd=ROOT, check=True)
    return load_rows([str(file)], [parse_override(setting) for setting in settings])


def top1(row: Row, runs: Path) -> float:
    """The test accuracy of a row, in percent."""
    (test,) = (node.id for node in build_graph([row]) if node.kind == "test")
    result = RunDirectory(runs / test).read_result()
    if result is None:
        raise SystemExit(f"error: {test} is not complete; see its log in {runs}")
    return float(result["top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: %(default)s)")
    options = parser.parse_args()
    runs = ROOT / "runs" / "demo-seeds"
    runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {"distilled": [], "untrained student": [], "from scratch": []}
    for seed in range(options.seeds):
        distilled, scratch = run_demo(settings_of(seed), runs)
        given = [f"pretrain.weights={untrained_student(seed, runs)}", f"finetune.seed={seed}"]
        untrained, _ = run_demo(given, runs)
        for values, row in zip(found.values(), (distilled, untrained, scratch), strict=True):
            values.append(top1(row, runs))
    print(f"\ntest top-1 in percent, seeds 0 to {options.seeds - 1}: mean and standard deviation, each seed")
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:18} {statistics.mean(values):5.1f} +- {spread:4.1f}   {' '.join(f'{v:.1f}' for v in values)}")


if __name__ == "__main__":
    main()
