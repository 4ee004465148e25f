"""Compares the time of one real-size update with plain PyTorch: `make bench-step`.

Two updates: B-from-B pre-training and ViT-B fine-tuning, each of two clips. The baseline is `plain.py`: explicit
softmax attention, teachers, student and optimizer in fp32, no DeepSpeed. Ours runs through the engine, in fp32, in bf16
autocast and in bf16 with compiled blocks, with the same weights and clips. Every round times all variants in turn, so
that a ratio compares times measured next to each other; the table has the median, lowest and highest ratio of the
rounds.

Peak memory is measured separately, in a process of its own for each variant.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import plain
import torch
from rich.console import Console
from rich.table import Table
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from experiments.recipes import VITB_FROM_VITB
from experiments.vitb_from_vitb_k400 import row as vitb_row
from mvd.batch import Batch
from mvd.config import Optimization, Precision
from mvd.config.sizes import SIZES
from mvd.data.clip.masking import tube_mask
from mvd.data.rng import Purpose, generator
from mvd.distributed.process import start_processes
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from mvd.train.compilation import compile_blocks
from mvd.train.engine import build_engine, take_step
from mvd.train.objectives import distillation_loss
from mvd.train.optimizer import build_optimizer, parameter_groups
from mvd.train.tasks import autocast, store_in_bf16

VARIANTS = ("plain fp32", "ours fp32", "ours bf16", "ours bf16 compiled")
UPDATES = ("pretrain B from B", "finetune B")
BASE = SIZES["base"]
CLIPS = 2
# Relative difference of the first update's loss and gradient norm from the baseline's.
TOLERANCE = {"plain fp32": 0.0, "ours fp32": 1e-4, "ours bf16": 2e-2, "ours bf16 compiled": 2e-2}


Step = Callable[[], tuple[float, float]]


def make_step(update: str, variant: str) -> Step:
    """One variant of an update with fixed weights and clips; the step returns loss and gradient norm."""
    make = _pretrain_step if update.startswith("pretrain") else _finetune_step
    torch.manual_seed(0)
    return make(variant)


def _pretrain_step(variant: str) -> Step:
    student = build_student("base", teacher="base")
    image_teacher, video_teacher = build_image_teacher("base"), build_video_teacher("base")
    video = _clips()
    masks = [tube_mask(generator(0, 0, i, Purpose.MASK), BASE.clip, 0.9) for i in range(CLIPS)]
    mask = torch.stack([torch.as_tensor(m) for m in masks])
    settings = VITB_FROM_VITB.optimization
    if variant.startswith("plain"):
        net = _plain(plain.Student(BASE, BASE), student)
        teachers = _plain(plain.ImageTeacher(BASE), image_teacher), _plain(plain.VideoTeacher(BASE), video_teacher)
        return _plain_step(net, settings, lambda: plain.distillation_loss(net, *teachers, video, mask))
    precision = _precision(variant)
    for teacher in (image_teacher, video_teacher) if precision == "bf16" else ():
        store_in_bf16(teacher)
    if variant.endswith("compiled"):
        compile_blocks(student, image_teacher, video_teacher)
    calls = [autocast(teacher, precision, torch.device("cpu")) for teacher in (image_teacher, video_teacher)]
    return _engine_step(
        student, settings, precision, lambda engine: distillation_loss(engine, *calls, video, video, mask).total
    )


def _finetune_step(variant: str) -> Step:
    classifier = build_classifier("base", num_classes=400)
    video = _clips()
    targets = torch.softmax(torch.randn(CLIPS, 400, generator=torch.Generator().manual_seed(2)), dim=1)
    settings = vitb_row.finetune.optimization
    if variant.startswith("plain"):
        net = _plain(plain.Classifier(BASE, 400), classifier)
        return _plain_step(net, settings, lambda: plain.finetuning_loss(net, video, targets))
    if variant.endswith("compiled"):
        compile_blocks(classifier)
    criterion = SoftTargetCrossEntropy()
    return _engine_step(
        classifier, settings, _precision(variant), lambda engine: criterion(engine(video).float(), targets)
    )


def _clips() -> Tensor:
    return torch.randn(CLIPS, 3, 16, 224, 224, generator=torch.Generator().manual_seed(1))


def _precision(variant: str) -> Precision:
    return "bf16" if "bf16" in variant else "fp32"


def _plain(network: nn.Module, ours: nn.Module) -> nn.Module:
    """The plain network with our network's weights; both build their own position tables."""
    missing, unexpected = network.load_state_dict(ours.state_dict(), strict=False)
    if unexpected or [name for name in missing if "pos_embed" not in name]:
        sys.exit(f"error: {type(network).__name__} is not the network of mvd.models: {missing} {unexpected}")
    return network


def _plain_step(network: nn.Module, settings: Optimization, loss: Callable[[], Tensor]) -> Step:
    groups = parameter_groups(network, settings.weight_decay, settings.layer_decay)
    for group in groups:
        group["lr"] = settings.peak_lr * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)

    def step() -> tuple[float, float]:
        value = loss()
        value.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return value.item(), norm.item()

    return step


def _engine_step(
    model: nn.Module, settings: Optimization, precision: Precision, loss: Callable[[nn.Module], Tensor]
) -> Step:
    engine = build_engine(model, build_optimizer(model, settings), "zero1", Batch(CLIPS, 1, 1), precision)

    def step() -> tuple[float, float]:
        value = loss(engine)
        engine.backward(value)
        return value.item(), take_step(engine)

    return step


def compare(update: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and first loss of every round and variant; exits if the results do not agree."""
    variants = {name: make_step(update, name) for name in VARIANTS}
    first = {name: variant() for name, variant in variants.items()}  # also warms up
    check_agreement(update, first)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - started)
    return {name: list(zip(seconds[name], seconds[VARIANTS[0]], strict=True)) for name in VARIANTS}


def check_agreement(update: str, results: dict[str, tuple[float, float]]) -> None:
    """Exits if a variant's loss or gradient norm differs from the baseline's by more than TOLERANCE."""
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
    if arguments.memory:
        start_processes()
        step = make_step(*arguments.memory)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    memory = {(update, name): peak_memory_gb(update, name) for update in UPDATES for name in VARIANTS}
    start_processes()  # after the child processes, which use the same port
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
                f"{memory[update, name]:.2f}",
            )
    threads = torch.get_num_threads()
    Console(width=110).print(f"{CLIPS} clips per update, {threads} threads, torch {torch.__version__}", table)


if __name__ == "__main__":
    main()
