"""Pre-start check that a machine can read the data at all (see mvd.distributed.preflight)."""

from collections.abc import Callable, Sequence

from mvd.data.annotations import Entry, fingerprint
from mvd.data.video.errors import Unreadable
from mvd.data.video.reader import open_video, read_image
from mvd.distributed.preflight import SampleCheck

FILES = 3
SPREAD = 7919  # a prime: spreads the files that the ranks read over the list


def check_samples(entries: Sequence[Entry], reader: str) -> SampleCheck:
    """A check that opens three files of a list, different ones on each rank."""
    return SampleCheck(f"the list {fingerprint(entries)}", _reading(entries, reader))


def _reading(entries: Sequence[Entry], reader: str) -> Callable[[int], None]:
    def read(rank: int) -> None:
        """Raise RuntimeError if all of the files are unreadable: one broken file is no evidence of a bad machine."""
        reasons = []
        count = min(FILES, len(entries))
        for number in range(count):
            path = entries[(rank * FILES + number) * SPREAD % len(entries)].path
            try:
                if path.lower().endswith((".jpeg", ".jpg", ".png")):
                    read_image(path)
                else:
                    open_video(path, reader)
            except Unreadable as error:
                reasons.append(str(error))
        if reasons and len(reasons) == count:
            raise RuntimeError(f"{count} of {count} files cannot be read: {reasons[-1]}")

    return read
