"""Whether this machine can read the data at all, for the checks before the start (mvd.distributed.preflight)."""

from collections.abc import Callable, Sequence

from mvd.data.annotations import Entry, fingerprint
from mvd.data.video.errors import Unreadable
from mvd.data.video.reader import open_video, read_image
from mvd.distributed.preflight import SampleCheck

FILES = 3
SPREAD = 7919  # a prime, so that the files that processes read are spread over the list


def check_samples(entries: Sequence[Entry], reader: str) -> SampleCheck:
    """A check that opens three files of a list, different ones on each process, with that reader of videos."""
    return SampleCheck(f"the list {fingerprint(entries)}", _reading(entries, reader))


def _reading(entries: Sequence[Entry], reader: str) -> Callable[[int], None]:
    def read(rank: int) -> None:
        """Raises RuntimeError if none of the files can be read: a single broken file says nothing of the machine."""
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
            raise RuntimeError(f"no sample of {count} can be read: {reasons[-1]}")

    return read
