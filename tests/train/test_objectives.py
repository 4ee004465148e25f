import math

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mvd.config.sizes import SIZES
from mvd.models import (
    build_image_autoencoder,
    build_image_teacher,
    build_student,
    build_video_autoencoder,
    build_video_teacher,
)
from mvd.train.objectives import distillation_loss, image_reconstruction_loss, video_reconstruction_loss
from tests.official import golden, golden_mask, golden_video, tube_mask, with_golden_weights

TINY = SIZES["tiny"]
SLICES, SIDE, POSITIONS, PATCH = TINY.clip.slices, TINY.clip.side, TINY.clip.positions, TINY.clip.patch_size
WIDTH = TINY.encoder.width
MASKED = round(0.9 * POSITIONS)
MASKED_PATCHES = round(0.75 * POSITIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_distillation_loss_and_gradients_are_the_official_ones():
    official = golden("precision_reference_fp64.json")["distill_fp64"]
    student = with_golden_weights(build_student("base", teacher="base"))
    video = golden_video()
    loss = distillation_loss(
        student,
        with_golden_weights(build_image_teacher("base")),
        with_golden_weights(build_video_teacher("base")),
        video,
        video,
        golden_mask(),
    )
    assert loss.total.item() == pytest.approx(official["loss"], rel=1e-6)
    assert loss.image.item() == pytest.approx(official["loss_img"], rel=1e-6)
    assert loss.video.item() == pytest.approx(official["loss_vid"], rel=1e-6)
    loss.total.backward()
    norms = {name: p.grad.double().norm().item() for name, p in student.named_parameters() if p.requires_grad}
    assert norms == pytest.approx(official["all_param_grad_norms"], rel=1e-4)
    assert math.hypot(*norms.values()) == pytest.approx(official["grad_norm_total"], rel=1e-5)
    parameters = dict(student.named_parameters())
    firsts = {field: value for field, value in golden("distill_targets_base.npz").items() if field.startswith("grad::")}
    assert len(firsts) == 19
    for field, first in firsts.items():
        gradient = parameters[field.removeprefix("grad::").removesuffix("_first64")].grad
        np.testing.assert_allclose(gradient.flatten()[:64], first, rtol=1e-4, atol=1e-5 * np.abs(first).max())
    wrong = golden("distill_loss_base_from_base.json")["alternatives_NOT_official"]
    assert len(wrong) == 4
    for value in wrong.values():  # typical mistakes are further away than rounding
        assert abs(value / loss.image.item() - 1) > 1e-5 and abs(value / loss.video.item() - 1) > 1e-5


def test_image_teacher_may_see_another_resolution_and_gets_the_first_frame_of_each_tubelet():
    student = build_student("tiny", teacher="tiny")
    seen = []

    def image_teacher(frames):
        seen.append(frames)
        return frames.mean(dim=(1, 2, 3)).view(-1, 1, 1).expand(-1, POSITIONS, WIDTH)

    video, mask = torch.randn(2, 3, 16, 48, 48), tube_mask(SLICES, POSITIONS, MASKED)
    image_video = torch.randn(2, 3, 16, 42, 42)
    loss = distillation_loss(student, image_teacher, build_video_teacher("tiny"), video, image_video, mask)
    assert torch.equal(seen[0].view(2, 8, 3, 42, 42), image_video[:, :, [0, 2, 4, 6, 8, 10, 12, 14]].transpose(1, 2))
    means = seen[0].mean(dim=(1, 2, 3)).view(2, 8)
    target = means.repeat_interleave(MASKED, dim=1)[:, :, None].expand(-1, -1, WIDTH)
    prediction = student(video, mask)[0]
    assert loss.image.item() == pytest.approx(torch.nn.functional.smooth_l1_loss(prediction, target).item(), rel=1e-5)


def test_teachers_get_no_gradient_and_losses_are_float32_under_autocast():
    student = build_student("tiny", teacher="tiny")
    image_teacher = build_image_teacher("tiny").requires_grad_(True)
    video, mask = torch.randn(2, 3, 16, 48, 48), tube_mask(SLICES, POSITIONS, MASKED)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, image_teacher, build_video_teacher("tiny"), video, video, mask)
    loss.total.backward()
    assert all(part.dtype == torch.float32 for part in loss)
    assert loss.total.item() == pytest.approx((loss.image + loss.video).item())
    assert all(parameter.grad is None for parameter in image_teacher.parameters())


def test_image_targets_are_normalised_pixels_of_the_masked_patches():
    images, mask = torch.randn(2, 3, 48, 48) * 3 + 1, tube_mask(1, POSITIONS, MASKED_PATCHES)
    patches = images.view(2, 3, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(2, POSITIONS, PATCH**2 * 3)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = target[mask].view(2, MASKED_PATCHES, PATCH**2 * 3)
    assert image_reconstruction_loss(lambda *_: perfect, images, mask).item() < 1e-10
    assert image_reconstruction_loss(lambda *_: perfect + 2, images, mask).item() == pytest.approx(4)


def test_video_targets_are_normalised_per_tubelet_and_channel():
    pixels, mask = torch.rand(2, 3, 16, 48, 48), tube_mask(SLICES, POSITIONS, MASKED)
    mean, deviation = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    tubelets = pixels.view(2, 3, SLICES, 2, SIDE, PATCH, SIDE, PATCH).permute(0, 2, 4, 6, 3, 5, 7, 1)
    tubelets = tubelets.reshape(2, TINY.clip.tokens, 2 * PATCH**2, 3)
    target = (tubelets - tubelets.mean(2, keepdim=True)) / (tubelets.std(2, keepdim=True) + 1e-6)
    perfect = target[mask].view(2, SLICES * MASKED, 2 * PATCH**2 * 3)
    video = (pixels - mean) / deviation
    assert video_reconstruction_loss(lambda *_: perfect, video, mask).item() < 1e-8
    assert video_reconstruction_loss(lambda *_: perfect - 2, video, mask).item() == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize(
    ("build", "loss", "slices"),
    [(build_image_autoencoder, image_reconstruction_loss, 1), (build_video_autoencoder, video_reconstruction_loss, 8)],
)
def test_autoencoders_learn_from_the_visible_tokens(build, loss, slices):
    """One sample gets brighter to the right, one downwards: without looking, the loss stays at 0.5."""
    ramp = torch.linspace(-2, 2, 48).expand(3, 48, 48)
    inputs = torch.stack([ramp, ramp.transpose(1, 2)])
    if slices > 1:
        inputs = inputs[:, :, None].expand(-1, -1, 2 * slices, -1, -1)
    model = build("tiny")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(30):
        value = loss(model, inputs, tube_mask(slices, POSITIONS, MASKED_PATCHES, seed=step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value.item() < 0.2
