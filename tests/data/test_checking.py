"""The verdict on each file: what a library raises is that file's fault, and passing trouble is no verdict."""

import dataclasses
from pathlib import Path

import av
import pytest

from mvd.data.prepare import checking
from mvd.data.prepare.checking import Job, Record, is_done, read_records, run_jobs, work_on
from tests.data import torture, wild_videos


@pytest.fixture
def video(tmp_path) -> Path:
    return torture.write(tmp_path / "video.mp4", torture.moving_picture(20, 48, 64))


def job(source: Path, short_side: int | None = None) -> Job:
    return Job(source, source.with_name("copy.mp4"), short_side)


def test_a_good_file_is_done_until_it_changes(video):
    record = work_on(job(video))
    assert record.reason is None and record.facts is not None and record.facts["order"] == "timestamps"
    assert is_done(job(video), record)
    assert not is_done(job(video, short_side=32), record)
    video.write_bytes(video.read_bytes() + b"more")
    assert not is_done(job(video), record)


def test_a_file_whose_copy_is_gone_is_encoded_again(video):
    record = work_on(job(video, short_side=32))
    assert is_done(job(video, short_side=32), record)
    video.with_name("copy.mp4").unlink()
    assert not is_done(job(video, short_side=32), record)


def test_a_copy_without_some_of_the_frames_is_not_used(video, monkeypatch):
    shorter = torture.moving_picture(19, 48, 64)
    monkeypatch.setattr(checking, "reencode", lambda source, target, short_side: torture.write(target, shorter))
    record = work_on(job(video, short_side=32))
    assert record.path is None and record.reason == "its re-encoded copy has 19 frames instead of 20"


def test_verdicts_of_another_version_of_the_checks_are_not_reused(video):
    assert not is_done(job(video), dataclasses.replace(work_on(job(video)), checks=1))


def test_a_file_in_decoding_order_is_put_in_order_by_re_encoding(tmp_path):
    source = wild_videos.encode(tmp_path / "video.avi", "libx264")
    as_it_is, copied = work_on(job(source)), work_on(job(source, short_side=32))
    assert as_it_is.facts is not None and as_it_is.facts["order"] == "decoder"
    assert copied.facts is not None and copied.facts["order"] == "timestamps"
    assert as_it_is.facts["frames"] == copied.facts["frames"] == wild_videos.FRAMES


def test_a_codec_without_a_decoder_ends_no_other_files_check(video, tmp_path):
    unknown = wild_videos.replace_bytes(video, tmp_path / "unknown.mp4", b"avc1", b"zzzz")
    dangling = tmp_path / "dangling.mp4"
    dangling.symlink_to(tmp_path / "nowhere.mp4")
    records = {}
    for record in run_jobs([job(unknown), job(dangling), job(video)], 1, tmp_path / "records.jsonl"):
        records[Path(record.source).name] = record
    assert records["unknown.mp4"].reason == "there is no decoder for its video codec"
    assert records["dangling.mp4"].reason == "No such file or directory"
    assert records["video.mp4"].reason is None
    assert {Path(source).name: record for source, record in read_records(tmp_path).items()} == records


@pytest.mark.parametrize(
    ("error", "reason", "temporary"),
    [
        (AttributeError("'NoneType' object has no attribute 'name'"), "AttributeError: 'NoneType' object", False),
        (ValueError("no such pixel format"), "no such pixel format", False),
        (OSError(28, "No space left on device"), "No space left on device", True),
        (PermissionError(13, "Permission denied"), "Permission denied", True),
        (TimeoutError(110, "Connection timed out"), "Connection timed out", True),
        (av.PermissionError(13, "Permission denied", "a.mp4"), "Permission denied", True),
        (av.InvalidDataError(1094995529, "Invalid data", "a.mp4"), "Invalid data", False),
        (MemoryError(), "MemoryError", True),
    ],
)
def test_an_error_is_the_files_fault_but_for_passing_trouble(error, reason, temporary, video, monkeypatch):
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(checking, "check_video", fail)
    record = work_on(job(video))
    assert record.reason is not None and reason in record.reason
    assert record.temporary == temporary
    assert is_done(job(video), record) == (not temporary)


def test_a_file_that_comes_back_is_checked_again(video):
    content = video.read_bytes()
    video.unlink()
    record = work_on(job(video))
    assert record.reason == "No such file or directory" and record.temporary
    video.write_bytes(content)
    assert not is_done(job(video), record)


def test_records_of_earlier_versions_can_be_read(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"source": "a.mp4", "size": 1, "changed": 2.0, "short_side": null}\n')
    assert read_records(tmp_path) == {"a.mp4": Record("a.mp4", 1, 2.0, None)}
