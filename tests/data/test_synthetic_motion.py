"""The generated data set: real files, classes told apart by motion alone, made once."""

import json

import av
import numpy as np
import pytest

from mvd.config import ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.data.annotations import load_annotations
from mvd.data.synthetic_motion import CLASSES, HEIGHT, MANIFEST, UNFINISHED, WIDTH, draw_poses, generate_motion, render


def snapshot(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_files_are_h264_and_listed(motion_root):
    paths = DatasetPaths(root=str(motion_root))
    lists = {split: load_annotations(paths, split, 8) for split in ("train", "val", "test")}
    assert [len(entries) for entries in lists.values()] == [48, 16, 16]
    assert lists["test"] == lists["val"]
    assert np.bincount([entry.label for entry in lists["train"]]).tolist() == [6] * 8
    with av.open(lists["train"][0].path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 56, 48)
        assert sum(1 for _ in container.decode(stream)) == 24


def test_it_is_written_once_and_an_interrupted_folder_is_completed(tmp_path):
    root = generate_motion(tmp_path / "motion", train=8, val=8, seed=3)
    whole = snapshot(root)
    kept = root / "train" / "00001.mp4"
    modified = kept.stat().st_mtime_ns
    assert generate_motion(root, train=8, val=8, seed=3) == root
    assert kept.stat().st_mtime_ns == modified
    (root / MANIFEST).rename(root / UNFINISHED)
    (root / "train" / "00005.mp4").unlink()
    (root / "val.csv").unlink()
    generate_motion(root, train=8, val=8, seed=3)
    assert snapshot(root) == whole
    assert kept.stat().st_mtime_ns == modified


def test_a_folder_of_something_else_is_refused(tmp_path):
    generate_motion(tmp_path / "motion", train=8, val=8)
    with pytest.raises(ConfigError, match="give another folder"):
        generate_motion(tmp_path / "motion", train=16, val=8)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ConfigError, match="give another folder"):
        generate_motion(tmp_path / "thesis", train=8, val=8)
    assert json.loads((tmp_path / "motion" / MANIFEST).read_text())["train"] == 8


def test_only_the_quantity_of_a_class_moves_and_in_its_direction():
    rng = np.random.default_rng(0)
    signs = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1), "clockwise": (2, 1)}
    signs |= {"counterclockwise": (2, -1), "grow": (3, 1), "shrink": (3, -1)}
    for label, name in enumerate(CLASSES):
        steps = np.diff(np.stack(draw_poses(label, rng)), axis=1)
        moving, direction = signs[name]
        backwards = np.sign(steps[moving]) != direction
        assert backwards.sum() <= 3  # only where its circle closes
        assert not np.delete(steps, moving, axis=0).any()


@pytest.mark.parametrize("time", [0, 12, 23])
def test_a_single_frame_does_not_tell_the_class(time):
    """The nearest of 8000 other poses at the same time guesses the class no better than chance, 12.5 %."""
    rng = np.random.default_rng(time)
    labels = np.tile(np.arange(8), 1250)
    poses = np.array([np.stack(draw_poses(label, rng))[:, time] for label in labels])
    poses /= poses.std(axis=0)
    seen, asked = poses[:8000], poses[8000:]
    distances = ((asked[:, None] - seen[None]) ** 2).sum(axis=2)
    votes = labels[:8000][np.argpartition(distances, 25, axis=1)[:, :25]]
    guesses = [np.bincount(vote, minlength=8).argmax() for vote in votes]
    assert np.mean(guesses == labels[8000:]) < 0.17


def test_the_sprite_stays_in_view_and_moves():
    for label in range(8):
        clip = render(label, np.random.default_rng([7, label])).astype(int)
        covered = (clip.max(axis=3) >= 90).sum(axis=(1, 2))
        assert covered.min() > 40
        assert (clip[0] != clip[-1]).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_clockwise_turn_takes_the_top_to_the_right(seed):
    label = CLASSES.index("clockwise")
    poses = draw_poses(label, np.random.default_rng(seed))
    clip = render(label, np.random.default_rng(seed))
    middle = (HEIGHT // 2 - int(poses.y[0]), WIDTH // 2 - int(poses.x[0]))
    before, after = (np.roll(frame, middle, axis=(0, 1)).astype(float) for frame in (clip[0], clip[1]))
    turned = (poses.angle[1] - poses.angle[0]) % 360
    clockwise, counterclockwise = (turn_of(before, after, WIDTH // 2, HEIGHT // 2, sign * turned) for sign in (1, -1))
    assert clockwise < 0.8 * counterclockwise


def turn_of(before: np.ndarray, after: np.ndarray, x: float, y: float, degrees: float) -> float:
    """How far `after` is from `before` turned clockwise by that angle about (x, y); rows run downwards."""
    angle = np.radians(degrees)
    rows, columns = np.mgrid[-4:5, -4:5]
    across = columns * np.cos(angle) - rows * np.sin(angle)
    down = columns * np.sin(angle) + rows * np.cos(angle)
    source = before[np.rint(y + rows).astype(int), np.rint(x + columns).astype(int)]
    target = after[np.rint(y + down).astype(int), np.rint(x + across).astype(int)]
    return float(np.abs(source - target).mean())
