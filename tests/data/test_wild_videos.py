"""Videos as people have them: each is read right or refused, as compared with a sequential decoding and the source."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mvd.data.prepare.transcode import check_video, reencode
from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.packets import PacketVideo
from mvd.data.video.reader import open_video
from mvd.data.video.timestamps import go_back
from tests.data import wild_videos
from tests.data.indexing import assert_same_with_index
from tests.data.torture import moving_picture

IN_ORDER = ["h264.mp4", "h264.mkv", "h264.flv", "h264.ts", "h264_index_first.mp4", "h264_fragments.mp4", "hevc.mp4"]
IN_ORDER += ["av1.mp4", "mpeg2.mpg", "mpeg2.avi", "mpeg4.mp4", "mpeg4.avi", "wmv2.asf", "vp9.webm", "vp9.mp4"]
IN_ORDER += ["vp8.webm", "vp8.avi", "long_sound.mkv", "long_sound_index_first.mp4"]
OUT_OF_ORDER = ["h264.avi", "h264.asf", "h264_from_avi.mkv", "h264_from_avi.mp4", "mpeg4_from_avi.mkv"]
OUT_OF_ORDER += ["packed.avi", "packed.mp4"]
HIDDEN = ["vp8_hidden.webm", "vp8_hidden.avi"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All files of wild_videos.write_all."""
    made = tmp_path_factory.mktemp("wild")
    command = [sys.executable, "-m", "tests.data.wild_videos", str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return made


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return moving_picture(wild_videos.FRAMES, wild_videos.HEIGHT, wild_videos.WIDTH)


def decode_all(path: Path) -> np.ndarray:
    """Every frame as it comes out of FFmpeg's own decoder."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_shows(path: Path, pictures: np.ndarray) -> PacketVideo:
    """All frames, and frames in any order, are those of a sequential decoding, and show these pictures."""
    expected = decode_all(path)
    assert len(expected) == len(pictures)
    video = PacketVideo(str(path))
    np.testing.assert_array_equal(video.frames(np.arange(len(video))), expected)
    rng = np.random.default_rng(0)
    for count in (1, 1, 3, 8):
        indices = rng.integers(len(video), size=count)
        np.testing.assert_array_equal(PacketVideo(str(path)).frames(indices), expected[indices])
    assert_same_order(expected, pictures)
    return video


def assert_same_order(frames: np.ndarray, pictures: np.ndarray) -> None:
    """Each frame is closest to the picture of the same number, or to an equal one."""
    distances = np.abs(frames[:, None].astype(np.int16) - pictures[None]).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(distances.min(axis=1), np.diagonal(distances))


@pytest.mark.parametrize("name", IN_ORDER)
def test_files_with_times_of_presentation_are_read_in_their_order(name, folder, source):
    assert not assert_shows(folder / name, source).in_decoder_order


def test_frames_are_the_same_with_an_index_of_the_packets(folder):
    indexed = assert_same_with_index([folder / name for name in (*IN_ORDER, *OUT_OF_ORDER, *HIDDEN)], folder)
    names = {path.name for path in indexed}
    assert {"h264.mp4", "h264_index_first.mp4", "hevc.mp4", "vp9.mp4", "vp9.webm"} <= names
    assert names.isdisjoint([*OUT_OF_ORDER, *HIDDEN])


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_files_with_times_of_decoding_are_read_in_the_decoders_order(name, folder, source):
    assert assert_shows(folder / name, source).in_decoder_order
    facts = check_video(folder / name)
    assert (facts.frames, facts.order, facts.seconds) == (len(source), "decoder", pytest.approx(2.4, abs=0.1))


@pytest.mark.parametrize("name", HIDDEN)
def test_frames_that_are_not_shown_are_not_counted(name, folder, source):
    shown = [number for number in range(len(source)) if number not in wild_videos.HIDDEN]
    assert assert_shows(folder / name, source[shown]).in_decoder_order


def test_scenes_whose_timestamps_start_anew_stay_one_after_the_other(folder, source):
    assert assert_shows(folder / "joined.ts", np.concatenate([source, source])).in_decoder_order


@pytest.mark.parametrize("name", [*OUT_OF_ORDER, "joined.ts"])
def test_re_encoding_puts_frames_in_order(name, folder, tmp_path):
    reencode(folder / name, tmp_path / "copy.mp4", 48)
    made = check_video(tmp_path / "copy.mp4")
    expected = decode_all(folder / name)
    assert (made.frames, made.order, made.codec) == (len(expected), "timestamps", "h264")
    copy = PacketVideo(str(tmp_path / "copy.mp4")).frames(np.arange(made.frames))
    assert_same_order(copy, expected)


def test_timestamps_that_disagree_with_the_decoder_are_refused(folder, tmp_path, monkeypatch):
    """As if the packets had raised no doubt."""
    monkeypatch.setattr("mvd.data.video.packets.are_doubtful", lambda track, depth: False)
    video = PacketVideo(str(folder / "h264.avi"))
    with pytest.raises(UnreadableVideo, match="out of order"):
        video.frames(np.arange(10))
    with pytest.raises(UnreadableVideo, match="its timestamps are not in the order of its frames"):
        list(video.decode_all())


@pytest.mark.parametrize(
    ("times", "depth", "expected"),
    [
        ([0, 1, 2, 3], 0, False),
        ([0, 2, 1, 3], 0, True),
        ([0, 2, 1, 4, 3], 1, False),
        ([0, 4, 2, 1, 3], 2, False),
        ([0, 4, 2, 1, 3], 1, True),
        ([0, 1, 2, 3, 0, 1], 2, True),
        ([], 2, False),
    ],
)
def test_a_time_may_be_late_by_the_depth_of_reordering(times, depth, expected):
    assert go_back(times, depth) == expected


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("h264_index_first.mp4", 0.6, "truncated: it"),
        ("h264_index_first.mp4", 0.99, "truncated: it"),
        ("long_sound_index_first.mp4", 0.4, "truncated: it"),
        ("h264_fragments.mp4", 0.6, "truncated: it ends in the middle of a frame"),
        ("h264.mp4", 0.8, "its header or index is missing or damaged"),
        ("h264.mkv", 0.6, "truncated: it ends after 1"),
        ("long_sound.mkv", 0.4, "truncated: it ends after"),
        ("vp9.webm", 0.6, "truncated: it ends after 1"),
        ("h264.flv", 0.6, "truncated: it ends in the middle of a frame"),
        ("mpeg4.avi", 0.6, "truncated: it "),
        ("wmv2.asf", 0.6, "truncated: its size is not the one that its header declares"),
    ],
)
def test_a_truncated_file_is_refused(name, share, message, folder, tmp_path):
    path = wild_videos.cut(folder / name, tmp_path / f"cut{Path(name).suffix}", share)
    with pytest.raises(UnreadableVideo, match=message):
        check_video(path)


@pytest.mark.parametrize("name", ["vp9.webm", "vp9.mp4"])
@pytest.mark.parametrize("seed", range(6))
def test_damaged_vp9_is_refused(name, seed, folder, tmp_path):
    path = wild_videos.damage(folder / name, tmp_path / f"damaged{Path(name).suffix}", seed)
    assert len(decode_all(path)) == wild_videos.FRAMES  # FFmpeg's own decoder notices nothing
    with pytest.raises(UnreadableVideo, match="a frame is damaged"):
        open_video(str(path)).frames(np.arange(wild_videos.FRAMES))


def test_damage_that_two_vp8_decoders_decode_differently_is_refused(folder, tmp_path):
    reasons = []
    for seed in range(60):  # most damage is decoded alike
        try:
            check_video(wild_videos.damage(folder / "vp8.webm", tmp_path / "damaged.webm", seed))
        except UnreadableVideo as error:
            reasons.append(error.reason)
    assert reasons and set(reasons) == {"a frame is damaged: two decoders disagree on it"}


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "vp9.webm"])
def test_a_lost_frame_is_noticed_by_those_that_depend_on_it(name, folder, tmp_path):
    packets = wild_videos.packets_of(folder / name)
    lost = next(i for i, packet in enumerate(packets[8:], 8) if packet.size > 200 and not packet.is_keyframe)
    empty = av.Packet(bytes(packets[lost].size))
    empty.pts, empty.dts, empty.time_base = packets[lost].pts, packets[lost].dts, packets[lost].time_base
    path = tmp_path / f"lost{Path(name).suffix}"
    wild_videos.copy_packets(folder / name, path, [*packets[:lost], empty, *packets[lost + 1 :]])
    with pytest.raises(UnreadableVideo):
        open_video(str(path)).frames(np.arange(20))


def turn(pictures: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """What a display matrix makes of pictures (T, H, W, C), pixel by pixel."""
    a, b, c, d = matrix
    count, height, width, _ = pictures.shape
    y, x = np.mgrid[:height, :width]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    turned = np.empty((count, rows.max() + 1, columns.max() + 1, 3), np.uint8)
    turned[:, rows, columns] = pictures
    return turned


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.mp4"])
@pytest.mark.parametrize("matrix", wild_videos.MATRICES)
def test_a_display_matrix_turns_and_mirrors(name, matrix, folder, tmp_path):
    values = wild_videos.MATRICES[matrix]
    path = wild_videos.with_matrix(folder / name, tmp_path / "turned.mp4", values)
    expected = turn(decode_all(path), values)
    video = PacketVideo(str(path))
    np.testing.assert_array_equal(video.frames(np.arange(len(video))), expected)
    facts = check_video(path)
    assert (facts.height, facts.width) == expected.shape[1:3]


def test_a_mirrored_video_is_re_encoded_as_it_is_shown(folder, tmp_path):
    values = wild_videos.MATRICES["mirrored"]
    path = wild_videos.with_matrix(folder / "h264.mp4", tmp_path / "mirrored.mp4", values)
    reencode(path, tmp_path / "copy.mp4", 48)
    copy = PacketVideo(str(tmp_path / "copy.mp4")).frames(np.arange(wild_videos.FRAMES))
    assert np.abs(copy.astype(int) - decode_all(folder / "h264.mp4")[:, :, ::-1]).mean() < 6


def flat_video(path: Path, codec: str, pixel_format: str, start: int = 0, **codec_context: int) -> Path:
    """25 frames of one colour; start: of their times, in 90,000ths of a second."""
    with av.open(str(path), "w") as made:
        stream = made.add_stream(codec, rate=25, options={"auto-alt-ref": "0"} if codec == "libvpx" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        stream.codec_context.time_base = Fraction(1, 90000)
        for name, value in codec_context.items():
            setattr(stream.codec_context, name, value)
        color = np.full((48, 64, 3), (200, 40, 30), np.uint8)
        targets = {"dst_colorspace": codec_context.get("colorspace"), "dst_color_range": codec_context["color_range"]}
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(color, format="rgb24").reformat(format=pixel_format, **targets)
            frame.pts, frame.time_base = start + 3600 * number, Fraction(1, 90000)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())
    return path


@pytest.mark.parametrize("colorspace", [1, 5], ids=["bt709", "bt601"])
@pytest.mark.parametrize("color_range", [1, 2], ids=["limited", "full"])
def test_a_copy_has_the_colours_of_its_source(colorspace, color_range, tmp_path):
    source = flat_video(tmp_path / "source.mp4", "libx264", "yuv420p", colorspace=colorspace, color_range=color_range)
    reencode(source, tmp_path / "copy.mp4", 48)
    original, copy = (PacketVideo(str(path)).frames(np.arange(25)) for path in (source, tmp_path / "copy.mp4"))
    assert np.abs(original.mean(axis=(0, 1, 2)) - (200, 40, 30)).max() < 5
    assert np.abs(copy.astype(int) - original).max() < 6


def test_times_below_zero_lose_no_frame_in_a_copy(tmp_path):
    """As in a transport stream whose clock of 33 bits starts anew."""
    source = flat_video(tmp_path / "wraps.ts", "libx264", "yuv420p", start=2**33 - 45000, color_range=1)
    assert check_video(source).frames == 25
    reencode(source, tmp_path / "copy.mp4", 48)
    assert check_video(tmp_path / "copy.mp4").frames == 25


def test_vp8_with_alpha_is_not_damaged(tmp_path):
    source = flat_video(tmp_path / "alpha.webm", "libvpx", "yuva420p", color_range=1)
    assert check_video(source).frames == 25


def test_vp9_in_matroska_may_be_turned(folder, tmp_path):
    path = tmp_path / "turned.mkv"
    with av.open(str(folder / "vp9.webm")) as given, av.open(str(path), "w") as made:
        copy = made.add_stream_from_template(given.streams.video[0])
        copy.set_display_rotation(-90)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = copy
                made.mux(packet)
    expected = np.rot90(decode_all(path), -1, axes=(1, 2))
    np.testing.assert_array_equal(PacketVideo(str(path)).frames(np.arange(wild_videos.FRAMES)), expected)


def test_a_slanted_picture_is_refused(folder, tmp_path):
    path = wild_videos.with_matrix(folder / "h264.mp4", tmp_path / "slanted.mp4", wild_videos.SLANTED)
    with pytest.raises(UnreadableVideo, match="its display matrix does more than turn by 90, 180 or 270 degrees"):
        PacketVideo(str(path)).frames(np.arange(4))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_codec_without_a_decoder_is_refused(reader, folder, tmp_path):
    path = wild_videos.replace_bytes(folder / "h264.mp4", tmp_path / "unknown.mp4", b"avc1", b"zzzz")
    with pytest.raises(UnreadableVideo, match="unknown.mp4 cannot be read: ."):
        open_video(str(path), reader)


def test_an_encrypted_video_is_refused(folder, tmp_path):
    keys = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    packets = wild_videos.packets_of(folder / "h264.mp4")
    wild_videos.copy_packets(folder / "h264.mp4", tmp_path / "encrypted.mp4", packets, **keys)
    with pytest.raises(UnreadableVideo, match="it is encrypted"):
        open_video(str(tmp_path / "encrypted.mp4"))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_whatever_is_raised_while_reading_is_the_files_fault(reader, folder, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'name'")

    monkeypatch.setattr("av.open", fail)
    monkeypatch.setattr("decord.VideoReader", fail)
    with pytest.raises(UnreadableVideo, match="AttributeError: 'NoneType' object has no attribute 'name'") as caught:
        open_video(str(folder / "h264.mp4"), reader)
    assert not caught.value.temporary


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(28, "No space left"), MemoryError()]
)
def test_an_error_of_the_machine_is_no_verdict_on_the_file(error, folder, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("av.open", fail)
    with pytest.raises(UnreadableVideo) as caught:
        open_video(str(folder / "h264.mp4"))
    assert caught.value.temporary


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted"])
def test_real_videos_are_read_as_a_sequential_decoding_reads_them(name, real_videos):
    path = real_videos[name]
    wanted = np.random.default_rng(0).integers(check_video(Path(path)).frames, size=12)
    with av.open(path) as container:
        frames = {number: frame for number, frame in enumerate(container.decode(video=0)) if number in wanted}
    expected = np.stack([frames[number].to_ndarray(format="rgb24") for number in wanted])
    np.testing.assert_array_equal(open_video(path).frames(wanted), expected)
