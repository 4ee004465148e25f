"""The fourteen rows, six teachers and the demo against the paper's and the official release's numbers."""

import importlib

import pytest

from experiments import all as all_rows
from experiments import demo, k400, ssv2
from launch.plan import build_graph
from mvd.batch import solve_batch
from mvd.config import Finetune, Pretrain, Row

BY_NAME: dict[str, Row] = {row.name: row for row in all_rows.rows}

# name: student, teacher, (top-1, top-5) on K400, on SSv2
ACCURACY = {
    "vits_from_vitb": ("small", "base", (80.6, 94.7), (70.7, 92.6)),
    "vits_from_vitl": ("small", "large", (81.0, 94.8), (70.9, 92.8)),
    "vitb_from_vitb": ("base", "base", (82.7, 95.4), (72.5, 93.6)),
    "vitb_from_vitl": ("base", "large", (83.4, 95.8), (73.7, 94.0)),
    "vitl": ("large", "large", (86.0, 96.9), (76.1, 95.4)),
    "vitl_e800": ("large", "large", (86.4, 97.0), (76.7, 95.5)),
    "vith": ("huge", "huge", (87.3, 97.4), (77.3, 95.7)),
}

# name: global batch, epochs, laid-out epochs, min lr, drop path, activation checkpointing, layout on 32 GPUs
PRETRAIN = {
    "vits_from_vitb": (1024, 400, 401, 1e-4, 0.1, False, "16 x 2 x 32 = 1024"),
    "vits_from_vitl": (1024, 400, 401, 1e-4, 0.1, False, "16 x 2 x 32 = 1024"),
    "vitb_from_vitb": (1024, 400, 401, 1e-4, 0.1, False, "16 x 2 x 32 = 1024"),
    "vitb_from_vitl": (1024, 400, 401, 1e-4, 0.1, False, "8 x 4 x 32 = 1024"),
    "vitl": (512, 400, 401, 1e-4, 0.1, False, "8 x 2 x 32 = 512"),
    "vitl_e800": (512, 800, 801, 1e-5, 0.1, False, "8 x 2 x 32 = 512"),
    "vith": (512, 800, 801, 1e-5, 0.2, True, "8 x 2 x 32 = 512"),
}

# name: epochs, base lr, min lr, official layout, GPUs, layer decay, drop path, head dropout, activation checkpointing
FINETUNE = {
    "vits_from_vitb_k400": (150, 5e-4, 1e-6, "12 x 2 x 16 = 384", 16, 0.75, 0.1, 0.0, False),
    "vits_from_vitl_k400": (150, 5e-4, 1e-6, "12 x 2 x 16 = 384", 16, 0.75, 0.1, 0.0, False),
    "vitb_from_vitb_k400": (75, 5e-4, 1e-6, "6 x 2 x 32 = 384", 32, 0.75, 0.1, 0.0, False),
    "vitb_from_vitl_k400": (75, 5e-4, 1e-6, "6 x 2 x 32 = 384", 32, 0.75, 0.1, 0.0, False),
    "vitl_k400": (50, 1e-3, 1e-6, "2 x 8 x 32 = 512", 32, 0.75, 0.3, 0.5, False),
    "vitl_e800_k400": (50, 1e-3, 1e-6, "16 x 1 x 32 = 512", 32, 0.75, 0.3, 0.5, True),
    "vith_k400": (50, 1e-3, 1e-6, "8 x 1 x 32 = 256", 32, 0.75, 0.3, 0.5, True),
    "vits_from_vitb_ssv2": (40, 1e-3, 1e-6, "12 x 1 x 32 = 384", 32, 0.7, 0.1, 0.0, False),
    "vits_from_vitl_ssv2": (40, 1e-3, 1e-6, "12 x 1 x 32 = 384", 32, 0.7, 0.1, 0.0, False),
    "vitb_from_vitb_ssv2": (30, 5e-4, 1e-6, "24 x 1 x 16 = 384", 16, 0.75, 0.1, 0.0, True),
    "vitb_from_vitl_ssv2": (30, 5e-4, 1e-6, "24 x 1 x 16 = 384", 16, 0.75, 0.1, 0.0, True),
    "vitl_ssv2": (30, 5e-4, 1e-6, "16 x 1 x 16 = 256", 16, 0.75, 0.3, 0.5, True),
    "vitl_e800_ssv2": (30, 5e-4, 1e-6, "16 x 1 x 16 = 256", 16, 0.75, 0.3, 0.5, True),
    "vith_ssv2": (30, 5e-4, 1e-5, "8 x 1 x 16 = 128", 16, 0.75, 0.3, 0.5, True),
}


def the(row: Row) -> tuple[Pretrain, Finetune]:
    assert row.pretrain is not None and row.finetune is not None
    return row.pretrain, row.finetune


def test_suites_hold_the_fourteen_rows():
    assert list(BY_NAME) == [f"{name}_{dataset}" for dataset in ("k400", "ssv2") for name in ACCURACY]
    assert all_rows.rows == k400.rows + ssv2.rows


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row_file_holds_the_row_of_its_name(name):
    assert importlib.import_module(f"experiments.{name}").row is BY_NAME[name]


@pytest.mark.parametrize("name", ACCURACY)
def test_both_rows_of_a_student(name):
    student, teacher, *accuracies = ACCURACY[name]
    for dataset, (top1, top5) in zip(("k400", "ssv2"), accuracies, strict=True):
        row = BY_NAME[f"{name}_{dataset}"]
        assert row.target.top1 == top1 and row.target.top5 == top5 and row.target.source == "paper"
        assert (row.pretrain.student, row.pretrain.teacher) == (student, teacher)
        assert (row.finetune.size, row.finetune.dataset) == (student, dataset)
        assert row.teachers == "checkpoint"
    assert BY_NAME[f"{name}_k400"].pretrain == BY_NAME[f"{name}_ssv2"].pretrain


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_recipe(name):
    recipe, _ = the(BY_NAME[f"{name}_k400"])
    o = recipe.optimization
    layout = str(solve_batch(recipe, 32))
    found = (o.global_batch, o.epochs, o.schedule_epochs, o.min_lr, recipe.drop_path, recipe.activation_checkpointing)
    assert (*found, layout) == PRETRAIN[name]
    assert (o.base_lr, o.warmup_epochs, o.betas, o.eps, o.weight_decay) == (1.5e-4, 40, (0.9, 0.95), 1e-8, 0.05)
    assert (recipe.dataset, recipe.mask_ratio, recipe.stride, o.layer_decay) == ("k400", 0.9, 4, None)


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_recipe(name):
    _, recipe = the(BY_NAME[name])
    o = recipe.optimization
    epochs, base_lr, min_lr, layout, gpus, *rest = FINETUNE[name]
    assert (o.epochs, o.laid_out_epochs, o.base_lr, o.min_lr) == (epochs, epochs, base_lr, min_lr)
    assert str(solve_batch(recipe, gpus)) == layout
    assert [o.layer_decay, recipe.drop_path, recipe.head_dropout, recipe.activation_checkpointing] == rest
    assert recipe.mixing.group == o.micro_batch == int(layout.split()[0])
    assert (o.warmup_epochs, o.betas, o.weight_decay) == (5, (0.9, 0.999), 0.05)


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_augmentation_and_test_views(name):
    row = BY_NAME[name]
    augmentation, mixing = row.finetune.augmentation, row.finetune.mixing
    on_k400 = name.endswith("k400")
    assert augmentation.flip == (0.5 if on_k400 else 0.0)
    assert (augmentation.auto, augmentation.erase, augmentation.samples) == ("rand-m7-n4-mstd0.5-inc1", 0.25, 2)
    assert (augmentation.crop_scale, augmentation.crop_ratio) == ((0.08, 1.0), (0.75, 1.3333))
    assert (mixing.mixup, mixing.cutmix, mixing.switch, mixing.smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert mixing.cutmix_axes == "official"
    assert (row.test.sampling, row.test.clips, row.test.crops) == (("dense", 5, 3) if on_k400 else ("segment", 2, 3))
    assert row.finetune.sampling == row.test.sampling and row.test.stride == 4


@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [("videomae_vitb", "base", 2048), ("videomae_vitl", "large", 512), ("videomae_vith", "huge", 1024)],
)
def test_video_teacher_recipe(name, size, batch):
    recipe = importlib.import_module(f"experiments.teachers.{name}").row.video_teacher
    o = recipe.optimization
    assert (recipe.name, recipe.size, recipe.dataset, recipe.mask_ratio) == (name, size, "k400", 0.9)
    assert (o.global_batch, o.epochs, o.schedule_epochs, o.warmup_epochs) == (batch, 1600, 1601, 40)
    assert (o.base_lr, o.min_lr, o.betas, o.weight_decay) == (1.5e-4, 1e-5, (0.9, 0.95), 0.05)


@pytest.mark.parametrize(("name", "size"), [("mae_vitb", "base"), ("mae_vitl", "large"), ("mae_vith", "huge")])
def test_image_teacher_recipe(name, size):
    recipe = importlib.import_module(f"experiments.teachers.{name}").row.image_teacher
    o = recipe.optimization
    assert (recipe.name, recipe.size, recipe.dataset, recipe.mask_ratio) == (name, size, "imagenet", 0.75)
    assert (recipe.crop_scale, recipe.flip) == ((0.2, 1.0), 0.5)
    assert (o.global_batch, o.epochs, o.laid_out_epochs, o.warmup_epochs) == (4096, 1600, 1600, 40)
    assert (o.base_lr, o.min_lr, o.betas, o.weight_decay) == (1.5e-4, 0.0, (0.9, 0.95), 0.05)


def test_a_row_and_its_teacher_files_name_the_same_stages():
    row = BY_NAME["vith_k400"]
    for name, role in (("mae_vith", "image_teacher"), ("videomae_vith", "video_teacher")):
        alone = importlib.import_module(f"experiments.teachers.{name}").row
        assert getattr(alone, role) == getattr(row, role)


def test_the_demo_differs_from_scratch_by_its_pretraining_alone():
    distilled, scratch = demo.rows
    assert distilled.finetune == scratch.finetune and distilled.test == scratch.test
    assert scratch.pretrain is None and distilled.teachers == "train"
    kinds = [node.kind for node in build_graph(demo.rows)]
    assert kinds == ["image_teacher", "video_teacher", "pretrain", "finetune", "finetune", "test", "test"]
    assert distilled.finetune.augmentation.flip == distilled.image_teacher.flip == 0  # a mirrored "left" is a "right"
