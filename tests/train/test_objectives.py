import dataclasses
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
from mvd.train import tasks
from mvd.train.objectives import (
    distillation_loss,
    distillation_targets,
    feature_loss,
    image_reconstruction_loss,
    video_reconstruction_loss,
)
from tests.official import golden, golden_mask, golden_video, tube_mask, with_golden_weights
from tests.runs import small_stage

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
    """One sample gets brighter to the right, one downwards: without the visible tokens, the loss stays at 0.5."""
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


def test_targets_and_loss_apart_give_the_distillation_loss():
    student, image_teacher, video_teacher = build_student("tiny", teacher="tiny"), *tiny_teachers("tiny")
    video, mask = torch.randn(2, 3, 16, 48, 48), tube_mask(SLICES, POSITIONS, MASKED)
    targets = distillation_targets(image_teacher, video_teacher, video, video, mask, SLICES * MASKED)
    assert targets.image.shape == targets.video.shape == (2, SLICES * MASKED, WIDTH)
    apart = feature_loss(student(video, mask), targets)
    together = distillation_loss(student, image_teacher, video_teacher, video, video, mask)
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


@pytest.fixture(params=[1, 4])
def other_tubelet(request, monkeypatch) -> int:
    """The size "other" is the tiny one with tubelets of another number of frames than 2."""
    clip = dataclasses.replace(TINY.clip, tubelet=request.param)
    monkeypatch.setitem(SIZES, "other", dataclasses.replace(TINY, clip=clip))
    return request.param


def tiny_teachers(size: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_image_teacher(size), build_video_teacher(size)


def test_distillation_with_another_tubelet_is_that_of_a_plain_computation(other_tubelet):
    slices = 16 // other_tubelet
    student, (image_teacher, video_teacher) = build_student("other", teacher="other"), tiny_teachers("other")
    video, image_video = torch.randn(2, 3, 16, 48, 48), torch.randn(2, 3, 16, 48, 48)
    mask = tube_mask(slices, POSITIONS, MASKED)
    loss = distillation_loss(student, image_teacher, video_teacher, video, image_video, mask, tubelet=other_tubelet)
    firsts = [image_teacher(image_video[:, :, index]) for index in range(0, 16, other_tubelet)]
    image_features, video_features = torch.cat(firsts, dim=1), video_teacher(video)
    predicted_image, predicted_video = student(video, mask)
    for part, predicted, features in (
        (loss.image, predicted_image, image_features),
        (loss.video, predicted_video, video_features),
    ):
        expected = torch.nn.functional.smooth_l1_loss(predicted, features[mask].view_as(predicted))
        assert part.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_stage_takes_the_tubelet_of_its_size(other_tubelet, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "load_weights", lambda *_: None)
    inputs = {"image_teacher": "", "video_teacher": ""}
    stage = small_stage("pretrain", "other", tmp_path, tmp_path, inputs, student="other", teacher="other")
    task = tasks.build_task(stage, 8, torch.device("cpu"))
    mask = tube_mask(16 // other_tubelet, POSITIONS, MASKED)
    video = torch.randn(2, 3, 16, 48, 48)
    expected = distillation_loss(task.model, *task.teachers, video, video, mask, tubelet=other_tubelet)
    losses = task.losses(task.model, {"video": video, "mask": mask})
    assert [losses[name].item() for name in ("loss", "image_loss", "video_loss")] == [part.item() for part in expected]
    teacher_stage = small_stage("video_teacher", "other", tmp_path, tmp_path, size="other")
    teacher_task = tasks.build_task(teacher_stage, 8, torch.device("cpu"))
    assert teacher_task.losses(teacher_task.model, {"video": video, "mask": mask})["loss"] > 0


def test_distillation_with_the_wrong_tubelet_is_refused(other_tubelet):
    mask = tube_mask(16 // other_tubelet, POSITIONS, MASKED)
    video = torch.randn(2, 3, 16, 48, 48)
    with pytest.raises(ValueError, match="mask and teachers must have the same tokens.*check tubelet=2"):
        distillation_loss(build_student("other", teacher="other"), *tiny_teachers("other"), video, video, mask)


def test_video_targets_of_another_tubelet_are_those_of_a_plain_computation(other_tubelet):
    slices = 16 // other_tubelet
    pixels, mask = torch.rand(2, 3, 16, 48, 48), tube_mask(slices, POSITIONS, MASKED)
    mean, deviation = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    rows = []
    for place in mask[0].nonzero().flatten().tolist():  # the tubelets of the first clip, one by one
        t, position = divmod(place, POSITIONS)
        y, x = (PATCH * n for n in divmod(position, SIDE))
        tubelet = pixels[0, :, t * other_tubelet : (t + 1) * other_tubelet, y : y + PATCH, x : x + PATCH]
        values = tubelet.permute(1, 2, 3, 0).reshape(-1, 3)
        rows.append(((values - values.mean(0)) / (values.std(0) + 1e-6)).flatten())
    perfect = torch.stack(rows)[None]
    video = ((pixels - mean) / deviation)[:1]
    loss = video_reconstruction_loss(lambda *_: perfect, video, mask[:1], tubelet=other_tubelet)
    assert loss.item() < 1e-8
    with pytest.raises(ValueError, match="the network must predict .* values per token.*check tubelet=2"):
        video_reconstruction_loss(build_video_autoencoder("other"), video, mask[:1])
