"""Times one real-size update against the same maths as plain PyTorch: `make bench-step`.

Two updates: B-from-B pre-training and ViT-B fine-tuning, each of two clips. The baseline is what a user would write:
explicit softmax attention, teachers, student and optimizer in fp32, no DeepSpeed. Ours runs through the engine, in
fp32 and in bf16 autocast, on the same weights and clips. Every round times all variants one after the other, so that
a ratio compares neighbours in time; the table gives the median, lowest and highest ratio of the rounds.

Peak memory is measured apart, in a process of its own for each variant.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from timm.layers import set_fused_attn
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from experiments.recipes import VITB_FROM_VITB
from experiments.vitb_from_vitb_k400 import row as vitb_row
from mvd.batch import Batch
from mvd.config import Optimization, Precision
from mvd.data.masking import tube_mask
from mvd.data.randomness import Purpose, generator
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from mvd.sizes import SIZES
from mvd.train.engine import build_engine, start_processes, take_step
from mvd.train.objectives import distillation_loss
from mvd.train.optimizer import build_optimizer

VARIANTS = ("plain fp32", "ours fp32", "ours bf16")
UPDATES = ("pretrain B from B", "finetune B")
CLIPS = 2
# Relative difference of the first update's loss and gradient norm from the baseline's.
TOLERANCE = {"plain fp32": 0.0, "ours fp32": 1e-4, "ours bf16": 2e-2}


@dataclass
class Update:
    """One variant of one update, ready to run: `step()` returns loss and gradient norm."""

    step: Callable[[], tuple[float, float]]


def make_update(update: str, variant: str) -> Update:
    """Builds networks with fixed random weights; `plain` means timm's explicit softmax attention and no engine."""
    plain = variant.startswith("plain")
    set_fused_attn(not plain)
    torch.manual_seed(0)
    model, loss, optimization = (_pretrain if update.startswith("pretrain") else _finetune)(variant)
    optimizer = build_optimizer(model, optimization)
    if plain:
        return Update(lambda: _plain_step(model, optimizer, loss))
    precision: Precision = "bf16" if variant.endswith("bf16") else "fp32"
    engine = build_engine(model, optimizer, "zero1", Batch(CLIPS, 1, 1), precision)

    def step() -> tuple[float, float]:
        value = loss(engine)
        engine.backward(value)
        return value.item(), take_step(engine)

    return Update(step)


def _plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], Tensor]
) -> tuple[float, float]:
    value = loss(model)
    value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return value.item(), norm.item()


def _clips() -> Tensor:
    return torch.randn(CLIPS, 3, 16, 224, 224, generator=torch.Generator().manual_seed(1))


def _pretrain(variant: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Optimization]:
    student = build_student("base", teacher="base")
    image_teacher, video_teacher = build_image_teacher("base"), build_video_teacher("base")
    video = _clips()
    masks = [tube_mask(generator(0, 0, i, Purpose.MASK), SIZES["base"].clip, 0.9) for i in range(CLIPS)]
    mask = torch.stack([torch.as_tensor(m) for m in masks])

    def under_precision(teacher: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=variant.endswith("bf16")):
                return teacher(inputs)

        return call

    def loss(model: nn.Module) -> Tensor:
        teachers = under_precision(image_teacher), under_precision(video_teacher)
        return distillation_loss(model, *teachers, video, video, mask).total

    return student, loss, VITB_FROM_VITB.optimization


def _finetune(variant: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Optimization]:
    classifier = build_classifier("base", num_classes=400)
    video = _clips()
    targets = torch.softmax(torch.randn(CLIPS, 400, generator=torch.Generator().manual_seed(2)), dim=1)
    criterion = SoftTargetCrossEntropy()
    return classifier, lambda model: criterion(model(video).float(), targets), vitb_row.finetune.optimization


def compare(update: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and first loss of every round and variant; stops where the results do not agree."""
    variants = {name: make_update(update, name) for name in VARIANTS}
    first = {name: variant.step() for name, variant in variants.items()}  # also warms up
    check_agreement(update, first)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant.step()
            seconds[name].append(time.perf_counter() - started)
    return {name: list(zip(seconds[name], seconds[VARIANTS[0]], strict=True)) for name in VARIANTS}


def check_agreement(update: str, results: dict[str, tuple[float, float]]) -> None:
    """Exits with a sentence where a variant's loss or gradient norm is further from the baseline's than tolerated."""
    baseline = results[VARIANTS[0]]
    for name, values in results.items():
        for what, value, expected in zip(("loss", "gradient norm"), values, baseline, strict=True):
            difference = abs(value / expected - 1)
            print(f"{update}, {name}: {what} {value:.6f}, {difference:.1e} from the baseline", flush=True)
            if difference > TOLERANCE[name]:
                sys.exit(f"error: {update}, {name}: {what} differs by more than {TOLERANCE[name]}")


def peak_memory_gb(update: str, variant: str) -> float:
    """Peak resident memory of two updates in a fresh process, in GB."""
    command = [sys.executable, __file__, "--memory", update, variant]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("UPDATE", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start_processes()
    if arguments.memory:
        update = make_update(*arguments.memory)
        update.step()
        update.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    table = Table("update", "variant", "seconds", "speed-up", "lowest - highest", "peak GB")
    for update in UPDATES:
        for name, pairs in compare(update, arguments.rounds).items():
            ratios = [baseline / own for own, baseline in pairs]
            table.add_row(
                update,
                name,
                f"{statistics.median(own for own, _ in pairs):.2f}",
                f"{statistics.median(ratios):.2f}x",
                f"{min(ratios):.2f} - {max(ratios):.2f}",
                f"{peak_memory_gb(update, name):.2f}",
            )
    threads = torch.get_num_threads()
    Console(width=110).print(f"{CLIPS} clips an update, {threads} threads, torch {torch.__version__}", table)


if __name__ == "__main__":
    main()
