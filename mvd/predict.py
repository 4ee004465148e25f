"""Predicts the classes of videos with a trained classifier, on a GPU if there is one, with the views of its test.

MODEL is a run directory of a fine-tuning or a test, or a .safetensors file that a fine-tuning has written.

examples:
  python -m mvd.predict runs/finetune-mine-8aa3af5e video.mp4
  python -m mvd.predict weights.safetensors folder-of-videos --csv predictions.csv
  python -m mvd.predict weights.safetensors folder-of-videos --quick    # one centre view instead of all views
"""

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from mvd.config import ConfigError, Precision
from mvd.data.annotations import Entry
from mvd.data.on_device import normalise
from mvd.data.prepare.video_files import scan
from mvd.data.views import ViewDataset, view_loader
from mvd.evaluation.protocol import KEY, Protocol, protocol_of, read_description
from mvd.host import usable_cores
from mvd.models import build_classifier
from mvd.models.checkpoints import load_official
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

VIEWS_AT_ONCE = 16


class Loaded(NamedTuple):
    """A classifier in evaluation mode on its device, and how it is applied."""

    model: nn.Module
    protocol: Protocol
    precision: Precision
    device: torch.device


class Prediction(NamedTuple):
    """The probabilities of a video (classes,), or None and the reason why it cannot be read."""

    path: str
    probabilities: NDArray[np.float64] | None
    reason: str = ""


def load_classifier(source: str | Path) -> Loaded:
    """Loads MODEL (see above).

    Raises:
        ConfigError: it is something else, or its weights do not fit.
    """
    source = Path(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    if source.is_dir():
        files = RunDirectory(source)
        if not files.stage.is_file():
            raise ConfigError(f"{source} is not a run directory (it has no stage.yaml)")
        stage = Stage.from_yaml(files.stage)
        protocol, precision = protocol_of(stage), stage.execution.precision
        weights = Path(stage.inputs["finetune"]) if stage.kind == "test" else files.weights
    else:
        text = read_description(source) if source.suffix == ".safetensors" and source.is_file() else None
        if text is None:
            raise ConfigError(f"{source} is not a .safetensors file with a description ({KEY}); give a run directory")
        protocol, weights = Protocol.from_dict(json.loads(text), str(source)), source
    if not protocol.classes:
        raise ConfigError(f"{source} has no classification head; fine-tune it first")
    model = build_classifier(protocol.size, num_classes=protocol.classes)
    report = load_official(model, weights)
    if report.missing:
        raise ConfigError(f"{weights} lacks {', '.join(report.missing)}; use the weights of a fine-tuning")
    return Loaded(model.eval().to(device), protocol, precision, device)


@torch.inference_mode()
def predict(loaded: Loaded, videos: Sequence[str | Path]) -> Iterator[Prediction]:
    """One prediction per video, in order: softmax of each view, mean over the views, as in the test."""
    entries = [Entry(str(Path(video).absolute()), 0) for video in videos]
    dataset = ViewDataset(entries, loaded.protocol.views)
    workers = min(usable_cores(), len(entries)) if len(entries) > 1 else 0
    for (path, _), batch in zip(entries, view_loader(dataset, 0, 1, workers=workers), strict=True):
        if not batch["views"]:
            yield Prediction(path, None, next(iter(batch["unreadable"].values())))
            continue
        pixels = batch["views"][0].cut(loaded.device)
        with torch.autocast(loaded.device.type, torch.bfloat16, enabled=loaded.precision == "bf16"):
            logits = torch.cat([loaded.model(normalise(part)) for part in pixels.split(VIEWS_AT_ONCE)])
        yield Prediction(path, logits.double().softmax(dim=1).mean(dim=0).cpu().numpy())


def find_videos(places: Sequence[Path]) -> list[Path]:
    """The given files, and the videos below the given folders; ConfigError if there are none."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise ConfigError(f"there is no file or folder {place}")
        found += scan(place, place / ".none").videos if place.is_dir() else [place]
    if not found:
        raise ConfigError(f"there are no videos below {', '.join(map(str, places))}")
    return found


def print_table(done: Sequence[Prediction], protocol: Protocol) -> None:
    """Prints the three most likely classes of each readable video."""
    table = Table("video", "class", "probability", "then")
    for path, probabilities, _ in done:
        if probabilities is not None:
            best = np.argsort(-probabilities, kind="stable")[:3].tolist()
            first, *rest = [(protocol.name(number), f"{probabilities[number]:.1%}") for number in best]
            table.add_row(path, *first, ", ".join(" ".join(pair) for pair in rest))
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def write_csv(file: Path, done: Sequence[Prediction], protocol: Protocol) -> None:
    """One line per video: its path, the likeliest class, the reason if it is unreadable, and all probabilities."""
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["video", "class", "unreadable", *map(protocol.name, range(protocol.classes))])
        for path, values, reason in done:
            best = "" if values is None else protocol.name(int(values.argmax()))
            writer.writerow([path, best, reason, *([] if values is None else values.tolist())])


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns 0, 1 if no video could be read, or 2 for invalid arguments."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mvd.predict", description=__doc__, formatter_class=formatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="run directory or .safetensors file")
    parser.add_argument("videos", metavar="VIDEO_OR_FOLDER", type=Path, nargs="+", help="videos, or folders of them")
    parser.add_argument("--quick", action="store_true", help="one centre view instead of the views of the test")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all probabilities to this file")
    options = parser.parse_args(argv)
    try:
        videos = find_videos(options.videos)
        loaded = load_classifier(options.model)
        if options.quick:
            loaded = loaded._replace(protocol=dataclasses.replace(loaded.protocol, clips=1, crops=1))
        done = list(tqdm(predict(loaded, videos), total=len(videos), unit="video", desc="predicting"))
        print_table(done, loaded.protocol)
        if options.csv is not None:
            write_csv(options.csv, done, loaded.protocol)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for prediction in done:
        if prediction.probabilities is None:
            print(f"unreadable: {prediction.path}: {prediction.reason}", file=sys.stderr)
    return int(all(prediction.probabilities is None for prediction in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
