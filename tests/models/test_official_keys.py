"""Names, shapes and numbers of parameters of every network of the rows, by the rule of the official lists."""

import pytest
import torch

from experiments import all as all_rows
from mvd.models import build_classifier, build_image_teacher, build_student, build_video_teacher
from tests.official import golden

# encoder width and depth, then those of the student's decoder
SIZES = {
    "small": (384, 12, 384, 2),
    "base": (768, 12, 768, 2),
    "large": (1024, 24, 512, 4),
    "huge": (1280, 32, 640, 8),
}
PAIRS = [("small", "base"), ("small", "large"), ("base", "base"), ("base", "large"), ("large",) * 2, ("huge",) * 2]
Keys = dict[str, list[int]]


def affine(name: str, out: int, *inputs: int) -> Keys:
    return {f"{name}.weight": [out, *inputs], f"{name}.bias": [out]}


def block(name: str, width: int, qkv_bias: bool) -> Keys:
    attention = {f"{name}.attn.qkv.weight": [3 * width, width]}
    if qkv_bias:
        attention |= {f"{name}.attn.qkv.bias": [3 * width]}
    else:
        attention = {f"{name}.attn.q_bias": [width], f"{name}.attn.v_bias": [width], **attention}
    return {
        **affine(f"{name}.norm1", width),
        **attention,
        **affine(f"{name}.attn.proj", width, width),
        **affine(f"{name}.norm2", width),
        **affine(f"{name}.mlp.fc1", 4 * width, width),
        **affine(f"{name}.mlp.fc2", width, 4 * width),
    }


def stack(prefix: str, width: int, depth: int, qkv_bias: bool = False) -> Keys:
    return {key: shape for i in range(depth) for key, shape in block(f"{prefix}blocks.{i}", width, qkv_bias).items()}


def student(size: str, teacher: str) -> Keys:
    width, depth, inner, decoder_depth = SIZES[size]
    keys = {"pos_embed": [1, 1568, width]}
    for branch in ("img", "vid"):
        keys |= {f"mask_token_{branch}": [1, 1, inner], f"pos_embed_{branch}": [1, 1568, inner]}
    keys |= affine("patch_embed.proj", width, 3, 2, 16, 16)
    keys |= stack("", width, depth) | affine("norm", width)
    for branch in ("img", "vid"):
        keys |= affine(f"down_{branch}", inner, width)
        keys |= stack(f"decoder_{branch}.", inner, decoder_depth)
        keys |= affine(f"decoder_{branch}.norm", inner)
        keys |= affine(f"decoder_{branch}.head", SIZES[teacher][0], inner)
    return keys


def image_teacher(size: str) -> Keys:
    width, depth, *_ = SIZES[size]
    patch = 14 if size == "huge" else 16
    keys = {"cls_token": [1, 1, width], "pos_embed": [1, 197, width]}
    keys |= affine("patch_embed.proj", width, 3, patch, patch)
    return keys | stack("", width, depth, qkv_bias=True) | affine("norm", width)


def video_teacher(size: str) -> Keys:
    width, depth, *_ = SIZES[size]
    keys = affine("encoder.patch_embed.proj", width, 3, 2, 16, 16)
    return keys | stack("encoder.", width, depth) | affine("encoder.norm", width)


def classifier(size: str, classes: int) -> Keys:
    width, depth, *_ = SIZES[size]
    keys = affine("patch_embed.proj", width, 3, 2, 16, 16) | stack("", width, depth)
    return keys | affine("fc_norm", width) | affine("head", classes, width)


NETWORKS = {
    **{f"student_{s}_from_{t}": (build_student, (s,), {"teacher": t}, student(s, t)) for s, t in PAIRS},
    **{f"image_teacher_{s}": (build_image_teacher, (s,), {}, image_teacher(s)) for s in ("base", "large", "huge")},
    **{f"video_teacher_{s}": (build_video_teacher, (s,), {}, video_teacher(s)) for s in ("base", "large", "huge")},
    **{
        f"classifier_{s}_{classes}": (build_classifier, (s,), {"num_classes": classes}, classifier(s, classes))
        for s in SIZES
        for classes in (400, 174)
    },
}


def test_these_are_the_networks_of_the_rows():
    assert {(row.pretrain.student, row.pretrain.teacher) for row in all_rows.rows} == set(PAIRS)
    assert {row.finetune.size for row in all_rows.rows} == set(SIZES)


@pytest.mark.parametrize(
    ("official", "network"),
    [
        ("student_small_from_base", "student_small_from_base"),
        ("student_base_from_large", "student_base_from_large"),
        ("student_huge_from_huge", "student_huge_from_huge"),
        ("image_teacher_base", "image_teacher_base"),
        ("image_teacher_huge", "image_teacher_huge"),
        ("video_teacher_base", "video_teacher_base"),
        ("classifier_small", "classifier_small_400"),
        ("classifier_large", "classifier_large_174"),
    ],
)
def test_the_rule_gives_the_official_lists(official, network):
    assert list(NETWORKS[network][3].items()) == list(golden(f"keys_{official}.json")["keys"].items())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_official_parameters(name):
    build, arguments, options, expected = NETWORKS[name]
    with torch.device("meta"):
        model = build(*arguments, **options)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    counted = {key: p.numel() for key, p in model.named_parameters()}
    assert counted == {key: torch.Size(shape).numel() for key, shape in expected.items()}
    tables = {key for key in expected if key.startswith("pos_embed")}
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == (set(expected) if "teacher" in name else tables)
