"""Makes a data set that is ready to train on: every video decoded once, the broken ones set apart, lists, a manifest.

Kinetics-400 and Something-Something V2, from their own annotation files:
    python -m mvd.data.prepare /raw/k400 data/k400 --dataset k400 --train train.csv --val validate.csv --short-side 320
    python -m mvd.data.prepare /raw/ssv2 data/ssv2 --dataset ssv2 --train train.json --val validation.json \\
        --labels labels.json
Your own videos, one folder per class (a tenth of them is held out for validation):
    python -m mvd.data.prepare my-videos data/mine

The same command goes on where it was interrupted. `python launch/prepare.py`, with the same words and `--array 32`,
shares the work out over a SLURM cluster. Machines without SLURM can share it too: give each `--shard NUMBER/COUNT`
(from 0) with the same OUTPUT, then run the command once without: it takes over what the shards have checked, does what
is left, and writes the lists.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mvd.config import DATASETS, ConfigError
from mvd.data.annotations import class_count
from mvd.data.prepare.checking import Job, check_all, read_records, target_of
from mvd.data.prepare.listing import Found, class_numbers, find_class_folders, find_listed, read_list
from mvd.data.prepare.lists import paper_count, write_lists, write_manifest

KNOWN = [name for name, record in DATASETS.items() if record.media == "video" and not record.generated]
SPLITS = ("train", "val", "test")


def jobs_of(found: Sequence[Found], arguments: argparse.Namespace) -> list[Job]:
    """One job a file, however often it is listed; prints how many that are.

    Raises:
        ConfigError: there are none.
    """
    videos, output = arguments.videos, arguments.output
    sources = sorted({item.path for item in found if item.path is not None})
    missing = sum(item.path is None for item in found)
    print(f"{len(found):,} videos are listed, {missing:,} of them missing; {len(sources):,} files to check", flush=True)
    if not sources:
        raise ConfigError(f"none of the listed videos is below {videos}; check the folder and the lists")
    return [Job(path, target_of(path, videos, output), arguments.short_side) for path in sources]


def collect(arguments: argparse.Namespace) -> tuple[list[Found], dict[str, int]]:
    """The videos that are asked for and their classes' numbers; ConfigError for what cannot work."""
    videos = arguments.videos
    if arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}; give a number of processes, 1 or more")
    if not videos.is_dir():
        raise ConfigError(f"there is no folder {videos}; give the folder that holds the videos")
    files = {split: getattr(arguments, split) for split in SPLITS if getattr(arguments, split) is not None}
    if not files:
        found, numbers = find_class_folders(videos, arguments.val_share)
    else:
        lists = {split: read_list(file) for split, file in files.items()}
        numbers = class_numbers((item for listed in lists.values() for item in listed), arguments.labels)
        found = list(find_listed(videos, lists, numbers))
    if arguments.dataset is not None and class_count(numbers) > (known := DATASETS[arguments.dataset].classes):
        raise ConfigError(f"the lists name {len(numbers)} classes, but {arguments.dataset} has {known}; check them")
    return found, numbers


def print_counts(counts: dict[str, Counter], dataset: str | None, classes: int) -> None:
    table = Table("split", "listed", "ready to train", "broken", "missing", "repeated", "the paper's list")
    for split, count in counts.items():
        paper = paper_count(dataset, split)
        values = (f"{count[name]:,}" for name in ("listed", "good", "broken", "missing", "repeated"))
        table.add_row(split, *values, "-" if paper is None else f"{paper:,}")
    Console().print(f"{classes} classes", table)


def main() -> int:
    parser = build_parser("python -m mvd.data.prepare", __doc__ or "")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="NUMBER/COUNT", help="this machine's share")
    return run(parser.parse_args())


def run(arguments: argparse.Namespace) -> int:
    """Runs the command, or a share of it; returns its exit code."""
    try:
        return prepare(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


def prepare(arguments: argparse.Namespace) -> int:
    found, numbers = collect(arguments)
    jobs, output = jobs_of(found, arguments), arguments.output
    if arguments.dry_run:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    check_all(jobs, output, arguments.shard, arguments.workers)
    if arguments.shard[1] > 1:
        print("this shard is done; once all are, the last job or the command without --shard writes the lists")
        return 0
    records = read_records(output)
    counts = write_lists(found, records, output)
    write_manifest(output, counts, records, numbers, arguments.dataset)
    print_counts(counts, arguments.dataset, len(numbers))
    print(f"broken and missing videos, with reasons: {output / 'quarantine.tsv'}")
    if not any(count["good"] for count in counts.values()):
        raise ConfigError(f"not one video can be trained on; see {output / 'quarantine.tsv'}")
    print_next(arguments.dataset, output, counts, class_count(numbers))
    return 0


def profile_name(dataset: str | None, output: Path) -> str:
    """What the cluster profile and row files may call a data set; the known names are not for one's own."""
    own = re.sub(r"[^A-Za-z0-9_-]", "_", output.name)
    return dataset or (f"my_{own}" if own in DATASETS else own)


def print_next(dataset: str | None, output: Path, counts: dict[str, Counter], classes: int) -> None:
    """What to write into which file now, and the next command."""
    name = profile_name(dataset, output)
    print(f"\nnext:\n  name it in cluster.yaml:\n    datasets: {{{name}: {{root: {output}}}}}")
    row = f"vitb_from_vitb_{name}"
    if dataset is None:
        row = "YOUR_ROW.py"
        numbers = {split: counts.get(split, Counter())["good"] for split in ("train", "val")}
        facts = f"classes={classes}, train_samples={numbers['train']}, val_samples={numbers['val']}"
        print(f"  declare it in a row file of your own (README, Your own videos):\n    Dataset({facts})")
    print(f"  look at what a row sees of it:\n    python -m mvd.data.inspect {row}")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """What this command takes, and launch/prepare.py too."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)
    parser.add_argument("videos", type=_path, help="folder that holds the videos, at any depth")
    parser.add_argument("output", type=_path, help="folder of the data set: lists, manifest, and videos written again")
    parser.add_argument("--dataset", choices=KNOWN, help="compare the counts with the paper's")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=_path, metavar="LIST", help=f"annotation file of the {split} videos")
    parser.add_argument("--labels", type=_path, help="Something-Something's labels.json")
    parser.add_argument("--val-share", type=float, default=0.1, help="held out of class folders (default: %(default)s)")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="write the videos again, this short at most")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--dry-run", action="store_true", help="only say what there is to do")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write NUMBER/COUNT with NUMBER from 0 to COUNT - 1")
    return int(number), int(count)
