"""The networks of the rows that have no golden outputs against the plain ones of benchmarks/plain.py.

At full width and input size, cut to two blocks, or the tests would take minutes. That the other blocks are there,
test_official_keys.py shows, and that whole networks compute what they should, test_golden.py.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from benchmarks import plain
from mvd.config.sizes import SIZES
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from tests.official import golden_images, golden_mask, golden_video, with_golden_weights


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Keeps two blocks of every encoder and decoder, without gradients."""
    for name, size in SIZES.items():
        encoder, decoder = (dataclasses.replace(shape, depth=2) for shape in (size.encoder, size.decoder))
        monkeypatch.setitem(SIZES, name, dataclasses.replace(size, encoder=encoder, decoder=decoder))
    with torch.no_grad():
        yield


def with_weights_of(model: nn.Module, network: nn.Module) -> nn.Module:
    missing, unexpected = network.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all("pos_embed" in key for key in missing)
    return network


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert ours.std() > 1e-3


@pytest.mark.parametrize(
    ("size", "teacher"), [("small", "large"), ("base", "base"), ("large", "large"), ("huge", "huge")]
)
def test_student(size, teacher):
    student = with_golden_weights(build_student(size, teacher=teacher))
    video, mask = golden_video()[:1], golden_mask()[:1]
    expected = with_weights_of(student, plain.Student(SIZES[size], SIZES[teacher]))(video, mask)
    for ours, theirs in zip(student(video, mask), expected, strict=True):
        close(ours, theirs)


def test_large_image_teacher():
    teacher, frame = with_golden_weights(build_image_teacher("large")), golden_images(224)[:1]
    close(teacher(frame), with_weights_of(teacher, plain.ImageTeacher(SIZES["large"]))(frame))


@pytest.mark.parametrize("size", ["large", "huge"])
def test_video_teacher(size):
    teacher, video = with_golden_weights(build_video_teacher(size)), golden_video()[:1]
    close(teacher(video), with_weights_of(teacher, plain.VideoTeacher(SIZES[size]))(video))


@pytest.mark.parametrize(("size", "classes"), [("base", 400), ("large", 174), ("huge", 400)])
def test_classifier(size, classes):
    classifier, video = with_golden_weights(build_classifier(size, num_classes=classes)), golden_video()[:1]
    close(classifier(video), with_weights_of(classifier, plain.Classifier(SIZES[size], classes))(video))
