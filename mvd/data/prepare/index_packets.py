"""Writes the packet index of a prepared data set (mvd.data.video.packet_index), in parallel processes."""

import os
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvd.data.video.container import Track, VideoPacket, read_track
from mvd.data.video.errors import Unreadable
from mvd.data.video.orientation import AS_STORED
from mvd.data.video.packet_index import (
    PACKET_INDEX,
    SCHEMA,
    IndexedTrack,
    IndexedVideo,
    State,
    connect,
    key_of,
)
from mvd.data.video.packets import PacketVideo
from mvd.data.workers import follow_parent
from mvd.files import write_atomically

Row = tuple[str, int, int, str, bytes, bytes]
WORTH_PROCESSES = 64  # videos
PLACES_COMPARED = 4
LONGEST_HEADER = 64  # bytes, of a packet in a container


def write_packet_index(paths: Iterable[str], output: Path, workers: int) -> None:
    """Indexes these videos in OUTPUT/packets.sqlite; rows of files that have not changed are kept."""
    unique = sorted(set(paths))
    kept = {row[0]: row for row in _rows_of(output / PACKET_INDEX)}
    rows = [kept[key] for path in unique if (key := key_of(path, output)) in kept and _is_current(path, kept[key])]
    done = {row[0] for row in rows}
    left = [path for path in unique if key_of(path, output) not in done]
    rows += _index_all(left, output, workers)
    write_atomically(output / PACKET_INDEX, partial(_write, rows))


def _rows_of(file: Path) -> list[Row]:
    """The rows of an index; none if there is none that can be read."""
    with suppress(sqlite3.Error), closing(connect(file)) as connection:
        return list(connection.execute("SELECT * FROM videos"))
    return []


def _is_current(path: str, row: Row) -> bool:
    try:
        return State.of(os.stat(path)) == State(*row[1:3])
    except OSError:
        return False


def _index_all(paths: Sequence[str], output: Path, workers: int) -> list[Row]:
    pause = 1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    index = partial(index_video, folder=output)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), follow_parent)  # starts processes when they are needed
    try:
        rows = map(index, paths) if len(paths) < WORTH_PROCESSES else pool.map(index, paths, chunksize=8)
        progress = tqdm(rows, "indexing", len(paths), unit="video", mininterval=pause, dynamic_ncols=True)
        return [row for row in progress if row is not None]
    finally:
        pool.shutdown(cancel_futures=True)


def _write(rows: Iterable[Row], file: Path) -> None:
    file.unlink(missing_ok=True)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.executescript(SCHEMA)
        connection.executemany("INSERT INTO videos VALUES (?, ?, ?, ?, ?, ?)", sorted(rows))


def index_video(path: str, folder: Path) -> Row | None:
    """A video's row in the index of a folder; None if it has to be read as a whole."""
    try:
        with open(path, "rb") as file:
            state = State.of(os.fstat(file.fileno()))
            content = file.read()
        track = index_track(PacketVideo(path), read_track(path), content)
        if track is None or not _gives_same_frames(path, track):
            return None
    except (Unreadable, OSError):
        return None
    return key_of(path, folder), *state, *track.to_row()


def index_track(video: PacketVideo, track: Track, content: bytes) -> IndexedTrack | None:
    """What the index holds of a video; None if its packets are not all that decoding it takes."""
    packets, decoder = track.packets, track.decoder
    plain = all(
        packet.pts is not None and packet.pos is not None and not packet.is_discard and not any(packet.iter_sidedata())
        for packet in packets
    )
    if not plain or video.in_decoder_order:
        return None
    places = [_place_of(packet, content) for packet in packets]
    if -1 in places:
        return None
    colors = (decoder.color_range, decoder.color_primaries, decoder.color_trc, decoder.colorspace)
    rows = [
        (place, packet.size, packet.pts, packet.is_keyframe, video.is_disposable(number))
        for number, (place, packet) in enumerate(zip(places, packets, strict=True))
    ]
    return IndexedTrack(
        decoder=decoder.name,
        codec=track.codec,
        header=decoder.extradata or b"",
        time_base=track.time_base,
        reorder_depth=decoder.reorder_depth,
        colors=colors,
        packets=np.array(rows, np.int64).T,
    )


def _place_of(packet: VideoPacket, content: bytes) -> int:
    """Where the file has the packet's bytes in one piece, -1 if nowhere: a container may put a header before them."""
    start = packet.pos or 0
    return content.find(bytes(packet), start, start + packet.size + LONGEST_HEADER)


def _gives_same_frames(path: str, track: IndexedTrack) -> bool:
    """Whether some frames, read with the index, are those that are read without, and need no turning."""
    plain = PacketVideo(path)
    wanted = np.unique(np.linspace(0, len(plain) - 1, PLACES_COMPARED).astype(int))
    if any(plain.orientation(frame) != AS_STORED for frame in islice(plain.decode_all(), 1)):
        return False
    with open(path, "rb", buffering=0) as file:
        video = IndexedVideo(path, file, track)
        return len(video) == len(plain) and np.array_equal(video.frames(wanted), plain.frames(wanted))
