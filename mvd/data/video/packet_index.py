"""An index of the packets of a data set's videos, so that a clip is read without opening its container.

`mvd.data.prepare` writes it beside the manifest, with a row for each video whose packets can be decoded from their
place in the file alone; the others are read as usual. A row counts only as long as the file has the size and the
modification time that it had then.
"""

import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext

from mvd.data.video.container import STRICT, VideoPacket
from mvd.data.video.errors import UnreadableVideo
from mvd.data.video.orientation import AS_STORED
from mvd.data.video.packets import PacketVideo

logger = logging.getLogger(__name__)

PACKET_INDEX = "packets.sqlite"
SCHEMA = """
    PRAGMA user_version = 1;
    CREATE TABLE videos
    (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, facts TEXT, header BLOB, packets BLOB)
"""


class State(NamedTuple):
    """What tells whether a file is the one that was indexed: its size in bytes and modification time in ns."""

    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> "State":
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class IndexedTrack:
    """A video track without the packets' bytes.

    decoder: FFmpeg's name of it; codec: of the codec; header: the decoder's extradata; colors: range, primaries,
    transfer and matrix, in FFmpeg's numbers; packets: int64 (5, N): position in the file, size in bytes, timestamp,
    whether it is a keyframe, and whether no other frame depends on it.
    """

    decoder: str
    codec: str
    header: bytes
    time_base: Fraction
    reorder_depth: int
    colors: tuple[int, int, int, int]
    packets: np.ndarray

    def to_row(self) -> tuple[str, bytes, bytes]:
        """Facts, header and packets as they are stored."""
        facts = [self.decoder, self.codec, str(self.time_base), self.reorder_depth, *self.colors]
        positions, sizes, times, *flags = self.packets
        gaps = positions - np.concatenate([[0], (positions + sizes)[:-1]])
        rows = np.stack([gaps, sizes, np.diff(times, prepend=0), *flags])  # small numbers, which compress
        return json.dumps(facts), self.header, zlib.compress(rows.astype("<i8").tobytes())

    @classmethod
    def from_row(cls, facts: str, header: bytes, packets: bytes) -> "IndexedTrack":
        decoder, codec, time_base, reorder_depth, *colors = json.loads(facts)
        gaps, sizes, steps, *flags = np.frombuffer(zlib.decompress(packets), "<i8").reshape(5, -1)
        rows = np.stack([np.cumsum(gaps + sizes) - sizes, sizes, np.cumsum(steps), *flags])
        return cls(decoder, codec, header, Fraction(time_base), reorder_depth, tuple(colors), rows)


class IndexedVideo(PacketVideo):
    """A video of which only the wanted frames' packets are read. It is closed with the object."""

    def __init__(self, path: str, file: FileIO, track: IndexedTrack) -> None:
        self._path, self._file = path, file
        self._positions, self._sizes, self._times, keyframes, disposable = track.packets.tolist()
        self._keyframes, self._disposable = keyframes, disposable
        self.codec, self.time_base, self.in_decoder_order = track.codec, track.time_base, False
        self._set_decoder(_decoder_of(track), track.reorder_depth)
        self._orientation = AS_STORED
        self._number_packets(
            self._times, [i for i, is_one in enumerate(keyframes) if is_one], [False] * len(self._times)
        )

    def __del__(self) -> None:
        self._file.close()

    def pictures(self, indices: np.ndarray) -> list[np.ndarray]:
        """See mvd.data.video.reader.Video. If that fails, the whole file is read, and that is what counts."""
        try:
            return super().pictures(indices)
        except UnreadableVideo:
            return PacketVideo(self._path).pictures(indices)

    def _load(self, numbers: Sequence[int]) -> list[VideoPacket]:
        """Read these packets, given in ascending order, at once."""
        start, last = self._positions[numbers[0]], numbers[-1]
        content = os.pread(self._file.fileno(), self._positions[last] + self._sizes[last] - start, start)
        packets = []
        for number in numbers:
            place = self._positions[number] - start
            packet = Packet(content[place : place + self._sizes[number]])
            packet.pts, packet.is_keyframe = self._times[number], bool(self._keyframes[number])
            packets.append(cast(VideoPacket, packet))
        return packets

    def is_disposable(self, number: int) -> bool:
        return bool(self._disposable[number])


def _decoder_of(track: IndexedTrack) -> VideoCodecContext:
    decoder = cast(VideoCodecContext, CodecContext.create(track.decoder, "r"))
    decoder.extradata = track.header or None
    decoder.color_range, decoder.color_primaries, decoder.color_trc, decoder.colorspace = track.colors
    decoder.options = STRICT.get(track.codec, {})
    decoder.thread_count = 1
    return decoder


class PacketIndex:
    """The packet index in a data set's folder, for the processes of a loader.

    Rows are looked up one by one, so that a list of any length costs no memory.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._opened_by, self._connection = 0, cast(sqlite3.Connection, None)
        self._has_warned = False

    @classmethod
    def of_folder(cls, root: str) -> "PacketIndex | None":
        """The index of a data set, if it has one."""
        file = Path(root).absolute() / PACKET_INDEX
        return cls(file) if file.is_file() else None

    def __getstate__(self) -> dict[str, Path]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["file"])  # type: ignore[misc]

    def open(self, path: str) -> IndexedVideo | None:
        """The video, if the index has it as it is now."""
        row = self.row(key_of(path, self.file.parent))
        if row is None:
            return None
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115, the video closes it
        except OSError:
            return None  # the usual way of reading says why
        if State.of(os.fstat(file.fileno())) != State(*row[:2]):
            file.close()
            self._warn(f"{path} has changed since {self.file} was written")
            return None
        try:
            return IndexedVideo(path, file, IndexedTrack.from_row(*row[2:]))
        except Exception as error:  # whatever a damaged row causes
            self._warn(f"the row of {path} in {self.file} is damaged ({error})")
            return None

    def row(self, key: str) -> tuple[int, int, str, bytes, bytes] | None:
        """A video's row, without its key; None if there is none, or the index cannot be read."""
        try:
            if self._opened_by != os.getpid():  # a connection must not be used after a fork
                self._connection = connect(self.file)
                self._opened_by = os.getpid()
            query = "SELECT size, changed, facts, header, packets FROM videos WHERE path = ?"
            found: tuple[int, int, str, bytes, bytes] | None = self._connection.execute(query, (key,)).fetchone()
            return found
        except (sqlite3.Error, UnicodeEncodeError) as error:
            self._warn(f"{self.file} cannot be read ({error})")
            return None

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            logger.warning(f"{reason}: whole files are read instead, which is slower; run mvd.data.prepare again")
        self._has_warned = True


def connect(file: Path) -> sqlite3.Connection:
    """Opens an index for reading, without locks: it is never changed, only replaced."""
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def key_of(path: str, folder: Path) -> str:
    """A video's key in the index of a folder: relative to the folder if it is in it, so that both can be moved."""
    prefix = f"{folder}{os.sep}"
    return path.removeprefix(prefix)
