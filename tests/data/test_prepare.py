"""The preparation command on real files: counts, quarantine, resumption, shards, re-encoding."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.plan.rows import load_rows
from mvd.batch import solve_batch
from mvd.config import Dataset
from mvd.config.run_settings import DatasetPaths
from mvd.data.annotations import load_annotations
from mvd.data.prepare import cost
from mvd.data.prepare.checking import Job, is_done, target_of, work_on
from mvd.data.prepare.row_file import recipes_for, row_text
from mvd.data.prepare.transcode import check_video, reencode
from mvd.data.prepare.write_lists import write_lists
from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.packets import PacketVideo
from mvd.files import sha256
from mvd.flops import gpu_hours
from tests.data import torture
from tests.waiting import LIMIT


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two classes of three videos each, of which one is damaged, one is text and one has a rotation flag."""
    folder = tmp_path / "videos"
    for name, seed in (("a/1", 1), ("a/2", 2), ("a/3", 3), ("b/1", 4), ("b/2", 5), ("b/3", 6)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torture.write(folder / f"{name}.mp4", torture.moving_picture(40, 48, 64, seed), g="12")
    torture.damaged("slice", folder / "a/2.mp4", folder / "a/2.mp4")
    torture.damaged("text", folder / "a/3.mp4", folder / "a/3.mp4")
    torture.rotate(folder / "b/3.mp4", folder / "b/3.mp4", 1)
    return folder


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvd.data.prepare", *map(str, arguments), "--workers", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


def test_facts_of_a_video(videos):
    path = videos / "b" / "3.mp4"
    facts = check_video(path)
    assert facts.frames == 40 and facts.seconds == pytest.approx(40 / 25)
    assert (facts.width, facts.height, facts.codec) == (48, 64, "h264")  # as it is shown
    assert (facts.bytes, facts.sha256) == (path.stat().st_size, sha256(path))
    with pytest.raises(UnreadableVideo, match="a frame is damaged"):
        check_video(videos / "a" / "2.mp4")


def test_a_data_set_from_class_folders(videos, tmp_path):
    output = tmp_path / "out"
    result = prepare(videos, output)
    assert result.returncode == 0, result.stderr
    paths = DatasetPaths(root=str(output))
    entries = {split: load_annotations(paths, split, 2) for split in ("train", "val", "test")}
    assert entries["test"] == entries["val"]
    listed = entries["train"] + entries["val"]
    assert sorted((entry.path, entry.label) for entry in listed) == [
        (str(videos / name), label) for name, label in (("a/1.mp4", 0), ("b/1.mp4", 1), ("b/2.mp4", 1), ("b/3.mp4", 1))
    ]
    quarantine = [line.split("\t") for line in (output / "quarantine.tsv").read_text().splitlines()]
    assert sorted((name, reason) for _, name, reason in quarantine) == [
        ("a/2.mp4", "a frame is damaged"),
        ("a/3.mp4", "its header or index is missing or damaged"),
    ]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["classes"] == {"a": 0, "b": 1} and manifest["totals"]["frames"] == 4 * 40
    assert sum(split["broken"] for split in manifest["splits"].values()) == 2
    assert manifest["files"][str(videos / "a/1.mp4")]["sha256"] == sha256(videos / "a/1.mp4")


def test_nothing_is_checked_twice_unless_it_changed(videos, tmp_path):
    output = tmp_path / "out"
    assert prepare(videos, output).returncode == 0
    records = (output / "records.jsonl").read_text().splitlines()
    assert len(records) == 6
    (output / "records.jsonl").write_text("\n".join(records[:4]) + "\n" + records[4][:50])  # killed while writing
    torture.write(videos / "a" / "3.mp4", torture.moving_picture(20, 48, 64))
    assert prepare(videos, output).returncode == 0
    added = (output / "records.jsonl").read_text().splitlines()[5:]
    checked = {json.loads(line)["source"] for line in added if line}
    assert checked == {json.loads(line)["source"] for line in records[4:]} | {str(videos / "a/3.mp4")}
    assert "a/3.mp4" not in (output / "quarantine.tsv").read_text()


def test_shards_and_a_last_run_make_the_same_lists(videos, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert prepare(videos, whole).returncode == 0
    for number in range(2):
        result = prepare(videos, parts, "--shard", f"{number}/2")
        assert result.returncode == 0 and not (parts / "train.csv").exists()
    assert [len(path.read_text().splitlines()) for path in parts.glob("records-*.jsonl")] == [3, 3]
    result = prepare(videos, parts)
    assert result.returncode == 0 and (parts / "records.jsonl").read_text() == ""
    for name in ("train.csv", "val.csv", "quarantine.tsv"):
        assert (parts / name).read_text() == (whole / name).read_text()


def test_lists_missing_files_and_the_papers_counts(videos, tmp_path):
    classes = (("abseiling", "1x"), ("zumba", "2x"), ("zumba", "gone"))
    rows = "".join(f"{name},{stem},0,10,train\n" for name, stem in classes)
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n" + rows)
    (videos / "a" / "1.mp4").rename(videos / "a" / "1x_000000_000010.mp4")
    (videos / "b" / "2.mp4").rename(videos / "b" / "2x.mp4")
    output = tmp_path / "out"
    result = prepare(videos, output, "--dataset", "k400", "--train", tmp_path / "train.csv")
    assert result.returncode == 0, result.stderr
    assert "240,436" in result.stdout and "1 of them missing" in result.stdout
    assert (output / "quarantine.tsv").read_text() == "train\tgone_000000_000010\tno such file\n"
    assert (output / "train.csv").read_text().split() == [
        *(str(videos / "a" / "1x_000000_000010.mp4"), "0"),
        *(str(videos / "b" / "2x.mp4"), "399"),
    ]
    manifest = json.loads((output / "manifest.json").read_text())
    assert len(manifest["classes"]) == 400 and manifest["classes"]["zumba"] == 399
    split = manifest["splits"]["train"]
    assert split == {"listed": 3, "good": 2, "broken": 0, "missing": 1, "repeated": 0, "paper": 240_436}


def test_the_last_words_name_the_data_set(videos, tmp_path):
    printed = prepare(videos, tmp_path / "k400", "--val-share", "0").stdout
    assert f"datasets: {{my_k400: {{root: {tmp_path / 'k400'}}}}}" in printed
    assert "a row needs at least two for training and one for validation" in printed


def test_a_dry_run_writes_nothing(videos, tmp_path):
    result = prepare(videos, tmp_path / "out", "--dry-run")
    assert result.returncode == 0 and "6 videos are listed, 0 of them missing; 6 files to check" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none", "out"], "there is no folder .*none"),
        (["videos", "out", "--train", "none.csv"], "there is no list"),
        (["videos", "out", "--short-side", "0"], "--short-side must be at least 16 pixels, got 0"),
        (["videos", "out", "--short-side", "-5"], "--short-side must be at least 16 pixels, got -5"),
        (["videos", "out", "--val-share", "30"], "--val-share must be a fraction .*got 30"),
        (["videos", "out", "--val-share", "-1"], "--val-share must be a fraction .*got -1"),
        (["videos", "out", "--val-share", "1"], "--val-share must be a fraction from 0 to below 1, .*got 1"),
        (["videos", "out", "--val-share", "nan"], "--val-share must be a fraction .*got nan"),
        (["videos", "videos"], "OUTPUT must be another folder than VIDEOS"),
        (["videos", "out", "--labels", "labels.json"], "--labels belongs to lists"),
        (["videos", "out", "--dataset", "k400"], "the data set k400 has no class 'a'"),
        (["videos", "out", "--shard", "3/2"], "must be NUMBER/COUNT .*got '3/2'"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(arguments, message, videos, tmp_path):
    result = prepare(*(tmp_path / word if word in ("none", "videos", "out") else word for word in arguments))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr)


def test_re_encoding_keeps_pictures_times_and_frames(videos, tmp_path):
    source = torture.write(
        tmp_path / "irregular.mp4",
        torture.moving_picture(30, 96, 128),
        times=[i * 40 + 20 * (i % 2) for i in range(30)],
    )
    reencode(source, tmp_path / "small.mp4", 48)
    before, after = check_video(source), check_video(tmp_path / "small.mp4")
    assert (after.width, after.height, after.frames) == (64, 48, 30)
    assert after.seconds == pytest.approx(before.seconds, abs=0.01)
    every = np.arange(30)
    shrunk = PacketVideo(str(source)).frames(every).reshape(30, 48, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(PacketVideo(str(tmp_path / "small.mp4")).frames(every) - shrunk).mean() < 9


def test_re_encoding_turns_upright_and_never_enlarges(videos, tmp_path):
    reencode(videos / "b" / "3.mp4", tmp_path / "upright.mp4", 320)
    facts = check_video(tmp_path / "upright.mp4")
    assert (facts.width, facts.height) == (48, 64)
    files = videos / "b/3.mp4", tmp_path / "upright.mp4"
    turned, upright = (PacketVideo(str(path)).frames(np.array([5])) for path in files)
    assert np.abs(turned.astype(int) - upright).mean() < 8


def test_a_re_encoded_data_set(videos, tmp_path):
    output = tmp_path / "out"
    result = prepare(videos, output, "--short-side", 32, "--val-share", 0)
    assert result.returncode == 0, result.stderr
    entries = load_annotations(DatasetPaths(root=str(output)), "train", 2)
    assert {Path(entry.path).relative_to(output).parts[0] for entry in entries} == {"videos"}
    assert {min(PacketVideo(entry.path).frames(np.array([0])).shape[1:3]) for entry in entries} == {32}
    assert not list(output.rglob("*.tmp"))


def test_a_folder_with_everything_that_goes_wrong_ends_with_a_table(videos, tmp_path):
    long = "x" * 246 + ".mp4"
    (videos / "a" / "1.mp4").rename(videos / "a" / long)
    shutil.copy(videos / "b" / "1.mp4", videos / "b" / "two\nlines.mp4")
    shutil.copy(videos / "b" / "1.mp4", os.fsencode(videos / "b") + b"/caf\xe9.mp4")
    shutil.copy(videos / "b" / "1.mp4", videos / "b" / "u\u2028.mp4")
    shutil.copy(videos / "b" / "1.mp4", videos / "loose.mp4")
    (videos / "b" / "gone.mp4").symlink_to("nowhere.mp4")
    (videos / "b" / "notes.txt").touch()
    (videos / "b" / "up").symlink_to(videos)
    output = videos / "out"
    for _ in range(2):  # the second run finds the output inside of the videos' folder
        result = prepare(videos, output, "--short-side", "32", "--val-share", "0")
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        reasons = re.findall(r"^│ (broken|missing) +│ +(\d+) │ (.*?) +│ (.*?) +│$", result.stdout, flags=re.MULTILINE)
        assert sorted(reasons) == [
            ("broken", "1", "a frame is damaged", "a/2.mp4"),
            ("broken", "1", "a link to a file that does not exist", "b/gone.mp4"),
            ("broken", "1", "its header or index is missing or damaged", "a/3.mp4"),
            ("broken", "1", "its path contains a line break; rename it", r"b/two\nlines.mp4"),
            ("broken", "1", "its path is not valid UTF-8; rename it", r"b/caf\udce9.mp4"),
        ]
        assert "10 videos are listed, 0 of them missing, 3 unusable; 7 files to check" in result.stdout
        assert "1 x .txt files" in result.stdout and "1 x videos outside of class folders" in result.stdout
    entries = load_annotations(DatasetPaths(root=str(output)), "train", 2)
    assert sorted(Path(entry.path).name for entry in entries)[:4] == [
        "1.mp4.mp4",
        "2.mp4.mp4",
        "3.mp4.mp4",
        "u\u2028.mp4.mp4",
    ]
    assert len(entries) == 5 and all(Path(entry.path).is_file() for entry in entries)
    assert len((output / "quarantine.tsv").read_text().splitlines()) == 5


def test_a_file_that_is_gone_leaves_the_manifest(videos, tmp_path):
    output = tmp_path / "out"
    assert prepare(videos, output).returncode == 0
    (videos / "b" / "1.mp4").unlink()
    assert prepare(videos, output).returncode == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert sorted(Path(name).name for name in manifest["files"]) == ["1.mp4", "2.mp4", "3.mp4"]
    assert manifest["totals"]["frames"] == 3 * 40


def test_passing_trouble_is_recorded_for_one_run_only(videos, tmp_path):
    """Too many open files stands for a full disk, a missing permission, a time-out: no verdict on the content."""
    job = Job(videos / "a" / "1.mp4", tmp_path / "copy.mp4", None)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        record = work_on(job)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert record.reason == "Too many open files" and record.temporary and not is_done(job, record)
    again = work_on(job)
    assert again.path == str(job.source) and is_done(job, again)
    broken = Job(videos / "a" / "2.mp4", tmp_path / "copy.mp4", None)
    record = work_on(broken)
    assert record.reason == "a frame is damaged" and not record.temporary and is_done(broken, record)


def test_a_copy_that_cannot_be_written_says_nothing_about_its_source(videos, tmp_path):
    (tmp_path / "file").touch()
    job = Job(videos / "a" / "1.mp4", tmp_path / "file" / "copy.mp4", 32)
    record = work_on(job)
    assert record.reason is not None and record.temporary and not is_done(job, record)
    gone = work_on(Job(videos / "a" / "gone.mp4", tmp_path / "copy.mp4", None))
    assert gone.reason == "No such file or directory" and gone.temporary


def test_copies_of_different_files_have_different_places(tmp_path):
    names = ["a/1.mp4", "a/1.avi", "b/1.mp4", f"a/{'x' * 240}1.mp4", f"a/{'x' * 240}2.mp4"]
    paths = [*(tmp_path / name for name in names), Path("/other/1.mp4"), Path("/another/1.mp4")]
    targets = [target_of(path, tmp_path, tmp_path / "out") for path in paths]
    assert len(set(targets)) == len(paths) and max(len(target.name) for target in targets) < 230


def test_the_same_file_twice_in_a_list(videos, tmp_path):
    (tmp_path / "train.csv").write_text("a/1.mp4 0\nb/1.mp4 1\na/1.mp4 0\na/1.mp4 1\n")
    output = tmp_path / "out"
    assert prepare(videos, output, "--train", tmp_path / "train.csv").returncode == 0
    assert [line.split("\t")[2] for line in (output / "quarantine.tsv").read_text().splitlines()] == [
        "its file is in the list already",
        "its file is in the list already with another class",
    ]
    assert len(load_annotations(DatasetPaths(root=str(output)), "train", 2)) == 2


def test_ucf101s_lists(videos, tmp_path):
    (tmp_path / "trainlist01.txt").write_text("a/1.mp4 1\r\nb/1.mp4 2\r\n")
    (tmp_path / "testlist01.txt").write_text("b/2.mp4\r\n")
    output = tmp_path / "out"
    lists = ("--train", tmp_path / "trainlist01.txt", "--val", tmp_path / "testlist01.txt")
    result = prepare(videos, output, *lists)
    assert result.returncode == 0 and "labels run from 1 to 2, as UCF101's do" in result.stdout, result.stderr
    assert "Dataset(classes=2, train_samples=2, val_samples=1)" in (output / "out.py").read_text()
    assert (output / "test.csv").read_text() == f"{videos}/b/2.mp4 1\n"


def test_another_data_set_is_never_overwritten(videos, tmp_path):
    output = tmp_path / "out"
    assert prepare(videos, output).returncode == 0
    before = (output / "train.csv").read_text()
    shutil.copytree(videos, tmp_path / "others")
    (tmp_path / "train.csv").write_text("a/1.mp4 0\nb/1.mp4 1\n")
    for arguments, message in (
        (
            (tmp_path / "others",),
            f"holds a data set with videos={videos}, but this command has videos={tmp_path}/others",
        ),
        ((videos, "--val-share", "0.5"), "with val_share=0.1, but this command has val_share=0.5; choose another"),
        ((videos, "--train", tmp_path / "train.csv"), "with train=None, but this command has train=/"),
    ):
        refused = prepare(arguments[0], output, *arguments[1:])
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert (output / "train.csv").read_text() == before
    (output / "manifest.json").unlink()  # as the message says
    assert prepare(videos, output, "--val-share", "0.5").returncode == 0
    assert (output / "train.csv").read_text() != before
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.csv").write_text("x.mp4 0\n")
    refused = prepare(videos, own)
    assert refused.returncode == 2 and f"{own}/train.csv is not from this command" in refused.stderr
    assert [path.name for path in own.iterdir()] == ["train.csv"]


def test_a_row_file_is_written_once(class_folders, tmp_path):
    output = tmp_path / "my-set"
    result = prepare(class_folders, output)
    file = output / "my-set.py"
    assert result.returncode == 0 and f"row file: {file}\n" in result.stdout, result.stderr
    assert (
        "ViT-S, 100 epochs and test, without decoding: about " in result.stdout and "-m launch.submit" in result.stdout
    )
    (row,) = load_rows([str(file)], [])
    assert row.finetune.own_dataset == row.test.own_dataset == Dataset(classes=3, train_samples=21, val_samples=3)
    settings = row.finetune.optimization
    assert (settings.global_batch, row.finetune.mixing.group, row.finetune.stride) == (4, 4, 1)
    assert settings.warmup_epochs < settings.epochs / 10
    assert row.pretrain == load_rows(["vits_from_vitl_k400"], [])[0].pretrain
    assert (
        "pretrain.weights=student.pth --local" in result.stdout and "starts from a distilled student" in result.stdout
    )
    file.write_text(file.read_text() + "# mine\n")
    again = prepare(class_folders, output)
    assert "(there already, left as it is)" in again.stdout and file.read_text().endswith("# mine\n")
    assert "the videos have changed" not in again.stdout
    assert "24 of 24 were checked by an earlier call" in again.stdout
    first = min(class_folders.glob("*/*.mp4"))
    shutil.copy(first, first.with_name("another.mp4"))
    assert re.search(
        r"the videos have changed: set (train|val)_samples=\d+ in the row file", prepare(class_folders, output).stdout
    )


@pytest.mark.parametrize("train", [2, 3, 21, 400, 30_000])
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_row_files_fit_the_number_of_videos(size, train, tmp_path):
    facts = Dataset(classes=2, train_samples=train, val_samples=1)
    finetune, test = recipes_for("mine", facts, size, 300)
    file = tmp_path / f"row_{size}_{train}.py"
    file.write_text(row_text("mine", finetune, test, Path('/data/a "b" \\n')))
    (row,) = load_rows([str(file)], [])
    assert (row.finetune, row.test, row.name) == (finetune, test, "mine")
    batch = finetune.optimization.global_batch
    assert 2 <= batch <= max(2, train // 4) and finetune.stride == 4
    peak = 3e-3 if size == "tiny" else 7.5e-4 * math.sqrt(batch / 384)  # of the paper's batch on Kinetics-400
    assert finetune.optimization.peak_lr == pytest.approx(peak, rel=0.05)
    assert str(solve_batch(finetune, 1)).endswith(f"= {batch}")
    assert max(map(len, file.read_text().splitlines())) <= 120


def test_a_test_list_is_kept_and_without_one_the_validation_videos_are_tested(tmp_path):
    good = {"test": {"/videos/t.mp4": 0}, "train": {"/videos/1.mp4": 0}, "val": {"/videos/v.mp4": 1}}
    write_lists(good, [], tmp_path)
    assert (tmp_path / "test.csv").read_text() == "/videos/t.mp4 0\n"
    write_lists({"val": good["val"]}, [], tmp_path)
    assert (tmp_path / "test.csv").read_text() == "/videos/v.mp4 1\n"


def test_the_cost_of_a_row_is_that_of_its_training_and_its_test(monkeypatch):
    facts = Dataset(classes=2, train_samples=100, val_samples=50_000)
    recipes = recipes_for("mine", facts, "small", 300)
    hours = sum(gpu_hours(recipe, cost.GPU_TFLOPS) for recipe in recipes)
    for gpus in (1, 2):
        monkeypatch.setattr(cost, "count_gpus", lambda gpus=gpus: gpus)
        assert f"about {cost.duration(3600 * hours / gpus)} on this machine" in cost.describe_cost(*recipes)


def test_hmdb51s_folder_of_lists(videos, tmp_path):
    lists = tmp_path / "splits"
    lists.mkdir()
    (videos / "a").rename(videos / "brush_hair")
    (videos / "b").rename(videos / "wave")
    for name, numbers in (("brush_hair", "120"), ("wave", "122")):
        lines = "".join(f"{place}.mp4 {number} \n" for place, number in enumerate(numbers, start=1))
        (lists / f"{name}_test_split2.txt").write_text(lines)
    words = ("--train", lists, "--dataset")
    result = prepare(videos, tmp_path / "out", *words, "hmdb51_split2")
    assert result.returncode == 0 and "3,570" in result.stdout and "1,530" in result.stdout, result.stderr
    assert "mvd.data.inspect hmdb51\n" in result.stdout and not list((tmp_path / "out").glob("*.py"))
    found = load_annotations(DatasetPaths(root=str(tmp_path / "out")), "train", 51)
    assert found == [(str(videos / "brush_hair/1.mp4"), 0), (str(videos / "wave/1.mp4"), 50)]
    assert [entry.label for entry in load_annotations(DatasetPaths(root=str(tmp_path / "out")), "test", 51)] == [50, 50]
    for dataset, message in (
        ("hmdb51", "has no file *_test_split1.txt"),
        ("ucf101", "for HMDB51's folder of lists"),
    ):
        refused = prepare(videos, tmp_path / "other", *words, dataset)
        assert refused.returncode == 2 and message in refused.stderr
