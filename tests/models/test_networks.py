"""Shapes, masks, precision and activation checkpointing, at the tiny size where possible."""

import pytest
import torch
from torch import nn

from mvd.config.sizes import SIZES
from mvd.models import (
    build_classifier,
    build_image_autoencoder,
    build_image_teacher,
    build_student,
    build_video_autoencoder,
    build_video_teacher,
)
from mvd.models.tokens import cut_tubelets, take, visible_then_masked
from tests.official import tube_mask

TINY = SIZES["tiny"]
CLIP = TINY.clip
PATCH = CLIP.patch_size
MASKED = round(0.9 * CLIP.positions)
MASKED_PATCHES = round(0.75 * TINY.image_training.positions)


def tiny_video(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))


def tiny_mask(masked: int = MASKED) -> torch.Tensor:
    return tube_mask(CLIP.slices, CLIP.positions, masked)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_tubelets_are_in_time_row_column_order():
    video = torch.arange(4 * 4 * 6).view(1, 1, 4, 4, 6)
    tokens = cut_tubelets(video, tubelet=2, patch_size=2)
    assert tokens.shape == (1, 12, 1, 2, 2, 2)
    assert torch.equal(tokens[0, 0, 0], video[0, 0, :2, :2, :2])
    assert torch.equal(tokens[0, 1, 0], video[0, 0, :2, :2, 2:4])
    assert torch.equal(tokens[0, 3, 0], video[0, 0, :2, 2:4, :2])
    assert torch.equal(tokens[0, 6, 0], video[0, 0, 2:, :2, :2])


def test_order_of_visible_and_masked_tokens_agrees_with_boolean_indexing():
    mask = tube_mask(slices=2, positions=9, masked=6, batch=3)
    order = visible_then_masked(mask)
    tokens = torch.randn(3, 18, 5)
    assert torch.equal(take(tokens, order[:, :6]), tokens[~mask].view(3, 6, 5))
    assert torch.equal(take(tokens, order[:, 6:]), tokens[mask].view(3, 12, 5))


def test_student_sees_only_visible_tokens():
    student, mask = build_student("tiny", teacher="tiny"), tiny_mask()
    video = tiny_video()
    changed = video.clone()
    hidden = mask.view(2, CLIP.slices, 1, CLIP.side, CLIP.side)[:, :, 0]
    pixels = hidden.repeat_interleave(CLIP.tubelet, 1).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed.masked_fill_(pixels[:, None], 9.0)
    for one, other in zip(student(video, mask), student(changed, mask), strict=True):
        assert one.shape == (2, CLIP.slices * MASKED, TINY.encoder.width)
        assert torch.equal(one, other)
    assert not torch.equal(student(video, mask)[0], student(video * 2, mask)[0])


def test_student_and_teacher_may_differ_in_width():
    student = build_student("small", teacher="large")
    assert student.decoder_img.head.out_features == student.decoder_vid.head.out_features == 1024


@pytest.mark.parametrize("rows", [[MASKED, MASKED - 1], [CLIP.positions] * 2, [0, 0]])
def test_impossible_masks_are_refused(rows):
    mask = torch.stack([tube_mask(CLIP.slices, CLIP.positions, masked, batch=1)[0] for masked in rows])
    with pytest.raises(ValueError, match="same number of masked tokens"):
        build_student("tiny", teacher="tiny")(tiny_video(), mask)


def test_a_clip_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must have the shape \(batch, \*\(3, 16, 48, 48\)\)"):
        build_video_teacher("tiny")(torch.zeros(1, 3, 16, 64, 64))


def test_teachers_stay_frozen():
    for teacher in (build_image_teacher("tiny"), build_video_teacher("tiny")):
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_every_block_uses_fused_attention():
    for model in (build_student("tiny", teacher="tiny"), build_image_teacher("tiny")):
        attention = [module for name, module in model.named_modules() if name.endswith(".attn")]
        assert attention and all(module.fused_attn for module in attention)


def test_head_dropout_acts_in_training_only():
    classifier = build_classifier("tiny", num_classes=8, head_dropout=0.9)
    video = tiny_video()
    assert not torch.equal(classifier(video), classifier(video))
    classifier.eval()
    assert torch.equal(classifier(video), classifier(video))


def test_autocast_computes_in_bf16_but_keeps_the_residual_sum_in_float32():
    student, teacher = build_student("tiny", teacher="tiny"), build_video_teacher("tiny")
    video, mask = tiny_video(), tiny_mask()
    exact = student(video, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = student(video, mask)
        assert teacher(video).dtype == torch.float32
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).std() < 0.02 * other.std()


@pytest.mark.parametrize(
    "build",
    [
        lambda on: build_student("tiny", teacher="tiny", drop_path=0.5, activation_checkpointing=on),
        lambda on: build_video_autoencoder("tiny", activation_checkpointing=on),
        lambda on: build_classifier("tiny", num_classes=8, drop_path=0.5, activation_checkpointing=on),
    ],
)
def test_activation_checkpointing_changes_no_gradient(build):
    plain, recomputed = build(False), build(True)
    recomputed.load_state_dict(plain.state_dict())
    inputs = (tiny_video(),) if hasattr(plain, "head") else (tiny_video(), tiny_mask())
    for model in (plain, recomputed):
        torch.manual_seed(1)
        outputs = model(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().mean() for output in outputs).backward()
    gradients = [p.grad for p in plain.parameters() if p.requires_grad]
    recomputed_gradients = [p.grad for p in recomputed.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed_gradients, strict=True))


def test_autoencoders_predict_the_masked_values():
    images, mask = torch.randn(2, 3, 48, 48), tube_mask(1, TINY.image_training.positions, MASKED_PATCHES)
    patch_values = TINY.image_training.patch_size**2 * 3
    assert build_image_autoencoder("tiny")(images, mask).shape == (2, MASKED_PATCHES, patch_values)
    tubelet_values = CLIP.tubelet * PATCH**2 * 3
    predicted = build_video_autoencoder("tiny")(tiny_video(), tiny_mask())
    assert predicted.shape == (2, CLIP.slices * MASKED, tubelet_values)


def test_autoencoders_predict_in_token_order():
    """Without the decoder's blocks, a prediction depends on its own position only."""
    images, mask = torch.randn(2, 3, 48, 48), tube_mask(1, TINY.image_training.positions, MASKED_PATCHES)
    model = build_image_autoencoder("tiny")
    model.decoder_blocks = nn.Identity()
    at_position = model.decoder_pred(model.decoder_norm(model.mask_token + model.decoder_pos_embed[:, 1:]))
    expected = at_position.expand(2, -1, -1)[mask].view(2, MASKED_PATCHES, -1)
    torch.testing.assert_close(model(images, mask), expected)

    video, mask = tiny_video(), tiny_mask()
    model = build_video_autoencoder("tiny")
    model.decoder.blocks = nn.Identity()
    at_position = model.decoder.head(model.decoder.norm(model.mask_token + model.pos_embed))
    expected = at_position.expand(2, -1, -1)[mask].view(2, CLIP.slices * MASKED, -1)
    torch.testing.assert_close(model(video, mask), expected)
