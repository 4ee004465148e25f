"""Reading real files, good and bad."""

import dataclasses
import gc
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd.data.datasets import SampleKey, build_dataset
from mvd.data.video.errors import UnreadableImage, UnreadableVideo
from mvd.data.video.reader import open_video, read_image
from mvd.stage import Stage
from tests.data.stages import stage

MANIFEST = json.loads((Path(__file__).parents[1] / "golden" / "data_views_manifest.json").read_text())


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_frames_equal_the_official_decoding(real_videos, reader):
    facts = MANIFEST["bikes.mp4"]
    assert hashlib.sha256(Path(real_videos["bikes"]).read_bytes()).hexdigest() == facts["sha256"]
    video = open_video(real_videos["bikes"], reader)
    assert len(video) == facts["n_frames"]
    checks = {int(number): check for number, check in facts["decoded_frame_checks"].items()}
    for frame, check in zip(video.frames(np.array(list(checks))), checks.values(), strict=True):
        assert list(frame.shape) == [*facts["hw"], 3]
        assert int(frame.sum(dtype=np.int64)) == check["sum"]
        assert hashlib.sha256(frame.tobytes()).hexdigest() == check["sha256"]


def test_reading_leaves_no_reference_cycles(real_videos):
    """A cycle keeps its picture until a full collection, in a worker after thousands of videos."""
    open_video(real_videos["bikes"]).frames(np.array([0]))
    gc.collect()
    gc.disable()
    try:
        open_video(real_videos["bikes"]).frames(np.array([30, 5, 249]))
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_frames_come_in_the_order_asked_for_and_repeat(real_videos):
    video = open_video(real_videos["bikes"])
    frames = video.frames(np.array([30, 5, 5, 249, 30]))
    single = [video.frames(np.array([number]))[0] for number in (30, 5, 5, 249, 30)]
    np.testing.assert_array_equal(frames, np.stack(single))


@pytest.mark.parametrize("kind", ["image_teacher", "pretrain", "finetune"])
def test_the_demo_has_the_same_samples_with_either_reader(motion_root, kind):
    made = stage(motion_root, kind)
    one, other = (build_dataset(replace_reader(made, reader)) for reader in ("pyav", "decord"))
    for index in range(0, 48, 5):
        samples = one[SampleKey(1, index)], other[SampleKey(1, index)]
        names = samples[0].keys() - {"unreadable", "decode_ms"}
        assert all(torch.equal(samples[0][name], samples[1][name]) for name in names)


def replace_reader(made: Stage, reader: str) -> Stage:
    return dataclasses.replace(made, execution=dataclasses.replace(made.execution, reader=reader))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_an_error_tells_the_broken_file(damage, reader, real_videos, tmp_path):
    path = tmp_path / "broken.mp4"
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("not a video\n" * 1000)
    elif damage == "truncated":
        path.write_bytes(Path(real_videos["bikes"]).read_bytes()[:20_000])
    with pytest.raises(UnreadableVideo, match="broken.mp4 cannot be read") as caught:
        open_video(str(path), reader).frames(np.arange(16))
    assert caught.value.path == str(path) and caught.value.reason


def test_a_decoder_that_loses_frames_is_noticed(real_videos):
    video = open_video(real_videos["bikes"], "decord")
    video._reader = Losing(video._reader)
    with pytest.raises(UnreadableVideo, match="decord returned 15 of 16 frames"):
        video.frames(np.arange(16))


class Losing:
    """A decord reader whose batches lack the last frame."""

    def __init__(self, reader) -> None:
        self._reader = reader

    def get_batch(self, indices):
        return self._reader.get_batch(indices[:-1])


def test_images(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((5, 7), 9, np.uint8)).save(tmp_path / "grey.png")
    assert read_image(str(tmp_path / "grey.png")).shape == (5, 7, 3)
    (tmp_path / "bad.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    with pytest.raises(UnreadableImage, match="bad.png cannot be read"):
        read_image(str(tmp_path / "bad.png"))


def test_errors_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableVideo("a.mp4", "too short", True)))
    assert (error.path, error.reason, error.temporary) == ("a.mp4", "too short", True)
