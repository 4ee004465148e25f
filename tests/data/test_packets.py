"""The packet reader against a plain decoding of whole files, on files that are hard to read."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.packets import PacketVideo, is_reference, unit_prefix
from mvd.data.video.reader import open_video
from tests.data import torture
from tests.data.indexing import assert_same_with_index

NAMES = torture.NAMES


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Name -> file."""
    folder = tmp_path_factory.mktemp("torture")
    subprocess.run([sys.executable, "-m", "tests.data.torture", str(folder)], check=True)
    return {path.stem: path for path in folder.iterdir()}


def decode_all(path: Path) -> np.ndarray:
    """Every frame of a file, in order, without any index, skipping or seeking."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", NAMES)
def test_any_frames_equal_a_decoding_of_the_whole_file(name, files):
    expected = decode_all(files[name])
    video = PacketVideo(str(files[name]))
    assert len(video) == len(expected)
    np.testing.assert_array_equal(video.frames(np.arange(len(video))), expected)
    rng = np.random.default_rng(0)
    for count in (1, 1, 1, 2, 5, 9):
        indices = rng.integers(len(video), size=count)  # in any order, with repeats
        np.testing.assert_array_equal(video.frames(indices), expected[indices])
        np.testing.assert_array_equal(PacketVideo(str(files[name])).frames(indices), expected[indices])


def test_frames_are_the_same_with_an_index_of_the_packets(files):
    folder = files["b_frames"].parent
    indexed = assert_same_with_index([files[name] for name in NAMES], folder)
    assert {"b_frames", "gop_12", "intra", "fast_to_decode", "irregular_times"} <= {path.stem for path in indexed}


@pytest.mark.parametrize("name", NAMES)
def test_all_frames_come_in_order_with_their_times(name, files):
    video = PacketVideo(str(files[name]))
    times = [frame.time for frame in video.decode_all()]
    assert len(times) == len(video) and times == sorted(set(times))


@pytest.mark.parametrize("name", ["b_frames", "gop_12", "intra", "irregular_times", "vp9", "odd_size", "one_frame"])
def test_decord_gives_the_same_frames(name, files):
    every = np.arange(len(open_video(str(files[name]))))
    ours, theirs = (open_video(str(files[name]), reader).frames(every) for reader in ("pyav", "decord"))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rotation_flag_turns_the_picture_clockwise(turns, files, tmp_path):
    upright = PacketVideo(str(files["gop_12"])).frames(np.array([0, 30]))
    turned = PacketVideo(str(torture.rotate(files["gop_12"], tmp_path / "turned.mp4", turns)))
    np.testing.assert_array_equal(turned.frames(np.array([0, 30])), np.rot90(upright, -turns, axes=(1, 2)))


def test_only_what_the_wanted_frames_need_is_decoded(files):
    """One frame of a group of pictures of 250: neither what follows it nor the other non-reference frames."""
    video = PacketVideo(str(files["gop_250"]))
    wanted = video._shown_packets[40]
    (packets,) = video._needed_packets([40])
    positions = [video._packets.index(packet) for packet in packets]
    assert positions[0] == 0 and positions[-1] == wanted
    left_out = set(range(wanted)) - set(positions)
    assert len(left_out) > 10
    assert not any(is_reference(video._packets[i], 4) for i in left_out)


@pytest.mark.parametrize("name", ["open_gop", "open_start", "gop_12"])
def test_decoding_starts_where_nothing_later_is_shown_earlier(name, files):
    video = PacketVideo(str(files[name]))
    times = [packet.pts for packet in video._packets]
    assert all(min(times[start:]) == times[start] for start in video._starts[1:])
    assert len(video._starts) > 1


@pytest.mark.parametrize(
    "units, expected",
    [
        ([b"\x65"], True),
        ([b"\x41"], True),
        ([b"\x01"], False),
        ([b"\x67", b"\x06", b"\x01"], False),
        ([b"\x01", b"\x21"], True),
    ],
)
def test_a_reference_frame_has_a_slice_that_says_so(units, expected):
    """Of keyframe, reference and other slices; parameter sets and messages tell nothing."""
    packet = av.Packet(b"".join((len(unit) + 9).to_bytes(4) + unit + bytes(9) for unit in units))
    assert is_reference(packet, 4) == expected


def test_only_mp4_packets_are_looked_into(files):
    with av.open(str(files["gop_12"])) as container:
        assert unit_prefix(container.streams.video[0].codec_context) == 4
    with av.open(str(files["transport_stream"])) as container:
        assert unit_prefix(container.streams.video[0].codec_context) == 0
    with av.open(str(files["vp9"])) as container:
        assert unit_prefix(container.streams.video[0].codec_context) == 0


@pytest.mark.parametrize("name", ["b_frames", "gop_12", "transport_stream"])
def test_frames_wrongly_flagged_as_keyframes_are_detected(name, files):
    """A container may call any frame a keyframe; decoding then falls back to the whole file."""
    expected = decode_all(files[name])
    video = PacketVideo(str(files[name]))
    video._starts = list(range(len(video)))
    np.testing.assert_array_equal(video.frames(np.array([7, 20, 33])), expected[[7, 20, 33]])


@pytest.mark.parametrize("damage", ["slice", "half_a_file", "empty", "text", "sound", "missing"])
def test_an_error_tells_the_file_that_cannot_be_decoded(damage, files, tmp_path):
    path = torture.damaged(damage, files["b_frames"], tmp_path / "broken.mp4")
    with pytest.raises(UnreadableVideo, match="broken.mp4 cannot be read: .") as caught:
        PacketVideo(str(path)).frames(np.arange(60))
    assert caught.value.path == str(path)


def test_frames_before_the_damage_are_still_good(files, tmp_path):
    expected = decode_all(files["b_frames"])
    video = PacketVideo(str(torture.damaged("slice", files["b_frames"], tmp_path / "broken.mp4")))
    np.testing.assert_array_equal(video.frames(np.array([0, 4])), expected[[0, 4]])


def test_a_frame_that_does_not_exist_is_refused(files):
    with pytest.raises(IndexError, match="frames 0 to 59, not 3 to 60"):
        PacketVideo(str(files["gop_12"])).frames(np.array([3, 60]))
