"""Prepares a data set for training: decodes every video once, quarantines broken ones, writes lists and a manifest.

Kinetics-400 and Something-Something V2, from their own annotation files:
    python -m mvd.data.prepare /raw/k400 data/k400 --dataset k400 --train train.csv --val validate.csv --short-side 320
    python -m mvd.data.prepare /raw/ssv2 data/ssv2 --dataset ssv2 --train train.json --val validation.json
UCF101 and HMDB51 (also --dataset ucf101_split2, ...; HMDB51 has its lists in one folder):
    python -m mvd.data.prepare UCF-101 data/ucf101 --dataset ucf101 --train trainlist01.txt --val testlist01.txt
    python -m mvd.data.prepare hmdb51_org data/hmdb51 --dataset hmdb51 --train testTrainMulti_7030_splits
Lists of your own (`path label` lines; tabs, commas and a header are understood as well):
    python -m mvd.data.prepare my-videos data/mine --train train.txt --val val.txt
Your own videos, one folder per class, in VIDEOS itself or in its folders train, val and test (without val, a tenth of
the training videos is held out for validation; --test-share holds out others for the test):
    python -m mvd.data.prepare my-videos data/mine --test-share 0.1

For videos of your own it also writes a row file into OUTPUT, with settings that fit the number of videos.

The same command continues an interrupted run. `python launch/prepare.py`, with the same arguments and `--array 32`,
distributes the work over a SLURM cluster. Machines without SLURM can share it too: give each `--shard NUMBER/COUNT`
(from 0) with the same OUTPUT, then run the command once without: it uses the results of all shards, checks what is
left, and writes the lists.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mvd.config import DATASETS, ConfigError
from mvd.data.annotations import class_count
from mvd.data.prepare.annotation_lists import Listed, read_list
from mvd.data.prepare.checking import Job, check_all, read_records, target_of
from mvd.data.prepare.class_numbers import Numbering, check_count, number_classes
from mvd.data.prepare.find_videos import Found, find_class_folders, find_listed
from mvd.data.prepare.hmdb51 import read_hmdb51
from mvd.data.prepare.index_packets import write_packet_index
from mvd.data.prepare.request import SPLITS, check_output, request_of
from mvd.data.prepare.row_file import STUDENTS, facts_of, write_row
from mvd.data.prepare.summary import print_next, print_summary, profile_name
from mvd.data.prepare.video_files import MISSING, scan
from mvd.data.prepare.write_lists import count, sort_out, write_lists, write_manifest

KNOWN = [name for name, record in DATASETS.items() if record.media == "video" and not record.generated]
SMALLEST = 16  # pixels of a short side: a patch of the networks


class Collected(NamedTuple):
    """The videos of a data set, their classes, and how many files of which kind are left out."""

    found: list[Found]
    numbering: Numbering
    left_out: Counter[str]


def collect(arguments: argparse.Namespace) -> Collected:
    """The videos that are asked for.

    Raises:
        ConfigError: an invalid argument, list or folder.
    """
    check_arguments(arguments)
    videos, output = arguments.videos, arguments.output
    lists = read_lists(arguments)
    paths, left_out = scan(videos, output)
    if lists:
        numbering = number_classes(lists.values(), arguments.labels, arguments.dataset)
        found = list(find_listed(videos, paths, lists, numbering.by_label))
        left_out = Counter()  # only what is listed counts
    else:
        shares = arguments.val_share, arguments.test_share
        found, numbering, loose = find_class_folders(videos, paths, shares[0], arguments.dataset, shares[1])
        left_out += loose
    check_count(numbering, arguments.dataset)
    return Collected(found, numbering, left_out)


def read_lists(arguments: argparse.Namespace) -> dict[str, Sequence[Listed]]:
    """Split -> its list, for the lists that are given.

    Raises:
        ConfigError: a list that is missing or has an unknown format.
    """
    files = {split: getattr(arguments, split) for split in SPLITS if getattr(arguments, split) is not None}
    train = files.get("train")
    if train is not None and train.is_dir():
        return read_hmdb51(files.pop("train"), arguments.dataset, files)
    return {split: read_list(file) for split, file in files.items()}


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that cannot work."""
    videos, output, side = arguments.videos, arguments.output, arguments.short_side
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    for name in ("val_share", "test_share"):
        if not 0 <= (share := getattr(arguments, name)) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be a fraction from 0 to below 1, such as 0.1 for a tenth, got {share:g}")
    if side is not None and side < SMALLEST:
        raise ConfigError(f"--short-side must be at least {SMALLEST} pixels, got {side}")
    if not videos.is_dir():
        raise ConfigError(f"there is no folder {videos}; give the folder that holds the videos")
    own = (output.resolve(), output.resolve() / "videos")  # re-encoded videos are written to the second one
    if videos.resolve() in own:
        raise ConfigError(f"OUTPUT must be another folder than VIDEOS, got {output} and {videos}")
    has_lists = any(getattr(arguments, split) for split in SPLITS)
    if arguments.labels is not None and not has_lists:
        raise ConfigError("--labels belongs to lists; give --train LIST, or leave it out for class folders")
    if arguments.test_share and has_lists:
        raise ConfigError("--test-share belongs to class folders; give --test LIST, or leave the lists out")
    check_output(output, request_of(arguments))


def jobs_of(found: Sequence[Found], arguments: argparse.Namespace) -> list[Job]:
    """One job per file, even if it is listed several times; prints how many there are.

    Raises:
        ConfigError: there are none.
    """
    videos, output = arguments.videos, arguments.output
    sources = sorted({item.path for item in found if item.path is not None})
    missing = sum(item.reason == MISSING for item in found)
    unusable = sum(item.path is None for item in found) - missing
    others = f", {unusable:,} unusable" if unusable else ""
    print(
        f"{len(found):,} videos are listed, {missing:,} of them missing{others}; {len(sources):,} files to check",
        flush=True,
    )
    if not sources:
        example = f", such as {found[0].name!r}" if found else ""
        raise ConfigError(f"none of the listed videos{example} is below {videos}; check the folder and the lists")
    return [Job(path, target_of(path, videos, output), arguments.short_side) for path in sources]


def main() -> int:
    parser = build_parser("python -m mvd.data.prepare", __doc__ or "")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="NUMBER/COUNT", help="this machine's share")
    return run(parser.parse_args())


def run(arguments: argparse.Namespace) -> int:
    """Runs the command, or a share of it; returns its exit code."""
    try:
        return prepare(arguments)
    except ConfigError as error:
        print(f"error: {error}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; OUTPUT is {arguments.output}; fix that and run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue", file=sys.stderr)
        return 130


def prepare(arguments: argparse.Namespace) -> int:
    """Checks the videos and writes the data set; raises ConfigError if that cannot work."""
    found, numbering, left_out = collect(arguments)
    if numbering.note:
        print(numbering.note)
    jobs, output = jobs_of(found, arguments), arguments.output
    if arguments.dry_run:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    check_all(jobs, output, arguments.shard, arguments.workers)
    if arguments.shard[1] > 1:
        print("this shard is done; once all are, the last job or the command without --shard writes the lists")
        return 0
    known = read_records(output)
    records = {name: known[name] for job in jobs if (name := str(job.source)) in known}  # not of files that are gone
    good, quarantined = sort_out(found, records)
    counts = count(good, quarantined)
    write_lists(good, quarantined, output)
    write_manifest(output, counts, list(records.values()), numbering.names, request_of(arguments))
    usable = (record.path for record in records.values() if record.path is not None)
    write_packet_index(usable, output, arguments.workers)
    print_summary(counts, quarantined, left_out, arguments.dataset, class_count(numbering.names))
    print(f"quarantined videos, with reasons: {output / 'quarantine.tsv'}")
    if not any(values["good"] for values in counts.values()):
        raise ConfigError(f"no video can be used; see {output / 'quarantine.tsv'}")
    row = None
    if arguments.dataset is None:
        frames = [record.facts["frames"] for record in records.values() if record.facts is not None]
        facts = facts_of(counts, class_count(numbering.names))
        row = write_row(profile_name(None, output), facts, arguments.size, int(median(frames)), output)
    print_next(arguments.dataset, output, row)
    return 0


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments of this command, which launch/prepare.py takes too."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)
    parser.add_argument("videos", type=_path, help="folder that holds the videos, at any depth")
    parser.add_argument("output", type=_path, help="folder of the data set: lists, manifest, re-encoded videos")
    parser.add_argument("--dataset", choices=KNOWN, help="use its class indices, and compare counts with the paper's")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=_path, metavar="LIST", help=f"annotation file of the {split} videos")
    parser.add_argument(
        "--labels", type=_path, metavar="FILE", help="class names and numbers, such as labels.json or classInd.txt"
    )
    parser.add_argument(
        "--val-share",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="held out of the training folders for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="held out of the training folders for the test (default: 0, test on the validation videos)",
    )
    parser.add_argument("--size", choices=STUDENTS, help="network of the row file (default: small, a ViT-S)")
    parser.add_argument(
        "--short-side", type=int, metavar="PIXELS", help="re-encode the videos, shrunk to this short side"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be NUMBER/COUNT with NUMBER from 0 to COUNT - 1, got {text!r}")
    return int(match[1]), int(match[2])
