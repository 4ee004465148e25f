"""The picture of what a row sees."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from launch.cluster import ROOT
from mvd import config
from mvd.config import ConfigError, Mixing
from mvd.config.run_settings import DatasetPaths
from mvd.config.sizes import SIZES
from mvd.data import inspect
from mvd.data.annotations import Entry, load_annotations
from mvd.data.loader import update_blocks
from mvd.data.on_device import normalise
from mvd.data.rng import epoch_order, mix_seed
from mvd.data.synthetic_motion import CLASSES
from mvd.models import build_student
from mvd.models.checkpoints import to_official
from tests.data.stages import PLAIN, recipe

SCRIPT = (str(ROOT / "launch" / "inspect_data.py"),)


@pytest.fixture
def entries(motion_root):
    return load_annotations(DatasetPaths(root=str(motion_root)), "train", 8)


def test_hidden_tokens_are_grey_and_the_others_as_they_are(entries):
    clip, seen = inspect.stage_strips(recipe("pretrain"), entries, "pyav", 1, 0)
    assert clip.frames.shape == seen.frames.shape == (8, 48, 48, 3)
    hidden = (seen.frames == inspect.HIDDEN).all(axis=-1)
    assert np.array_equal(seen.frames[~hidden], clip.frames[~hidden])
    patches = hidden.reshape(8, 4, 12, 4, 12).mean(axis=(2, 4))
    assert set(patches.flatten()) <= {0.0, 1.0} and (patches == patches[0]).all()
    assert (patches[0] == 1).sum() == 14 and "88 % is masked" in seen.title


def test_tokens_cover_their_tubelets():
    mask = torch.zeros(128, dtype=torch.bool)
    mask[1 * 16 + 2 * 4 + 3] = True  # second slice, third row, fourth column
    pixels = inspect.token_pixels(mask, SIZES["tiny"].clip)
    assert pixels.sum() == 2 * 12 * 12 and pixels[2:4, 24:36, 36:48].all()


def test_mixed_clips_carry_their_weights(entries):
    made = recipe("finetune", augmentation=PLAIN, mixing=Mixing(group=8, smoothing=0.0, cutmix=0.0))
    strips = list(inspect.stage_strips(made, entries, "pyav", 2, 0))
    assert len(strips) == 4 and all(" + " in strip.title for strip in strips)
    shares = [float(strip.title.split("target ")[1].split(" x")[0]) for strip in strips]
    assert shares == [shares[0]] * 4 and 0.5 <= shares[0] <= 1


def test_levels_survive_normalising():
    clip = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    shown = inspect.denormalised(normalise(clip[None])[0])
    assert np.array_equal(shown, clip.permute(1, 2, 3, 0).numpy())


def test_one_mixing_group_in_an_update_is_no_limit(entries):
    made = recipe("finetune", global_batch=8, augmentation=PLAIN, mixing=Mixing(group=8))
    assert len(list(inspect.stage_strips(made, entries, "pyav", 6, 0))) == 3 * 2 * 2  # pairs x videos x copies
    groups = [block.group for block in inspect.mixed_pairs(made, entries[:5], 4, 0)]
    assert groups == [0, 1, 2, 3], "a list shorter than a batch is repeated"


def test_the_pairs_are_those_of_training(entries):
    made = recipe("finetune", seed=3)
    order = epoch_order(3, 2, len(entries))
    pairs = inspect.mixed_pairs(made, entries, 3, 2)
    trained = [block for update in range(3) for block in update_blocks(made, order, update)]
    assert len(pairs) == 3 and all(pair in trained for pair in pairs)
    assert len({pair.group for pair in pairs}) == 3


def test_the_pairs_shown_are_of_two_classes_and_visibly_mixed():
    labels = [number // 250 for number in range(2000)]  # sorted by class, as many lists are
    made = recipe("finetune", mixing=Mixing(group=8, mixup=0.1, cutmix=0.0))  # nine of ten draws hardly mix
    for pair in inspect.mixed_pairs(made, [Entry(f"{n}.mp4", label) for n, label in enumerate(labels)], 4, 0):
        one, other = pair.samples
        draw = np.random.RandomState(mix_seed(0, 0, pair.group))
        draw.rand()  # whether to mix at all
        assert labels[one] != labels[other] and 0.15 < draw.beta(0.1, 0.1) < 0.85


def test_videos_are_of_different_classes_also_from_a_sorted_list():
    entries = [Entry(f"{n}.mp4", n // 10) for n in range(80)]
    assert inspect.of_different_classes(entries, 4) == [0, 20, 40, 60]
    assert len({entries[n].label for n in inspect.of_different_classes(entries, 8)}) == 8
    assert inspect.of_different_classes(entries, 10) == [0, 1, 10, 20, 30, 40, 41, 50, 60, 70]
    assert inspect.of_different_classes(entries[:3], 9) == [0, 1, 2]


def test_a_tests_strip_has_one_frame_of_each_view_and_the_class_name(entries):
    made = config.Test(size="tiny", dataset="motion", sampling="dense", stride=1, clips=5, crops=3)
    strips = list(inspect.stage_strips(made, entries, "pyav", 2, 0, list(CLASSES)))
    assert [strip.frames.shape for strip in strips] == [(15, 48, 48, 3)] * 2
    assert "left: the middle frame of each view" in strips[0].title and "clockwise" in strips[1].title


def test_a_mixed_clip_names_both_videos_and_classes(entries):
    made = recipe("finetune", augmentation=PLAIN, mixing=Mixing(group=8, smoothing=0.0))
    strips = list(inspect.stage_strips(made, entries, "pyav", 2, 0, list(CLASSES)))
    (pair,) = inspect.mixed_pairs(made, entries, 1, 0)
    first, last = (Path(entries[index].path).name for index in pair.samples)
    assert f"fine-tuning, {first} mixed with {last}; target " in strips[0].title
    assert f"fine-tuning, {last} mixed with {first}; target " in strips[-1].title
    assert all(CLASSES[entries[index].label] in strip.title for index in pair.samples for strip in strips)


def test_no_more_videos_than_there_are(entries):
    assert len(list(inspect.stage_strips(recipe("video_teacher"), entries[:3], "pyav", 10, 0))) == 2 * 3


def test_an_image_teachers_patches_are_hidden(entries):
    images, seen = inspect.stage_strips(recipe("image_teacher"), entries, "pyav", 4, 0)
    assert images.frames.shape == seen.frames.shape == (4, 48, 48, 3)
    hidden = (seen.frames == inspect.HIDDEN).all(axis=-1)
    assert hidden.reshape(4, 4, 12, 4, 12).all(axis=(2, 4)).sum() == 4 * 12 and "75 % is masked" in seen.title
    assert np.array_equal(seen.frames[~hidden], images.frames[~hidden])


def test_a_replaced_file_is_named(entries, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    clip, _ = inspect.stage_strips(recipe("pretrain"), [Entry(str(tmp_path / "broken.mp4"), 0), *entries], "pyav", 1, 0)
    assert "(instead of broken.mp4, which is unreadable)" in clip.title
    with pytest.raises(ConfigError, match="11 consecutive files cannot be read"):
        list(inspect.stage_strips(recipe("pretrain"), [Entry(str(tmp_path / "broken.mp4"), 0)], "pyav", 1, 0))


@pytest.fixture
def student(tmp_path) -> Path:
    """Weights that replace the pre-training, so that only the stages after it are drawn."""
    save_file(to_official(build_student("tiny", teacher="tiny")), tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


@pytest.fixture
def run_inspect(tmp_path, monkeypatch):
    """Runs the command in an empty folder, with a cluster profile of its own."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"runs: {tmp_path / 'runs'}\n")
    monkeypatch.setenv("MVD_CLUSTER", str(profile))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path.cwd()), *sys.path])))

    def run(*arguments: object, program: Sequence[str] = SCRIPT, **profile_fields: str):
        with profile.open("a") as handle:
            handle.writelines(f"{name}: {value}\n" for name, value in profile_fields.items())
        command = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    return run


def test_the_command_writes_a_picture_of_all_stages(motion_root, run_inspect, tmp_path):
    words = ("demo", "--data", motion_root, "--videos", "2", "--output", "seen.png")
    result = run_inspect(*words, program=("-m", "mvd.data.inspect"))
    assert result.returncode == 0, result.stderr
    assert "drawing demo, the first of 3 rows" in result.stdout
    with Image.open(tmp_path / "seen.png") as picture:
        strips = 2 + 4 + 4 + 2 + 2  # image teacher, video teacher, pre-training, a mixed pair, two videos of the test
        assert picture.height == strips * (inspect.LINE + 48 + inspect.GAP) + inspect.GAP
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_rows_settings_and_the_profile_are_the_launchers(motion_root, run_inspect, tmp_path):
    """A row file of one's own, overrides, and $MVD_CLUSTER's data set."""
    row = (
        "from experiments.demo import finetune\nfrom mvd.config import Row\nrow = Row(name='own', finetune=finetune)\n"
    )
    (tmp_path / "own.py").write_text(row)
    words = ["own.py", "finetune.augmentation.samples=3", "--videos", "2"]
    result = run_inspect(*words, datasets=f"{{motion: {{root: {motion_root}}}}}")
    assert result.returncode == 0, result.stderr
    assert "inspect.png: 6 strips" in result.stdout


def test_a_given_folder_keeps_the_profiles_lists(motion_root, run_inspect, tmp_path, student):
    lines = (motion_root / "train.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("".join(f"{motion_root}/{line}\n" for line in lines[:3]))
    words = [
        "demo",
        "--data",
        motion_root,
        "--videos",
        "9",
        f"pretrain.weights={student}",
        "finetune.augmentation.samples=1",
    ]
    result = run_inspect(*words, datasets=f"{{motion: {{root: nowhere, train: {tmp_path / 'few.csv'}}}}}")
    assert "finetune: the list holds 3 files; all of them are drawn" in result.stdout, result.stderr
    assert "inspect.png: 11 strips" in result.stdout  # a mixed pair, and nine videos; given weights end pre-training


def test_a_video_of_the_test_that_is_unreadable_is_the_error(motion_root, run_inspect, tmp_path, student):
    (tmp_path / "broken.mp4").write_text("no video")
    profile = f"{{motion: {{root: {motion_root}, test: {tmp_path / 'test.csv'}}}}}"
    (tmp_path / "test.csv").write_text(f"{tmp_path / 'broken.mp4'} 0\n")
    result = run_inspect("demo", f"pretrain.weights={student}", "--videos", "2", datasets=profile)
    assert result.returncode == 2 and re.search("error: test: .*broken.mp4 cannot be read", result.stderr)


def test_a_teachers_row_is_drawn(motion_root, run_inspect):
    fields = "{size: tiny, dataset: motion, stride: 1}"
    result = run_inspect("videomae_vitb", f"video_teacher={fields}", "--data", motion_root, "--videos", "3")
    assert result.returncode == 0 and "inspect.png: 6 strips" in result.stdout, result.stderr
    result = run_inspect("mae_vitb", "image_teacher={size: tiny, dataset: motion}", "--data", motion_root)
    assert result.returncode == 0 and "inspect.png: 2 strips" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_row"], "there is no row or suite 'no_such_row'"),
        (
            ["vitb_from_vitb_k400"],
            "must set datasets.k400.root: folder of the k400 videos .*or give --data FOLDER",
        ),
        (["vitb_from_vitb_k400", "--data", "nowhere"], "datasets.k400.root: .*/nowhere does not exist"),
        (["demo", "--data", "nowhere"], "nowhere: the motion data set is not there; generate it with"),
        (
            ["vitb_from_vitb_k400", "teachers=train", "--data", "."],
            "the row uses imagenet and k400; set cluster.datasets",
        ),
        (["mae_vitb", "teachers=checkpoint"], "mae_vitb has no stage to draw"),
        (["demo", "finetune.sed=1"], r"finetune has no key 'sed' \(nearest: seed"),
        (["demo", "--epoch", "-1"], "--epoch must be 0 or more, got -1"),
        (["demo", "--videos", "0"], "--videos must be at least 1, got 0"),
        (["demo", "--videos", "two"], "argument --videos: invalid int value: 'two'"),
        (["demo", "--output", "seen"], "--output must end in one of .png, .*got 'seen'"),
        (["demo", "--output", "none/seen.png"], "there is no folder .*none; create it first"),
    ],
)
def test_a_request_that_cannot_work_is_refused_in_one_sentence(arguments, message, run_inspect):
    result = run_inspect(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)


def test_a_missing_import_of_a_row_file_is_the_error(run_inspect, tmp_path):
    (tmp_path / "own.py").write_text("import no_such_module\n")
    assert "own.py, line 1: ModuleNotFoundError" in run_inspect("own.py").stderr
