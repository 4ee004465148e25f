"""Floating-point operations of a stage, from the sizes of its networks. Must not import torch.

Counts the multiply-adds (x 2) of linear layers and attention. A training step counts as three forward passes; the
fourth of activation checkpointing is not counted, so the numbers are those of model FLOPs utilisation (MFU).
"""

import re
from collections.abc import Mapping, Sequence
from math import prod

from mvd.config import Finetune, ImageTeacher, Pretrain, Recipe, Test, TrainRecipe, VideoTeacher, dataset_of
from mvd.config.sizes import SIZES, ClipShape, ImageShape, Transformer
from mvd.sharing import teacher_samples


def tflop_per_sample(recipe: Recipe) -> float:
    """TFLOP of one sample in a stage: one clip or image in training, all views of one video in a test."""
    match recipe:
        case Pretrain():
            flop = _teaching(recipe.teacher) + 3 * _student(recipe)
        case Finetune():
            flop = 3 * _clip_encoder(recipe.size)
        case Test():
            flop = recipe.clips * recipe.crops * _clip_encoder(recipe.size)
        case VideoTeacher():
            flop = 3 * _video_autoencoder(recipe)
        case ImageTeacher():
            flop = 3 * _image_autoencoder(recipe)
    return flop / 1e12


def total_tflop(recipe: Recipe) -> float:
    """TFLOP of a whole stage, for the data set's number of samples."""
    dataset = dataset_of(recipe)
    if isinstance(recipe, Test):
        return tflop_per_sample(recipe) * dataset.val_samples
    batch = recipe.optimization.global_batch
    samples = dataset.train_samples // batch * batch * recipe.optimization.epochs
    copies = recipe.augmentation.samples if isinstance(recipe, Finetune) else 1
    return tflop_per_sample(recipe) * samples * copies


def gpu_hours(recipe: Recipe, sustained_tflops: float) -> float:
    """GPU hours of a whole stage at this many TFLOP/s per GPU."""
    return total_tflop(recipe) / sustained_tflops / 3600


def shared_gpu_hours(recipes: Sequence[Pretrain], sustained_tflops: float) -> float:
    """GPU hours of pre-trainings that share one pass of their teachers (mvd.sharing), at this many TFLOP/s per GPU."""
    return sum(gpu_hours(recipe, sustained_tflops) for recipe in recipes) - saved_gpu_hours(recipes, sustained_tflops)


def saved_gpu_hours(recipes: Sequence[Pretrain], sustained_tflops: float) -> float:
    """GPU hours that pre-trainings save if they share one pass of their teachers instead of running alone."""
    return saved_tflop(recipes) / sustained_tflops / 3600


def saved_tflop(recipes: Sequence[Pretrain]) -> float:
    """TFLOP that pre-trainings save if they share one pass of their teachers instead of running alone."""
    samples = dataset_of(recipes[0]).train_samples
    optimizations = [recipe.optimization for recipe in recipes]
    alone = sum(samples // how.global_batch * how.global_batch * how.epochs for how in optimizations)
    saved = alone - teacher_samples(recipes)
    return saved * _teaching(recipes[0].teacher) / 1e12


def probe_share(recipe: Pretrain | VideoTeacher, videos: int, samples: int, every_epochs: int) -> float:
    """FLOPs of a k-NN probe of `videos` clips, as a share of those of the epochs of `samples` clips between two."""
    size = recipe.student if isinstance(recipe, Pretrain) else recipe.size
    return videos * _clip_encoder(size) / (1e12 * tflop_per_sample(recipe) * samples * every_epochs)


def _blocks(transformer: Transformer, tokens: int) -> float:
    width = transformer.width
    linear = (4 * width + 2 * transformer.mlp_width) * width * tokens
    attention = 2 * tokens**2 * width
    return 2 * transformer.depth * (linear + attention)


def _linear(tokens: int, inputs: int, outputs: int) -> float:
    return 2 * tokens * inputs * outputs


def _patch_values(shape: ClipShape | ImageShape) -> int:
    tubelet = shape.tubelet if isinstance(shape, ClipShape) else 1
    return prod((3, tubelet, shape.patch_size, shape.patch_size))


def _clip_encoder(size: str) -> float:
    shape, encoder = SIZES[size].clip, SIZES[size].encoder
    return _linear(shape.tokens, _patch_values(shape), encoder.width) + _blocks(encoder, shape.tokens)


def _frame_encoder(size: str) -> float:
    shape, encoder = SIZES[size].image, SIZES[size].encoder
    embedding = _linear(shape.positions, _patch_values(shape), encoder.width)
    return embedding + _blocks(encoder, shape.positions + 1)  # the class token


def _teaching(size: str) -> float:
    return SIZES[size].clip.slices * _frame_encoder(size) + _clip_encoder(size)


def _masked(positions: int, ratio: float) -> int:
    return int(ratio * positions)


def _student(recipe: Pretrain) -> float:
    size, teacher = SIZES[recipe.student], SIZES[recipe.teacher]
    shape, decoder = size.clip, size.decoder
    masked = shape.slices * _masked(shape.positions, recipe.mask_ratio)
    visible = shape.tokens - masked
    branch = (
        _linear(visible, size.encoder.width, decoder.width)
        + _blocks(decoder, shape.tokens)
        + _linear(masked, decoder.width, teacher.encoder.width)
    )
    embedding = _linear(visible, _patch_values(shape), size.encoder.width)
    return embedding + _blocks(size.encoder, visible) + 2 * branch


def _video_autoencoder(recipe: VideoTeacher) -> float:
    size = SIZES[recipe.size]
    shape, decoder = size.clip, size.video_decoder
    masked = shape.slices * _masked(shape.positions, recipe.mask_ratio)
    visible = shape.tokens - masked
    return (
        _linear(visible, _patch_values(shape), size.encoder.width)
        + _blocks(size.encoder, visible)
        + _linear(visible, size.encoder.width, decoder.width)
        + _blocks(decoder, shape.tokens)
        + _linear(masked, decoder.width, _patch_values(shape))
    )


def _image_autoencoder(recipe: ImageTeacher) -> float:
    size = SIZES[recipe.size]
    shape, decoder = size.image_training, size.image_decoder
    masked = _masked(shape.positions, recipe.mask_ratio)
    visible = shape.positions - masked + 1  # the class token
    return (
        _linear(shape.positions, _patch_values(shape), size.encoder.width)
        + _blocks(size.encoder, visible)
        + _linear(visible, size.encoder.width, decoder.width)
        + _blocks(decoder, shape.positions + 1)
        + _linear(masked, decoder.width, _patch_values(shape))
    )


# Dense 16-bit tensor-core TFLOP/s, from NVIDIA's data sheets; the first name that is a word of the device's counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
    "V100-SXM2": 125.0,
    "V100-PCIE": 112.0,
}


def throughput(recipe: TrainRecipe, samples_per_second: float, gpus: int, gpu_name: str) -> dict[str, float]:
    """Sustained TFLOP/s per GPU, and MFU as a share of the 16-bit peak if the GPU is in PEAK_TFLOPS."""
    copies = recipe.augmentation.samples if isinstance(recipe, Finetune) else 1
    values = {"speed/tflops_per_gpu": samples_per_second * copies * tflop_per_sample(recipe) / gpus}
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu_name)), None)
    return values if peak is None else {**values, "speed/mfu": values["speed/tflops_per_gpu"] / peak}


def throughput_text(values: Mapping[str, float]) -> str:
    """`throughput` as it is shown, such as `312 TFLOP/s a GPU (MFU 32 %)`; empty for a run on CPUs."""
    if "speed/tflops_per_gpu" not in values:
        return ""
    share = f" (MFU {values['speed/mfu']:.0%})".replace("%", " %") if "speed/mfu" in values else ""
    return f"{values['speed/tflops_per_gpu']:.0f} TFLOP/s a GPU{share}"
