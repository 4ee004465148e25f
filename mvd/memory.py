"""GPU memory of a training stage, counted from the sizes of its networks. Must not import torch.

Counts what one process keeps at the same time: weights, gradients, optimizer state and buffers of the ZeRO
configuration, which do not depend on the micro-batch, and the activations of one sample. Numbers are bytes. As in
mvd/flops.py, a change of a network needs a change here; tests compare both with the real networks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvd.config import Finetune, ImageTeacher, Precision, Pretrain, TrainRecipe, VideoTeacher, dataset_of
from mvd.config.sizes import SIZES, ClipShape, ImageShape, Transformer

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"

USABLE = 0.92  # of a GPU's memory: the allocator's fragments take the rest
GB = 1e9
FP32 = 4
CONTEXT = 1.5 * GB  # CUDA's context and libraries, and NCCL's buffers
# DeepSpeed's defaults, in values.
BUCKET = 500_000_000
LIVE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: `fixed`, and `sample` for each sample of the micro-batch."""

    fixed: float
    sample: float

    def total(self, micro_batch: int) -> float:
        """Bytes with a micro-batch of so many samples."""
        return self.fixed + micro_batch * self.sample

    def most_samples(self, gpu_memory_gb: float) -> int:
        """The largest micro-batch that fits a GPU of so many GB (10^9 bytes); 0 if none does."""
        return max(0, int((USABLE * gpu_memory_gb * GB - self.fixed) / self.sample))


def memory_of(recipe: TrainRecipe, world_size: int, deepspeed: str, precision: Precision) -> Memory:
    """The memory of a training stage on `world_size` GPUs with a configuration of ds_configs/."""
    item = 2 if precision == "bf16" else FP32
    zero = json.loads((DS_CONFIGS / f"{deepspeed}.json").read_text())["zero_optimization"]
    states = _states(parameters_of(recipe), world_size, zero, item)
    copies = recipe.augmentation.samples if isinstance(recipe, Finetune) else 1
    sample = copies * (input_bytes(recipe) + peak_bytes(recipe, item))
    return Memory(CONTEXT + states + teacher_bytes(recipe, item), sample)


def memory_of_group(
    recipes: Sequence[Pretrain], world_size: int, deepspeed: Sequence[str], precision: Precision
) -> Memory:
    """The memory of students that share their teachers in one job: all of their states, and one's activations.

    deepspeed: the configuration of each. The targets of a clip are few beside the activations.
    """
    alone = [memory_of(recipe, world_size, name, precision) for recipe, name in zip(recipes, deepspeed, strict=True)]
    common = CONTEXT + teacher_bytes(recipes[0], 2 if precision == "bf16" else FP32)
    states = sum(memory.fixed - common for memory in alone)
    return Memory(common + states, max(memory.sample for memory in alone))


def _states(parameters: int, ranks: int, zero: Mapping[str, Any], item: int) -> float:
    """Weights, gradients, AdamW's state, autocast's copies of the weights, and DeepSpeed's buffers.

    As DeepSpeed 0.19 allocates them for fp32 weights (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py).
    """
    stage, share = zero["stage"], parameters / ranks
    bucket: int = zero.get("reduce_bucket_size", BUCKET)
    casts = 2 * parameters if item == 2 else 0
    if stage == 0:  # all-reduced in one buffer, as long as the gradients are shorter than a bucket
        return (4 + 4 + 8) * parameters + casts + FP32 * min(parameters, BUCKET)
    filled = 2 if stage < 3 and zero.get("overlap_comm") else 1  # one is filled while the other one is reduced
    buckets = FP32 * (filled * bucket + min(parameters, bucket))  # allocated whole, whatever the network's size
    if stage < 3:
        gradients = 4 * parameters if stage == 1 else 4 * share
        return 4 * parameters + gradients + casts + (4 + 12) * share + buckets
    live: float = FP32 * min(parameters, zero.get("stage3_max_live_parameters", LIVE))
    if "offload_optimizer" in zero:
        return live + casts + buckets
    return live + casts + (4 + 4 + 12) * share + buckets


def parameters_of(recipe: TrainRecipe) -> int:
    """Trainable parameters of a stage's network."""
    match recipe:
        case Pretrain():
            own, width = SIZES[recipe.student], SIZES[recipe.student].encoder.width
            inner, outputs = own.decoder.width, SIZES[recipe.teacher].encoder.width
            branch = _linear(width, inner) + inner + _stack(own.decoder) + 2 * inner + _linear(inner, outputs)
            return _encoder(own.encoder, own.clip) + 2 * width + 2 * branch
        case Finetune():
            own = SIZES[recipe.size]
            width = own.encoder.width
            return _encoder(own.encoder, own.clip) + 2 * width + _linear(width, dataset_of(recipe).classes)
        case VideoTeacher():
            own, inner = SIZES[recipe.size], SIZES[recipe.size].video_decoder.width
            width, outputs = own.encoder.width, _patch_values(own.clip)
            decoder = inner + _stack(own.video_decoder) + 2 * inner + _linear(inner, outputs)
            return _encoder(own.encoder, own.clip) + 2 * width + width * inner + decoder
        case ImageTeacher():
            own, inner = SIZES[recipe.size], SIZES[recipe.size].image_decoder.width
            width, image = own.encoder.width, own.image_training
            decoder = _linear(width, inner) + inner + _stack(own.image_decoder) + 2 * inner
            class_token = width
            return (
                _encoder(own.encoder, image) + class_token + 2 * width + decoder + _linear(inner, _patch_values(image))
            )


def teacher_bytes(recipe: TrainRecipe, item: int) -> float:
    """The weights of the two frozen teachers of a pre-training, which are stored in the precision of its products."""
    if not isinstance(recipe, Pretrain):
        return 0
    teacher = SIZES[recipe.teacher]
    return item * (_encoder(teacher.encoder, teacher.clip) + _encoder(teacher.encoder, teacher.image))


def input_bytes(recipe: TrainRecipe) -> float:
    """A clip or image as pixels in fp32, and the next one's in uint8, which is copied meanwhile."""
    match recipe:
        case ImageTeacher():
            image = SIZES[recipe.size].image_training
            values = 3 * image.image_size**2
        case Pretrain():
            clip, image = SIZES[recipe.student].clip, SIZES[recipe.teacher].image
            values = 3 * clip.frames * clip.image_size**2
            values += 3 * clip.frames * image.image_size**2 if image.image_size != clip.image_size else 0
        case _:
            clip = SIZES[recipe.size].clip
            values = 3 * clip.frames * clip.image_size**2
    return (FP32 + 1) * values


def peak_bytes(recipe: TrainRecipe, item: int) -> float:
    """The most that the activations of a clip or image occupy at any time of a forward and backward pass.

    item: bytes of a value in matrix products, 2 in bf16 and 4 in fp32.
    """
    checkpointing = not isinstance(recipe, ImageTeacher) and recipe.activation_checkpointing
    own = SIZES[recipe.student if isinstance(recipe, Pretrain) else recipe.size]
    saved = activation_bytes(recipe, item)
    match recipe:
        case Pretrain():
            student = saved + _backward(own.decoder, own.clip.tokens, item, checkpointing)
            return max(student, _teaching(recipe, item))  # the teachers come first
        case Finetune():
            peak = _backward(own.encoder, own.clip.tokens, item, checkpointing)
        case VideoTeacher():
            clip, masked = own.clip, own.clip.slices * int(recipe.mask_ratio * own.clip.positions)
            targets = FP32 * (clip.tokens + 2 * masked) * _patch_values(clip)  # the clip in tubelets, and their pixels
            peak = max(_backward(own.video_decoder, clip.tokens, item, checkpointing), targets)
        case ImageTeacher():
            peak = _backward(own.image_decoder, own.image_training.positions + 1, item, checkpointing=False)
    return saved + peak


def activation_bytes(recipe: TrainRecipe, item: int) -> float:
    """What autograd keeps of a clip or image from its forward to its backward pass; item: see `peak_bytes`."""
    checkpointing = not isinstance(recipe, ImageTeacher) and recipe.activation_checkpointing
    match recipe:
        case Pretrain():
            return _student(recipe, item, checkpointing)
        case Finetune():
            own = SIZES[recipe.size]
            embedding = item * own.clip.tokens * _patch_values(own.clip)
            return embedding + _blocks(own.encoder, own.clip.tokens, item, checkpointing)
        case VideoTeacher():
            own, clip = SIZES[recipe.size], SIZES[recipe.size].clip
            masked = clip.slices * int(recipe.mask_ratio * clip.positions)
            visible = clip.tokens - masked
            return (
                item * visible * _patch_values(clip)
                + _blocks(own.encoder, visible, item, checkpointing)
                + (FP32 + item) * visible * own.encoder.width
                + _decoder(own.video_decoder, clip.tokens, masked, _patch_values(clip), item, checkpointing)
            )
        case ImageTeacher():
            own, image = SIZES[recipe.size], SIZES[recipe.size].image_training
            masked = int(recipe.mask_ratio * image.positions)
            visible = image.positions - masked + 1  # the class token
            return (
                item * image.positions * _patch_values(image)
                + _blocks(own.encoder, visible, item, checkpointing=False)
                + (FP32 + item) * visible * own.encoder.width
                + _decoder(own.image_decoder, image.positions + 1, masked, _patch_values(image), item, False)
            )


def _student(recipe: Pretrain, item: int, checkpointing: bool) -> float:
    own, clip = SIZES[recipe.student], SIZES[recipe.student].clip
    masked = clip.slices * int(recipe.mask_ratio * clip.positions)
    visible, outputs = clip.tokens - masked, SIZES[recipe.teacher].encoder.width
    return (
        item * visible * _patch_values(clip)
        + _blocks(own.encoder, visible, item, checkpointing)
        + (FP32 + 2 * item) * visible * own.encoder.width  # the norm's input, and that of each branch's projection
        + 2 * _decoder(own.decoder, clip.tokens, masked, outputs, item, checkpointing)
    )


def _decoder(shape: Transformer, tokens: int, masked: int, outputs: int, item: int, checkpointing: bool) -> float:
    """Blocks, norm and head, and in fp32 the predictions and their targets, (masked, outputs) each."""
    ends = FP32 * tokens * shape.width + item * masked * shape.width
    return _blocks(shape, tokens, item, checkpointing) + ends + 2 * FP32 * masked * outputs


def _blocks(shape: Transformer, tokens: int, item: int, checkpointing: bool) -> float:
    return shape.depth * (FP32 * tokens * shape.width if checkpointing else _block(shape, tokens, item))


def _block(shape: Transformer, tokens: int, item: int) -> float:
    """The norms' inputs, means and deviations in fp32; in `item` bytes the inputs of the four linear layers and of
    GELU, and query, key and value; one number per head and token of fused attention.
    """
    width, hidden = shape.width, shape.mlp_width
    return tokens * (2 * FP32 * (width + 2) + item * (6 * width + 2 * hidden) + FP32 * shape.heads)


def _backward(shape: Transformer, tokens: int, item: int, checkpointing: bool) -> float:
    """The gradients in the last block's MLP, and with checkpointing what is recomputed of that block."""
    width = shape.width
    gradients = tokens * (FP32 * width + item * (width + shape.mlp_width))
    return gradients + (_block(shape, tokens, item) - FP32 * tokens * width if checkpointing else 0)


def _teaching(recipe: Pretrain, item: int) -> float:
    """The video teacher's MLP, and what is kept of the image teacher.

    About 26 bytes a token and channel beside GELU's input and output, whatever the size: measured.
    """
    teacher = SIZES[recipe.teacher].encoder
    return SIZES[recipe.student].clip.tokens * (26 * teacher.width + 2 * item * teacher.mlp_width)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _stack(shape: Transformer) -> int:
    width, hidden = shape.width, shape.mlp_width
    return shape.depth * ((4 * width + 2 * hidden) * width + 8 * width + hidden)


def _encoder(shape: Transformer, patches: ClipShape | ImageShape) -> int:
    return _linear(_patch_values(patches), shape.width) + _stack(shape)


def _patch_values(shape: ClipShape | ImageShape) -> int:
    return 3 * shape.patch_size**2 * (shape.tubelet if isinstance(shape, ClipShape) else 1)
