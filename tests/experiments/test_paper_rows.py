"""The fourteen rows, six teachers and the demo against the paper's and the official release's numbers."""

import dataclasses
import importlib

import pytest

from experiments import all as all_rows
from experiments import demo, k400, ssv2
from launch.cluster import Cluster
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from launch.plan.together import form_groups
from mvd.batch import solve_batch
from mvd.config import DATASETS, Row
from mvd.config.sizes import SIZES

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


# size: width, depth, heads of the encoder; width, depth, heads of a student's decoder
GEOMETRY = {
    "small": (384, 12, 6, 384, 2, 6),
    "base": (768, 12, 12, 768, 2, 12),
    "large": (1024, 24, 16, 512, 4, 8),
    "huge": (1280, 32, 16, 640, 8, 8),
}
CLASSES = {"k400": 400, "ssv2": 174}


def expected_pretrain(name: str) -> dict:
    """Every field of a pre-training."""
    batch, epochs, laid_out, min_lr, drop_path, checkpointing, layout = PRETRAIN[name]
    return {
        "student": ACCURACY[name][0],
        "teacher": ACCURACY[name][1],
        "dataset": "k400",
        "own_dataset": None,
        "mask_ratio": 0.9,
        "stride": 4,
        "drop_path": drop_path,
        "optimization": {
            "global_batch": batch,
            "epochs": epochs,
            "schedule_epochs": laid_out,
            "warmup_epochs": 40,
            "base_lr": 1.5e-4,
            "min_lr": min_lr,
            "betas": (0.9, 0.95),
            "weight_decay": 0.05,
            "eps": 1e-8,
            "layer_decay": None,
            "micro_batch": int(layout.split()[0]),
        },
        "seed": 0,
        "weights": None,
        "activation_checkpointing": checkpointing,
    }


def expected_finetune(name: str, size: str, dataset: str) -> dict:
    """Every field of a fine-tuning."""
    epochs, base_lr, min_lr, layout, _, layer_decay, drop_path, dropout, checkpointing = FINETUNE[name]
    group = int(layout.split()[0])
    return {
        "size": size,
        "dataset": dataset,
        "own_dataset": None,
        "sampling": "dense" if dataset == "k400" else "segment",
        "stride": 4,
        "drop_path": drop_path,
        "head_dropout": dropout,
        "augmentation": {
            "auto": "rand-m7-n4-mstd0.5-inc1",
            "crop_scale": (0.08, 1.0),
            "crop_ratio": (0.75, 1.3333),
            "flip": 0.5 if dataset == "k400" else 0.0,
            "erase": 0.25,
            "samples": 2,
        },
        "mixing": {
            "mixup": 0.8,
            "cutmix": 1.0,
            "switch": 0.5,
            "smoothing": 0.1,
            "group": group,
            "cutmix_axes": "official",
        },
        "optimization": {
            "global_batch": int(layout.split()[-1]),
            "epochs": epochs,
            "schedule_epochs": None,
            "warmup_epochs": 5,
            "base_lr": base_lr,
            "min_lr": min_lr,
            "betas": (0.9, 0.999),
            "weight_decay": 0.05,
            "eps": 1e-8,
            "layer_decay": layer_decay,
            "micro_batch": group,
        },
        "seed": 0,
        "weights": None,
        "activation_checkpointing": checkpointing,
    }


def expected_test(size: str, dataset: str) -> dict:
    """Every field of a test."""
    sampling, clips = ("dense", 5) if dataset == "k400" else ("segment", 2)
    views = {"sampling": sampling, "stride": 4, "clips": clips, "crops": 3}
    return {"size": size, "dataset": dataset, "own_dataset": None, **views}


def test_suites_hold_the_fourteen_rows():
    assert list(BY_NAME) == [f"{name}_{dataset}" for dataset in ("k400", "ssv2") for name in ACCURACY]
    assert all_rows.rows == k400.rows + ssv2.rows


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row_file_holds_the_row_of_its_name(name):
    assert importlib.import_module(f"experiments.{name}").row is BY_NAME[name]


@pytest.mark.parametrize("dataset", ["k400", "ssv2"])
@pytest.mark.parametrize("student", ACCURACY)
def test_every_field_of_a_resolved_row(student, dataset):
    """As the launcher resolves it from its name, without overrides."""
    (row,) = load_rows([f"experiments/{student}_{dataset}"], [])
    size, teacher, on_k400, on_ssv2 = ACCURACY[student]
    top1, top5 = on_k400 if dataset == "k400" else on_ssv2
    found = dataclasses.asdict(row)
    teachers = {role: found.pop(role) for role in ("image_teacher", "video_teacher")}
    assert found == {
        "name": f"{student}_{dataset}",
        "teachers": "checkpoint",
        "pretrain": expected_pretrain(student),
        "finetune": expected_finetune(row.name, size, dataset),
        "test": expected_test(size, dataset),
        "target": {"top1": top1, "top5": top5, "source": "paper"},
    }
    assert {role: recipe["size"] for role, recipe in teachers.items()} == dict.fromkeys(teachers, teacher)


def test_the_students_of_both_data_sets_share_one_pretraining():
    graph = build_graph(all_rows.rows)
    kinds = [node.kind for node in graph]
    assert (kinds.count("pretrain"), kinds.count("finetune"), kinds.count("test")) == (7, 14, 14)
    for node in (node for node in graph if node.kind == "pretrain"):
        assert len(node.rows) == 2 and node.rows[0].removesuffix("_k400") == node.rows[1].removesuffix("_ssv2")


@pytest.mark.parametrize("name", PRETRAIN)
def test_the_official_gpus_get_the_official_batches_in_pretraining(name):
    assert str(solve_batch(BY_NAME[f"{name}_k400"].pretrain, 32)) == PRETRAIN[name][-1]


@pytest.mark.parametrize("name", FINETUNE)
def test_the_official_gpus_get_the_official_batches_in_finetuning(name):
    layout, gpus = FINETUNE[name][3:5]
    assert str(solve_batch(BY_NAME[name].finetune, gpus)) == layout


def test_the_paper_s_sizes():
    for name, (width, depth, heads, *decoder) in GEOMETRY.items():
        size = SIZES[name]
        assert (size.encoder.width, size.encoder.depth, size.encoder.heads) == (width, depth, heads)
        assert [size.decoder.width, size.decoder.depth, size.decoder.heads] == decoder
        assert (size.clip.frames, size.clip.image_size, size.clip.tubelet, size.clip.patch_size) == (16, 224, 2, 16)
        assert (size.clip.slices, size.clip.side, size.clip.tokens) == (8, 14, 1568)
        assert (size.image.image_size, size.image.patch_size) == ((196, 14) if name == "huge" else (224, 16))
        assert size.image.positions == size.clip.positions == 196


def test_the_paper_s_data_sets():
    for name, videos in {"k400": 240_436, "ssv2": 168_913}.items():
        assert (DATASETS[name].classes, DATASETS[name].train_samples) == (CLASSES[name], videos)


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
    distilled, scratch, _ = demo.rows
    assert distilled.finetune == scratch.finetune and distilled.test == scratch.test
    assert scratch.pretrain is None and distilled.teachers == "train"
    kinds = [node.kind for node in build_graph(demo.rows[:2])]
    assert kinds == ["image_teacher", "video_teacher", "pretrain", "finetune", "finetune", "test", "test"]
    assert distilled.finetune.augmentation.flip == distilled.image_teacher.flip == 0  # a mirrored "left" is a "right"


def test_the_demos_two_students_share_their_teachers():
    nodes = build_graph(demo.rows)
    students = [node.id for node in nodes if node.kind == "pretrain"]
    assert form_groups(nodes, Cluster(), []) == [students] and len(students) == 2
