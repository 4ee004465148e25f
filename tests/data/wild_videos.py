"""Video files as they are found in data sets and downloads, written with PyAV: `write_all(folder)`.

They show the frames of `torture.moving_picture(FRAMES, HEIGHT, WIDTH)`.
"""

import struct
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.packet import Packet

from tests.data.torture import RATE, moving_picture

FRAMES, HEIGHT, WIDTH = 60, 48, 64
CODEC_OPTIONS = {
    "libx264": {"threads": "1", "bf": "3", "g": "24"},
    "libx265": {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=24:min-keyint=24"},
    "mpeg4": {"bf": "1", "g": "12", "b": "2M"},
    "mpeg2video": {"bf": "2", "g": "12", "b": "2M"},
    "libvpx-vp9": {"cpu-used": "8", "deadline": "realtime", "g": "24", "crf": "20", "b": "0"},
    "libvpx": {"cpu-used": "8", "deadline": "realtime", "g": "24", "crf": "10", "b": "2M"},
    "libsvtav1": {"preset": "12", "svtav1-params": "keyint=24:lp=1"},
    "wmv2": {"b": "2M"},
}
HIDDEN = range(5, FRAMES, 9)


def encode(path: Path, codec: str, sound: float = 0.0, muxer: dict[str, str] | None = None, **options: str) -> Path:
    """Encodes the clip, with a silent sound track of so many seconds; its times are counted in frames."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=CODEC_OPTIONS[codec] | options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        noise = container.add_stream("aac", rate=16000) if sound else None
        for number, pixels in enumerate(moving_picture(FRAMES, HEIGHT, WIDTH)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if noise is not None:
            samples = np.zeros((1, round(sound * 16000)), np.float32)
            silence = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux(noise.encode(silence))
            container.mux(noise.encode())
    return path


def packets_of(path: Path) -> list[Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def remux(source: Path, path: Path, change: Callable[[int, Packet], Packet] = lambda number, packet: packet) -> Path:
    """Copies the packets to another container, each as `change(number, packet)` makes it."""
    return copy_packets(source, path, (change(number, packet) for number, packet in enumerate(packets_of(source))))


def copy_packets(source: Path, path: Path, packets: Iterable[Packet], **muxer: str) -> Path:
    with av.open(str(source)) as given, av.open(str(path), "w", options=muxer) as made:
        copy = made.add_stream_from_template(given.streams.video[0])
        for packet in packets:
            packet.stream = copy
            made.mux(packet)
    return path


def stamp_in_order_of_decoding(number: int, packet: Packet) -> Packet:
    """As programs do that copy from AVI: the times of decoding are written as those of presentation."""
    packet.pts = packet.dts = round(number / RATE / packet.time_base)
    return packet


def hide_some(number: int, packet: Packet) -> Packet:
    """Makes some VP8 frames reference frames that are not shown."""
    if number not in HIDDEN:
        return packet
    content = bytes(packet)
    hidden = Packet(bytes([content[0] & ~16]) + content[1:])  # the bit is show_frame
    hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
    return hidden


def pack_b_frames(source: Path, path: Path) -> Path:
    """Packs each B-frame of an MPEG-4 file into the packet of the frame before it, as DivX and XviD do.

    A frame that is not coded follows in its place. The source has at most one B-frame in a row.
    """
    packets = packets_of(source)
    contents = [bytes(packet) for packet in packets]
    start = b"\x00\x00\x01\xb6"
    assert all(content.count(start) == 1 for content in contents)
    kinds = [content[content.index(start) + 4] >> 6 for content in contents]  # 0: I, 1: P, 2: B
    packed = []
    for number, (content, kind) in enumerate(zip(contents, kinds, strict=True)):
        follower = kinds[number + 1] if number + 1 < len(kinds) else 0
        if kind == 2:
            packed.append(start + b"\x50\x7f")  # a P-frame that is not coded
        else:
            packed.append(content + (contents[number + 1] if follower == 2 else b""))
    marked = [b"\x00\x00\x01\xb2DivX503b1393p\x00" + packed[0], *packed[1:]]
    changed = []
    for content, old in zip(marked, packets, strict=True):
        packet = Packet(content)
        packet.time_base, packet.is_keyframe = old.time_base, old.is_keyframe
        changed.append(stamp_in_order_of_decoding(len(changed), packet))
    return copy_packets(source, path, changed)


def join(source: Path, path: Path) -> Path:
    """A file twice in a row: the second half's timestamps start anew."""
    path.write_bytes(source.read_bytes() * 2)
    return path


MATRICES = {  # a, b, c, d: a pixel (x, y) is shown at (a x + c y, b x + d y)
    "turned_right": (0, 1, -1, 0),
    "upside_down": (-1, 0, 0, -1),
    "turned_left": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "mirrored_upside_down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed_the_other_way": (0, -1, -1, 0),
}
SLANTED = (0.8, 0.6, -0.6, 0.8)


def with_matrix(source: Path, path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Writes a display matrix into the track header of an .mp4."""
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 44  # version 0: flags, times, id, duration, layer and volume come before
    a, b, c, d = (round(value * 65536) for value in matrix)
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut(source: Path, path: Path, share: float) -> Path:
    """The first part of a file, as an interrupted download leaves it."""
    data = source.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def damage(source: Path, path: Path, seed: int, count: int = 40) -> Path:
    """Overwrites bytes in the middle of a frame."""
    rng = np.random.default_rng(seed)
    data = bytearray(source.read_bytes())
    candidates = [packet for packet in packets_of(source) if packet.size > 2 * count]
    packet = candidates[rng.integers(len(candidates))]
    at = packet.pos + int(rng.integers(count // 2, packet.size - count))
    data[at : at + count] = rng.bytes(count)
    path.write_bytes(data)
    return path


def replace_bytes(source: Path, path: Path, old: bytes, new: bytes) -> Path:
    path.write_bytes(source.read_bytes().replace(old, new))
    return path


def write_all(folder: Path) -> None:
    """Writes the files whose frames can be read, each under its name; see the names in test_wild_videos."""
    for name in ("h264.mp4", "h264.avi", "h264.asf", "h264.mkv", "h264.flv", "h264.ts"):
        encode(folder / name, "libx264")
    encode(folder / "h264_index_first.mp4", "libx264", muxer={"movflags": "faststart"})
    encode(folder / "h264_fragments.mp4", "libx264", muxer={"movflags": "frag_keyframe+empty_moov"})
    encode(folder / "long_sound.mkv", "libx264", sound=6.0)
    encode(folder / "long_sound_index_first.mp4", "libx264", sound=6.0, muxer={"movflags": "faststart"})
    encode(folder / "hevc.mp4", "libx265")
    encode(folder / "av1.mp4", "libsvtav1")
    encode(folder / "mpeg2.mpg", "mpeg2video")
    encode(folder / "mpeg2.avi", "mpeg2video")
    encode(folder / "wmv2.asf", "wmv2")
    for name in ("mpeg4.mp4", "mpeg4.avi"):
        encode(folder / name, "mpeg4")
    for name in ("vp9.webm", "vp9.mp4"):
        encode(folder / name, "libvpx-vp9")
    for name in ("vp8.webm", "vp8.avi"):
        encode(folder / name, "libvpx")
    for name in ("vp8_hidden.webm", "vp8_hidden.avi"):
        remux(folder / "vp8.webm", folder / name, hide_some)
    remux(folder / "h264.avi", folder / "h264_from_avi.mkv", stamp_in_order_of_decoding)
    remux(folder / "h264.mp4", folder / "h264_from_avi.mp4", stamp_in_order_of_decoding)
    remux(folder / "mpeg4.avi", folder / "mpeg4_from_avi.mkv", stamp_in_order_of_decoding)
    pack_b_frames(folder / "mpeg4.avi", folder / "packed.avi")
    pack_b_frames(folder / "mpeg4.mp4", folder / "packed.mp4")
    join(folder / "h264.ts", folder / "joined.ts")


if __name__ == "__main__":  # a process of its own: once decord is loaded, PyAV's VP9 encoder finds another libvpx
    write_all(Path(sys.argv[1]))
