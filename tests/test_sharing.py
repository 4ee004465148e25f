"""Which pre-trainings of the paper's rows can share their teachers, what that saves, and how their updates align."""

import dataclasses
from collections.abc import Sequence

import pytest

from experiments import all as all_rows
from experiments import recipes
from launch.plan.graph import build_graph
from mvd.batch import Batch, solve_shared
from mvd.flops import saved_gpu_hours
from mvd.sharing import Alignment, Student, sharing_groups, teacher_samples, why_not

TRAIN_VIDEOS = 240_436
TEACHERS = {"image_teacher": "checkpoint:mae_vitl", "video_teacher": "checkpoint:videomae_vitl"}
FROM_L = (recipes.VITS_FROM_VITL, recipes.VITB_FROM_VITL, recipes.VITL_E400, recipes.VITL_E800)


def student(recipe, **settings) -> Student:
    return Student(recipe.name, dataclasses.replace(recipe, **settings), TEACHERS)


def names(groups: Sequence[Sequence[Student]]) -> list[list[str]]:
    return [[member.recipe.name for member in group] for group in groups]


def test_the_pretrainings_of_the_fourteen_rows_form_two_groups():
    nodes = [node for node in build_graph(all_rows.rows) if node.kind == "pretrain"]
    students = [Student(node.id, node.recipe, node.parents) for node in nodes]
    found = names(sharing_groups(students))
    assert sorted(map(sorted, found)) == [
        ["vitb_from_vitb_e400", "vits_from_vitb_e400"],
        ["vitb_from_vitl_e400", "vitl_from_vitl_e400", "vitl_from_vitl_e800", "vits_from_vitl_e400"],
    ]


@pytest.mark.parametrize(
    ("group", "hours"),
    [
        ((recipes.VITS_FROM_VITB, recipes.VITB_FROM_VITB), 171),
        (FROM_L[:2], 580),
        (FROM_L[2:], 581),
        (FROM_L, 1741),
        ((recipes.VITL_E800,), 0),
    ],
)
def test_shared_teachers_save_the_gpu_hours_of_all_passes_but_one(group, hours):
    assert round(saved_gpu_hours(group, 100)) == hours


def test_the_teachers_see_what_the_student_with_the_most_clips_sees():
    assert teacher_samples(FROM_L) == 800 * 469 * 512
    assert teacher_samples(FROM_L[:3]) == 400 * 469 * 512
    short = dataclasses.replace(recipes.VITL_E400.optimization, epochs=50, schedule_epochs=51)
    large = dataclasses.replace(recipes.VITL_E400, optimization=short)
    assert teacher_samples([large, recipes.VITS_FROM_VITL]) == 50 * 469 * 512 + 350 * 234 * 1024


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seed": 1}, "pretrain.seed differs (0 and 1)"),
        ({"stride": 2}, "pretrain.stride differs (4 and 2)"),
        ({"mask_ratio": 0.8}, "pretrain.mask_ratio differs (0.9 and 0.8)"),
        ({"teacher": "base"}, "pretrain.teacher differs (large and base)"),
        ({"dataset": "ssv2"}, "pretrain.dataset differs (k400 and ssv2)"),
    ],
)
def test_another_clip_mask_or_teacher_is_refused_with_the_reason(settings, reason):
    assert why_not(student(recipes.VITL_E400), student(recipes.VITL_E400, **settings)) == reason


def test_settings_of_the_student_alone_do_not_matter():
    other = student(recipes.VITS_FROM_VITL, drop_path=0.3, activation_checkpointing=True)
    assert why_not(student(recipes.VITL_E800), other) == ""


def test_other_teachers_and_batches_that_do_not_divide_are_refused():
    one = student(recipes.VITL_E400)
    other = one._replace(teachers=TEACHERS | {"video_teacher": "pretrained-1"})
    assert why_not(one, other) == "the video teacher differs (checkpoint:videomae_vitl and pretrained-1)"
    odd = student(recipes.VITL_E800, optimization=dataclasses.replace(recipes.VITL_E800.optimization, global_batch=768))
    assert "multiple of the smaller one (512 and 768)" in why_not(one, odd)
    larger = [
        student(recipes.VITL_E800, optimization=dataclasses.replace(recipes.VITL_E800.optimization, global_batch=batch))
        for batch in (1024, 1536)
    ]
    groups = sharing_groups([one, *larger])  # 1536 would be left with 1024 when 512 is complete
    assert [[s.recipe.optimization.global_batch for s in group] for group in groups] == [[512, 1024]]
    third = student(recipes.VITS_FROM_VITL)
    assert names(sharing_groups([odd, third, one])) == [["vits_from_vitl_e400", "vitl_from_vitl_e400"]]


def test_all_students_of_a_group_have_the_same_micro_batch():
    assert solve_shared(FROM_L, 32) == [Batch(8, 4, 32), Batch(8, 4, 32), Batch(8, 2, 32), Batch(8, 2, 32)]
    assert solve_shared(FROM_L[:2], 32, 4) == [Batch(4, 8, 32)] * 2


def test_epochs_of_different_numbers_of_updates_begin_with_the_same_unit():
    large, small = Alignment(TRAIN_VIDEOS, 512, 1024), Alignment(TRAIN_VIDEOS, 512, 512)
    assert (large.units, small.units) == (2, 1)
    assert [small.first_unit(update) for update in (0, 1, 468, 469)] == [0, 1, 468, 469]
    assert [large.first_unit(update) for update in (0, 1, 233, 234, 235)] == [0, 2, 466, 469, 471]
