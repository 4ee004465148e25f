"""Times the rows' training updates on this machine's GPU, in bf16: `make bench-gpu`.

For each of the seven pre-trainings and each different fine-tuning, at real size and with random weights: the largest
micro-batch that fits (to a sixteenth), clips/s with it, the share of the throughput of a plain bf16 matrix product on
the same GPU, and the peak memory. One GPU, ZeRO-1, random clips that are already on the GPU: decoding, copying and
communication between GPUs are excluded. Each first update is checked as by `pytest -m fullsize`: a finite loss, a
gradient on every trainable parameter and none on a teacher.

FLOPs per clip are those of mvd/flops.py, without the recomputation of activation checkpointing. Every trial runs in a
process of its own, since the engine is unusable after it ran out of memory. Allow a few minutes per row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.real_size import GradientWatch, Recipe, random_teachers, recipes
from mvd.batch import Batch
from mvd.config import DATASETS, Finetune, Pretrain
from mvd.config.sizes import SIZES
from mvd.data.clip.crops import erase_box
from mvd.data.clip.masking import tube_mask
from mvd.data.on_device import prepare
from mvd.data.rng import Purpose, generator
from mvd.distributed.process import start_processes
from mvd.flops import tflop_per_sample
from mvd.stage import Execution, Stage
from mvd.train.engine import Engine, build_engine, take_step
from mvd.train.optimizer import build_optimizer
from mvd.train.sample_seeded_dropout import SampleSeededLayers
from mvd.train.tasks import Task, build_task

SECONDS = 5.0  # of timed updates, at least
EXAMPLES = """examples:
  make bench-gpu
  python -m benchmarks.gpu --only pretrain-vitb_from_vitb_e400 finetune-vitb_from_vitb_k400
"""
COLUMNS = ("stage", "micro-batch", "clips", "clips/s", "TFLOP/s", "of a matmul", "peak GB")


def unit(recipe: Recipe) -> int:
    """The step between micro-batches: fine-tuning needs whole pairs of videos."""
    return 2 if isinstance(recipe, Finetune) else 1


def clips_of(recipe: Recipe, micro_batch: int) -> int:
    return micro_batch * (recipe.augmentation.samples if isinstance(recipe, Finetune) else 1)


def random_batch(recipe: Recipe, micro_batch: int, device: torch.device) -> dict[str, Tensor]:
    """A batch as the loader makes it for so many samples, with random pixels, on the device."""
    clip = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size].clip
    count = clips_of(recipe, micro_batch)

    def pixels(size: int) -> Tensor:
        return torch.randint(0, 256, (count, 3, clip.frames, size, size), dtype=torch.uint8, device=device)

    batch = {"video": pixels(clip.image_size), "layer_seeds": torch.arange(count)}
    draws = [generator(0, 0, index, Purpose.MASK) for index in range(count)]
    if isinstance(recipe, Pretrain):
        batch["mask"] = torch.stack([torch.from_numpy(tube_mask(rng, clip, recipe.mask_ratio)) for rng in draws])
        image_size = SIZES[recipe.teacher].image.image_size
        if image_size != clip.image_size:
            batch["image_video"] = pixels(image_size)
        return batch
    group = clips_of(recipe, recipe.mixing.group)
    return batch | {
        "labels": torch.randint(0, DATASETS[recipe.dataset].classes, (count,)),
        "erase": torch.tensor([erase_box(clip.image_size, recipe.augmentation.erase, rng) for rng in draws]),
        "noise_seeds": torch.arange(count),
        "mix_seeds": torch.arange(count) // group,
    }


class Trained(NamedTuple):
    """A stage as in mvd.train.loop: networks and losses, the engine, and the seeded drop path."""

    recipe: Recipe
    task: Task
    engine: Engine
    noise: SampleSeededLayers


def build(name: str, recipe: Recipe, inputs: dict[str, str], device: torch.device) -> Trained:
    """The networks of a stage with random weights, on the device."""
    kind = "pretrain" if isinstance(recipe, Pretrain) else "finetune"
    stage = Stage(kind=kind, id=name, recipe=recipe, inputs=inputs, execution=Execution(precision="bf16"))
    task = build_task(stage, DATASETS[recipe.dataset].classes, device)
    model = task.model.to(device)
    noise = SampleSeededLayers(model, "bf16")
    engine = build_engine(model, build_optimizer(model, recipe.optimization), "zero1", Batch(1, 1, 1), "bf16")
    engine.train()
    return Trained(recipe, task, engine, noise)


def one_update(stage: Trained, batch: dict[str, Tensor]) -> float:
    """One update; returns the gradient's norm, which synchronises with the device."""
    device = batch["video"].device
    prepared = prepare(batch, stage.recipe, device)
    stage.seeded_layers.draw(batch["layer_seeds"], device)
    stage.engine.backward(stage.task.losses(stage.engine, prepared)["loss"])
    return take_step(stage.engine)


def check_first_update(stage: Trained, batch: dict[str, Tensor]) -> None:
    """Exits if the loss is not finite or a gradient is missing or not finite."""
    watch = GradientWatch(stage.engine.module)
    norm = one_update(stage, batch)
    watch.close()
    problems = watch.problems() + ([] if norm > 0 else [f"the gradient's norm is {norm}"])
    teachers = getattr(stage.task, "teachers", ())
    problems += [
        "a teacher is trained" for t in teachers for p in t.parameters() if p.requires_grad or p.grad is not None
    ]
    if problems:
        sys.exit(f"error: {problems[0]} ({len(problems)} problems)")


def measure(name: str, folder: Path, micro_batches: Sequence[int], seconds: float) -> Iterator[dict[str, float]]:
    """Clips/s and peak memory at each micro-batch, until one does not fit.

    Raises:
        torch.OutOfMemoryError: that one.
    """
    process = start_processes()
    recipe = recipes()[name]
    inputs = teacher_files(recipe, folder) if isinstance(recipe, Pretrain) else {}
    stage = build(name, recipe, inputs, process.device)
    check_first_update(stage, random_batch(recipe, unit(recipe), process.device))
    capacity = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    for micro_batch in micro_batches:
        batch = random_batch(recipe, micro_batch, process.device)
        torch.cuda.reset_peak_memory_stats()
        one_update(stage, batch)
        updates, started = 0, time.perf_counter()  # the gradient's norm synchronises, so nothing is pending
        while updates == 0 or time.perf_counter() - started < seconds:
            one_update(stage, batch)
            updates += 1
        torch.cuda.synchronize()
        yield {
            "micro_batch": micro_batch,
            "clips_per_second": updates * clips_of(recipe, micro_batch) / (time.perf_counter() - started),
            "memory": torch.cuda.max_memory_allocated(),
            "capacity": capacity,
        }


def print_until_full(series: Iterator[dict[str, float]]) -> None:
    """Prints measurements as JSON, one per line, until the GPU runs out of memory."""
    try:
        for figures in series:
            print(json.dumps(figures), flush=True)
    except RuntimeError as error:  # cuBLAS raises an error of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise


def teacher_files(recipe: Pretrain, folder: Path) -> dict[str, str]:
    """Both teachers' files, which are written if they do not exist."""
    target = folder / recipe.teacher
    if not target.exists():
        target.mkdir()
        random_teachers(recipe.teacher, target)
    return {role: str(target / f"{role}_{recipe.teacher}.safetensors") for role in ("image_teacher", "video_teacher")}


def matmul_tflops(size: int = 8192, repeats: int = 50) -> float:
    """TFLOP/s of a square bf16 matrix product, an upper bound for any training step."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12


def in_process(*arguments: str) -> list[dict[str, Any]]:
    """Runs this file with hidden arguments and returns the JSON objects it printed; exits if it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    free_port = os.environ | {"MASTER_PORT": "0"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=free_port)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def find_largest(
    recipe: Recipe, run: Callable[[Sequence[int], float], list[dict[str, float]]]
) -> dict[str, float] | None:
    """The figures at the largest micro-batch that fits, to a sixteenth, or None if not even the smallest fits.

    run: measures micro-batches for so many seconds each, until one does not fit. Memory grows evenly with the
    micro-batch, so the last two of a doubling series say where to try first.
    """
    step = unit(recipe)
    fitting = run([step * 2**power for power in range(12)], 0.0)
    if len(fitting) < 2:
        return run([step], SECONDS)[0] if fitting else None
    small, large = fitting[-2:]
    known = int(large["micro_batch"])
    each = (large["memory"] - small["memory"]) / (known - small["micro_batch"])
    room = (
        int((large["capacity"] - large["memory"]) / each) if each > 0 else known
    )  # the optimizer's step may be the peak
    guess = known + min(room, known - 1) // step * step
    while guess > known:
        found = run([guess], SECONDS)
        if found:
            return found[0]
        guess -= max(step, guess // 16 // step * step)
    return run([known], SECONDS)[0]


def table_line(name: str, recipe: Recipe, figures: dict[str, float] | None, peak: float) -> str:
    if figures is None:
        return f"| {name} | does not fit | | | | | |"
    rate = figures["clips_per_second"]
    tflops = rate * tflop_per_sample(recipe)
    micro_batch = int(figures["micro_batch"])
    cells = (str(micro_batch), str(clips_of(recipe, micro_batch)), f"{rate:.1f}", f"{tflops:.0f}")
    return f"| {name} | {' | '.join(cells)} | {tflops / peak:.0%} | {figures['memory'] / 1e9:.1f} |"


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", choices=recipes(), metavar="STAGE", help=f"of {', '.join(recipes())}")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--matmul", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch finds no GPU; run make bench-gpu on a machine that has one", file=sys.stderr)
        return 1
    if options.matmul:
        print(json.dumps({"tflops": matmul_tflops(), "gpu": torch.cuda.get_device_name()}))
        return 0
    if options.measure:
        name, folder, micro_batches, seconds = options.measure
        print_until_full(measure(name, Path(folder), json.loads(micro_batches), float(seconds)))
        return 0
    chosen = {name: recipe for name, recipe in recipes().items() if options.only is None or name in options.only}
    (machine,) = in_process("--matmul")
    print(
        f"{machine['gpu']}, torch {torch.__version__}, a bf16 product of 8192 x 8192: {machine['tflops']:.0f} TFLOP/s\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in chosen.items():

            def run(micro_batches: Sequence[int], seconds: float, name: str = name) -> list[dict[str, float]]:
                return in_process("--measure", name, folder, json.dumps(list(micro_batches)), str(seconds))

            print(table_line(name, recipe, find_largest(recipe, run), machine["tflops"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
