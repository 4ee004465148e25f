"""The networks compute what the official ones compute, from weights under the official names."""

import numpy as np
import pytest
import torch
from torch import nn

from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from mvd.models.tokens import visible_then_masked
from tests.official import (
    assert_golden,
    golden,
    golden_images,
    golden_mask,
    golden_video,
    stats,
    with_golden_weights,
)


def assert_fingerprints(model: nn.Module, file: dict) -> None:
    """The weights (and tables) are those that the golden outputs were made with."""
    state = model.state_dict()
    for field in (name for name in file if name.startswith("w::")):
        np.testing.assert_allclose(stats(state[field[3:]]), file[field], rtol=1e-5, atol=1e-6)
    for field in (name for name in file if name.startswith("pos::") and name.endswith("_slice")):
        table = state[field.removeprefix("pos::").removesuffix("_slice")][0]
        np.testing.assert_allclose(table[::97, ::31], file[field], atol=1e-6)


def test_golden_inputs_are_reproduced():
    file = golden("inputs_fingerprint.npz")
    np.testing.assert_allclose(golden_video()[:, :, ::5, ::37, ::41], file["video_slice"], atol=1e-6)
    np.testing.assert_array_equal(np.packbits(golden_mask(), axis=1), file["mask"])


@pytest.mark.parametrize(("size", "teacher"), [("small", "base"), ("base", "large")])
@torch.no_grad()
def test_student(size, teacher):
    student = with_golden_weights(build_student(size, teacher=teacher))
    file = golden(f"model_student_{size}_from_{teacher}.npz")
    assert_fingerprints(student, file)
    video, mask = golden_video(), golden_mask()
    image_features, video_features = student(video, mask)
    assert_golden(image_features, file, "img")
    assert_golden(video_features, file, "vid")
    visible = visible_then_masked(mask)[:, :160]
    assert_golden(student.norm(student.features(video, visible)), file, "encoder")


@pytest.mark.parametrize(("size", "image_size", "images"), [("base", 224, 4), ("huge", 196, 1)])
@torch.no_grad()
def test_image_teacher(size, image_size, images):
    teacher = with_golden_weights(build_image_teacher(size))
    file = golden(f"model_image_teacher_{size}.npz")
    assert_fingerprints(teacher, file)
    assert_golden(teacher(golden_images(image_size)[:images]), file, "feat")


@torch.no_grad()
def test_video_teacher():
    teacher = with_golden_weights(build_video_teacher("base"))
    file = golden("model_video_teacher_base.npz")
    assert_fingerprints(teacher, file)
    assert_golden(teacher(golden_video()[:1]), file, "feat")


@torch.no_grad()
def test_classifier():
    classifier = with_golden_weights(build_classifier("small", num_classes=400))
    file = golden("model_classifier_small.npz")
    assert_fingerprints(classifier, file)
    pooled = classifier.pooled(golden_video())
    assert_golden(pooled, file, "pooled")
    assert_golden(classifier.head(pooled), file, "logits")
