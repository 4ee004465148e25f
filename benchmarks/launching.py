"""CPU time to launch one update, by row, compared with an earlier commit: `make bench-launching`.

A GPU computes what the CPU launches; where launching takes longer than computing, as for ViT-S and ViT-B, it decides
the speed of an update. Networks have the depth of the rows' but few channels and tokens, so that nearly all of the time
is that of Python, DeepSpeed and PyTorch's dispatcher: two clips, bf16, one process, the ZeRO configuration that the
launcher of each version chooses, no activation checkpointing. Each round measures the baseline and this version, each
in a process of its own, and counts CPU time, so that other processes disturb little.

python -m benchmarks.launching --baseline a46b06c --rounds 5
python -m benchmarks.launching --only "base from base" --compile    # blocks compiled, which takes minutes on a CPU
python -m benchmarks.launching --only large --deepspeed zero0
"""

import argparse
import dataclasses
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "a46b06c"  # the last commit of version 0.3's development before the number of operations was reduced
UPDATES = 5  # timed ones, after two others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default=BASELINE, metavar="COMMIT", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="updates with this text in their name")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of this version")
    parser.add_argument("--deepspeed", metavar="NAME", help="of this version, instead of the launcher's choice")
    parser.add_argument("--measure", choices=("baseline", "now"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(
            json.dumps(measure(arguments.only, arguments.compile, arguments.measure == "baseline", arguments.deepspeed))
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "baseline"
        git("worktree", "add", "--detach", str(tree), arguments.baseline)
        try:
            only, own = ["--only", arguments.only], ["--compile"] * arguments.compile
            own += ["--deepspeed", arguments.deepspeed] if arguments.deepspeed else []
            rounds = [
                (of_tree(tree, "baseline", *only), of_tree(ROOT, "now", *only, *own)) for _ in range(arguments.rounds)
            ]
        finally:
            git("worktree", "remove", "--force", str(tree))
    print_table(rounds)


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True)


def of_tree(tree: Path, *options: str) -> dict[str, float]:
    """Update -> milliseconds, measured with the code of a checkout."""
    command = [sys.executable, "-P", str(Path(__file__)), "--measure", *options]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def print_table(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("update", "baseline ms", "now ms", "ratio", "lowest - highest")
    for name in rounds[0][0]:
        before, after = ([one[name] for one in side] for side in zip(*rounds, strict=True))
        ratios = [old / new for old, new in zip(before, after, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(before):.0f}",
            f"{statistics.median(after):.0f}",
            f"{statistics.median(ratios):.2f}x",
            f"{min(ratios):.2f} - {max(ratios):.2f}",
        )
    Console(width=110).print(table)


def measure(only: str, compiled: bool, is_baseline: bool, deepspeed: str | None) -> dict[str, float]:
    """Update -> CPU milliseconds of its launches, the median; imports the code of whichever tree is on the path."""
    import torch

    from experiments import all as all_rows
    from mvd.distributed.process import start_processes
    from mvd.train import tasks

    start_processes()
    torch.backends.mkldnn.enabled = False  # it takes longer to start than such small products take
    tasks.load_weights = lambda *_, **__: None  # type: ignore[assignment]
    recipes: dict[str, Any] = {}
    for row in all_rows.rows:
        recipes[f"pretrain {row.pretrain.student} from {row.pretrain.teacher}"] = row.pretrain
    for row in all_rows.rows:
        recipes.setdefault(f"finetune {row.finetune.size}", row.finetune)
    configurations = {name: deepspeed or zero(recipe, is_baseline) for name, recipe in recipes.items()}
    thin_sizes()
    return {
        name: milliseconds(recipe, configurations[name], compiled) for name, recipe in recipes.items() if only in name
    }


def thin_sizes() -> None:
    """Makes all networks as thin, and their inputs as small, as the number of operations allows."""
    from mvd.config.sizes import SIZES, ClipShape, ImageShape

    image = ImageShape(image_size=32)
    for name, size in SIZES.items():
        thin = {
            role: dataclasses.replace(getattr(size, role), width=16, heads=1)
            for role in ("encoder", "decoder", "video_decoder")
        }
        clip = ClipShape(frames=4, image_size=32)
        SIZES[name] = dataclasses.replace(size, clip=clip, image=image, image_training=image, **thin)


def milliseconds(recipe: Any, configuration: str, compiled: bool) -> float:
    import torch

    from mvd.batch import Batch
    from mvd.config import Pretrain
    from mvd.data.on_device import prepare
    from mvd.train import tasks
    from mvd.train.engine import build_engine, take_step
    from mvd.train.optimizer import build_optimizer
    from mvd.train.sample_seeded_dropout import SampleSeededLayers

    cpu = torch.device("cpu")
    recipe = dataclasses.replace(recipe, activation_checkpointing=False)
    if isinstance(recipe, Pretrain):
        task: Any = tasks.Distillation(recipe, {"image_teacher": "", "video_teacher": ""}, "bf16", cpu)
    else:
        task = tasks.Classification(recipe, 400, None)
    precision = ("bf16",) if len(inspect.signature(SampleSeededLayers).parameters) > 1 else ()
    layers = SampleSeededLayers(task.model, *precision)  # type: ignore[arg-type]
    optimizer = build_optimizer(task.model, recipe.optimization)
    engine = build_engine(task.model, optimizer, configuration, Batch(2, 1, 1), "bf16")
    engine.train()
    if compiled:
        import torch._dynamo

        from mvd.train.compilation import compile_blocks

        torch._dynamo.config.recompile_limit = 64
        compile_blocks(engine.module, *task.watched)
    raw, seconds = micro_batch(recipe), []
    for _ in range(2 + UPDATES):
        started = time.process_time()
        layers.draw(raw["layer_seeds"], cpu)
        engine.backward(task.losses(engine, prepare(raw, recipe, cpu))["loss"])
        take_step(engine)
        seconds.append(time.process_time() - started)
    engine.destroy()
    return 1000 * statistics.median(seconds[2:])


def zero(recipe: Any, is_baseline: bool) -> str:
    """The launcher's choice: zero1 for all networks in the baseline; now, for GPUs of 80 GB, by the network's size."""
    size = getattr(recipe, "student", None) or recipe.size
    return "zero0" if size in ("small", "base") and not is_baseline else "zero1"


def micro_batch(recipe: Any) -> dict[str, Any]:
    """As a loader makes it, of two clips."""
    import numpy as np
    import torch

    from mvd.config import Pretrain
    from mvd.config.sizes import ClipShape
    from mvd.data.clip.masking import tube_mask

    clip = ClipShape(frames=4, image_size=32)
    seeds = torch.tensor([1, 2])
    batch = {"video": torch.randint(0, 255, (2, 3, 4, 32, 32), dtype=torch.uint8), "layer_seeds": seeds}
    if isinstance(recipe, Pretrain):
        masks = [tube_mask(np.random.default_rng(seed), clip, recipe.mask_ratio) for seed in range(2)]
        return batch | {"mask": torch.from_numpy(np.stack(masks))}
    labels = {"labels": torch.tensor([3, 4]), "mix_seeds": torch.tensor([5, 5]), "noise_seeds": seeds}
    return batch | labels | {"erase": torch.zeros(2, 4, dtype=torch.int64)}


if __name__ == "__main__":
    main()
