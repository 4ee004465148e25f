"""The networks without golden outputs against the plain ones of reference.py, at full width, decoder and input size.

Their encoders are cut to two blocks, or the tests would take minutes; that the other blocks are there,
test_official_keys.py shows, and that a deep network computes what it should, the golden numbers do.
"""

import dataclasses

import pytest
import torch

from mvd import sizes
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from tests.models import reference
from tests.official import assert_golden, golden, golden_images, golden_mask, golden_video, with_golden_weights

HEADS = {"small": 6, "base": 12, "large": 16, "huge": 16}
DECODER_HEADS = {"small": 6, "base": 12, "large": 8, "huge": 8}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def two_blocks(monkeypatch):
    """Leaves every encoder two blocks."""
    for name in HEADS:
        size = sizes.SIZES[name]
        cut = dataclasses.replace(size, encoder=dataclasses.replace(size.encoder, depth=2))
        monkeypatch.setitem(sizes.SIZES, name, cut)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert ours.std() > 1e-3


def test_the_plain_networks_give_the_golden_numbers():
    """So that the comparisons below mean something."""
    student = with_golden_weights(build_student("small", teacher="base")).state_dict()
    file = golden("model_student_small_from_base.npz")
    image, video = reference.student(student, 6, 6, golden_video()[:1], golden_mask()[:1])
    assert_golden(image, file, "img")
    assert_golden(video, file, "vid")
    teacher = with_golden_weights(build_image_teacher("base")).state_dict()
    assert_golden(
        reference.image_teacher(teacher, 12, golden_images(224)[:1]), golden("model_image_teacher_base.npz"), "feat"
    )
    teacher = with_golden_weights(build_video_teacher("base")).state_dict()
    assert_golden(
        reference.video_teacher(teacher, 12, golden_video()[:1]), golden("model_video_teacher_base.npz"), "feat"
    )
    classifier = with_golden_weights(build_classifier("small", num_classes=400)).state_dict()
    assert_golden(
        reference.classifier(classifier, 6, golden_video()[:1]), golden("model_classifier_small.npz"), "logits"
    )


@pytest.mark.parametrize(
    ("size", "teacher"), [("small", "large"), ("base", "base"), ("large", "large"), ("huge", "huge")]
)
def test_student(size, teacher, two_blocks):
    student = with_golden_weights(build_student(size, teacher=teacher))
    video, mask = golden_video()[:1], golden_mask()[:1]
    expected = reference.student(student.state_dict(), HEADS[size], DECODER_HEADS[size], video, mask)
    for ours, theirs in zip(student(video, mask), expected, strict=True):
        close(ours, theirs)


def test_large_image_teacher(two_blocks):
    teacher = with_golden_weights(build_image_teacher("large"))
    frame = golden_images(224)[:1]
    close(teacher(frame), reference.image_teacher(teacher.state_dict(), HEADS["large"], frame))


@pytest.mark.parametrize("size", ["large", "huge"])
def test_video_teacher(size, two_blocks):
    teacher = with_golden_weights(build_video_teacher(size))
    video = golden_video()[:1]
    close(teacher(video), reference.video_teacher(teacher.state_dict(), HEADS[size], video))


@pytest.mark.parametrize(("size", "classes"), [("base", 400), ("large", 174), ("huge", 400)])
def test_classifier(size, classes, two_blocks):
    classifier = with_golden_weights(build_classifier(size, num_classes=classes))
    video = golden_video()[:1]
    close(classifier(video), reference.classifier(classifier.state_dict(), HEADS[size], video))
