"""Students that share their teachers draw the same clips, masks and layer seeds, in the same micro-batches."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from mvd.config import ConfigError
from mvd.data.datasets import SampleKey, build_dataset
from mvd.data.loader import UpdateSampler, train_loader
from mvd.stage import Execution, Stage
from tests.data.stages import recipe, stage

TRAIN_VIDEOS = 240_436
RANKS = 2


def student(root: Path, global_batch: int, unit: int, micro_batch: int, epochs: int = 2, **fields) -> Stage:
    """A student of a group whose smallest global batch is `unit`, on two processes."""
    made = stage(
        root, "pretrain", world_size=RANKS, micro_batch=micro_batch, global_batch=global_batch, epochs=epochs, **fields
    )
    return dataclasses.replace(made, execution=dataclasses.replace(made.execution, batch_parts=global_batch // unit))


def drawn(made: Stage, rank: int) -> list[list[torch.Tensor]]:
    """Clip, mask and layer seeds of each of a rank's micro-batches, as the loader gives them."""
    batches = train_loader(made, build_dataset(made), rank)
    return [[batch[name] for name in ("video", "mask", "layer_seeds")] for batch in batches]


def equal(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.equal(b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("rank", range(RANKS))
def test_students_of_one_batch_draw_the_same(motion_root, rank):
    one = student(motion_root, 16, 16, 4, drop_path=0.1)
    other = student(motion_root, 16, 16, 4, drop_path=0.3, activation_checkpointing=True)
    assert equal(drawn(one, rank), drawn(other, rank))
    assert not equal(drawn(one, rank), drawn(student(motion_root, 16, 16, 4, seed=1), rank))


@pytest.mark.parametrize("rank", range(RANKS))
def test_one_update_of_twice_the_batch_is_two_updates(motion_root, rank):
    """48 videos: an epoch is 3 updates of 14 and 1 of 28, so the third of the small ones belongs to no large one."""
    small, large = drawn(student(motion_root, 14, 14, 7), rank), drawn(student(motion_root, 28, 14, 7), rank)
    assert (len(small), len(large)) == (6, 4)
    assert equal(small[:2] + small[3:5], large)


def sampler(global_batch: int, parts: int, rank: int, start_update: int) -> UpdateSampler:
    made = recipe("pretrain", global_batch=global_batch, epochs=2)
    execution = Execution(world_size=4, micro_batch=16, accumulation=global_batch // 64, batch_parts=parts)
    return UpdateSampler(
        Stage(kind="pretrain", id="p", recipe=made, execution=execution), TRAIN_VIDEOS, rank, start_update
    )


@pytest.mark.parametrize("rank", range(4))
def test_batches_of_1024_and_512_agree_at_the_border_of_an_epoch(rank):
    """An epoch of Kinetics-400 has 234 and 469 updates."""
    large, small = iter(sampler(1024, 2, rank, 233)), iter(sampler(512, 1, rank, 466))
    batches = [next(large) for _ in range(3 * 16)]
    units = [next(small) for _ in range(7 * 8)]
    assert batches == units[: 2 * 8] + units[3 * 8 :]
    assert [batch[0].epoch for batch in batches] == 16 * [0] + 32 * [1]


def test_the_parts_of_a_batch_change_only_which_process_has_a_sample():
    def update(parts: int) -> Counter[SampleKey]:
        batches = [iter(sampler(1024, parts, rank, 5)) for rank in range(4)]
        return Counter(key for batch in batches for _ in range(16) for key in next(batch))

    assert update(1) == update(2) == update(4)
    with pytest.raises(ConfigError, match="accumulation must be a multiple of batch_parts, got 16 and 3"):
        sampler(1024, 3, 0, 0)
