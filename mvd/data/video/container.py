"""Reads the compressed packets of a video file, and refuses a file that is shorter than its header declares."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias, cast

import av
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from mvd.data.video.errors import UnreadableVideo

VideoPacket: TypeAlias = "Packet[VideoStream]"

# Seconds, and share of the duration, that may be missing at the end: muxers differ in how they count the last frames.
SLACK, SLACK_SHARE = 0.5, 0.01
# FFmpeg's own VP9 decoder decodes damaged bytes without an error. libvpx reports them, at the same speed.
REPORTING_DECODERS = {"vp9": "libvpx-vp9"}
# Makes FFmpeg's HEVC decoder fail, instead of inventing a reference frame that is missing.
STRICT = {"hevc": {"err_detect": "explode"}}
ROLL = b"\x76\x75"  # Matroska's ProjectionPoseRoll


@dataclass
class Track:
    """The packets of a file's video track, and a decoder for them.

    container: FFmpeg's short name for the format ("mov", "matroska", "avi"); native: FFmpeg's own decoder with the
    container's display matrix, if `decoder` is another one; rate: frames per second.
    """

    packets: list[VideoPacket]
    decoder: VideoCodecContext
    native: VideoCodecContext | None
    codec: str
    container: str
    time_base: Fraction
    rate: Fraction


def read_track(path: str) -> Track:
    """Reads all packets of a file's best video track.

    Raises:
        UnreadableVideo: there is no video track or no decoder for it, it is encrypted, or the file is truncated.
    """
    with _open(path) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or Disposition.attached_pic in stream.disposition:
            raise UnreadableVideo(path, "it has no video stream")
        native: VideoCodecContext | None = stream.codec_context
        if native is None:
            raise UnreadableVideo(path, "there is no decoder for its video codec")
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        demuxed = list(container.demux(stream))
        packets = [packet for packet in demuxed if packet.size]
        if any(packet.is_keyframe and packet.has_sidedata("encryption_info") for packet in packets):
            raise UnreadableVideo(path, "it is encrypted")
        name = container.format.name.split(",")[0]
        if truncated := _find_truncation(container, stream, demuxed, name):
            raise UnreadableVideo(path, f"it is truncated: {truncated}")
        if stream.time_base is None:
            raise UnreadableVideo(path, "its video stream has no time base")
        decoder = _decoder(native)
        turned = decoder is not native and _may_be_turned(path, name, packets)
        rate = stream.average_rate or Fraction(25)
        return Track(packets, decoder, native if turned else None, native.name, name, stream.time_base, rate)


def _open(path: str) -> InputContainer:
    try:
        return av.open(path, metadata_errors="replace")
    except av.InvalidDataError as error:
        raise UnreadableVideo(path, "its header or index is missing or damaged") from error


def _decoder(native: VideoCodecContext) -> VideoCodecContext:
    """The decoder that reports damage best, on one thread."""
    name = REPORTING_DECODERS.get(native.name)
    decoder = native if name is None else cast(VideoCodecContext, CodecContext.create(name, "r"))
    decoder.options = STRICT.get(native.name, {})
    decoder.thread_count = 1
    return decoder


def _may_be_turned(path: str, name: str, packets: list[VideoPacket]) -> bool:
    """Whether a container may hold a display matrix, which PyAV shows on decoded frames only."""
    if name != "matroska" or not packets:
        return name == "mov"
    with open(path, "rb") as file:
        return ROLL in file.read(packets[0].pos or 0)


def _find_truncation(container: InputContainer, stream: VideoStream, packets: list[VideoPacket], name: str) -> str:
    """What shows that the file ends early, or "". Formats that declare no length, as MPEG-TS, show nothing."""
    if name != "mpegts" and any(packet.is_corrupt for packet in packets):
        return "it ends in the middle of a frame"
    declared = len(stream.index_entries) if name == "mov" else 0
    if len(packets) <= declared and (held := sum(packet.dts is not None for packet in packets)) < declared:
        return f"it holds {held} of {declared} frames"
    if name == "asf" and container.duration is None:
        return "its size is not the one that its header declares"
    seconds = _declared_seconds(container, stream, name)
    tolerated = seconds * (1 - SLACK_SHARE) - SLACK
    if tolerated > 0 and _end(packets) < tolerated and (end := _end_of_all_streams(container.name)) < tolerated:
        return f"it ends after {end:.2f} of {seconds:.2f} s"
    return ""


def _declared_seconds(container: InputContainer, stream: VideoStream, name: str) -> float:
    """The duration in the header, as far as the format has one and FFmpeg does not estimate it from the file's size."""
    if name == "avi" and stream.time_base is not None:
        return float(stream.frames * stream.time_base)
    return (container.duration or 0) / av.time_base if name in ("matroska", "asf", "flv") else 0.0


def _end(packets: Sequence["Packet[Any]"]) -> float:
    """When the last of one stream's packets ends, in seconds."""
    times = ((packet.dts if packet.pts is None else packet.pts, packet) for packet in packets)
    ends = (time + (packet.duration or 0) for time, packet in times if time is not None)
    return float(max(ends, default=0) * packets[0].time_base) if packets else 0.0


def _end_of_all_streams(path: str) -> float:
    """When a file's last packet of any kind ends, in seconds: the declared duration may be that of the sound."""
    with _open(path) as container:
        return max((_end([packet]) for packet in container.demux() if packet.size), default=0.0)
