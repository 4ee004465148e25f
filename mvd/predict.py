"""Predicts the classes of videos with a trained classifier, on a GPU if there is one.

MODEL is a run directory of a fine-tuning, which gives the views of its data set's tests, or of a test, which has its
own; a .safetensors or .pth file; or an exported timm folder. Official .pth files work too; what they do not say about
their training is assumed, and printed. --features also takes a pre-trained student or a video teacher.

examples:
  python -m mvd.predict runs/finetune-mine-8aa3af5e video.mp4
  python -m mvd.predict weights.safetensors folder-of-videos --csv predictions.csv
  python -m mvd.predict weights.safetensors folder-of-videos --views 1    # one centre view instead of all views
  python -m mvd.predict runs/pretrain-vitb_from_vitb_e400-cc3d28b5 folder-of-videos --features features.npz

FEATURES.npz has `videos` (N paths), `mean` (N, width), the mean over all tokens and views, and `slices` (N, clips,
time slices of a clip, width), the means over the tokens of each time slice and over the crops.
"""

import argparse
import contextlib
import csv
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mvd.config import ConfigError, Sampling
from mvd.data.annotations import Entry
from mvd.data.on_device import normalise
from mvd.data.prepare.video_files import scan
from mvd.data.prepare.write_lists import printable
from mvd.data.views import ViewDataset, view_loader
from mvd.evaluation.features import mean_token, slice_means
from mvd.evaluation.protocol import Protocol
from mvd.evaluation.trained import Trained, load_trained
from mvd.files import write_atomically
from mvd.host import usable_cores
from mvd.models.classifier import Classifier

VIEWS_AT_ONCE = 16
WIDTH = 160  # columns, where the output is not a terminal


class Prediction(NamedTuple):
    """What a network says of a video; only path and reason if it cannot be read.

    probabilities: (classes,), or None if the network has no classes. mean, slices: see the module.
    """

    path: str
    reason: str = ""
    probabilities: NDArray[np.float64] | None = None
    mean: NDArray[np.float32] | None = None
    slices: NDArray[np.float32] | None = None


def predict(trained: Trained, videos: Sequence[str | Path], *, features: bool = False) -> Iterator[Prediction]:
    """One prediction per video, in order: softmax of each view, mean over the views, as in the test.

    features: compute `mean` and `slices` too.
    """
    entries = [Entry(str(Path(video).absolute()), 0) for video in videos]
    dataset = ViewDataset(entries, trained.protocol.views)
    workers = min(usable_cores(), len(entries)) if len(entries) > 1 else 0
    for (path, _), batch in zip(entries, view_loader(dataset, 0, 1, workers=workers), strict=True):
        if batch["views"]:
            yield _of_views(trained, path, batch["views"][0].cut(trained.device), features)
        else:
            yield Prediction(path, next(iter(batch["unreadable"].values())))


@torch.inference_mode()
def _of_views(trained: Trained, path: str, views: torch.Tensor, features: bool) -> Prediction:
    """views: uint8 (clips x crops, 3, T, S, S)."""
    model, protocol = trained.model, trained.protocol
    logits, means, slices = [], [], []
    with torch.autocast(trained.device.type, torch.bfloat16, enabled=trained.precision == "bf16"):
        for part in views.split(VIEWS_AT_ONCE):
            tokens = model.features(normalise(part))
            means.append(mean_token(model, tokens))
            if isinstance(model, Classifier):
                logits.append(model.head(means[-1]))
            if features:
                slices.append(slice_means(model, tokens))
    probabilities = torch.cat(logits).double().softmax(dim=1).mean(dim=0).cpu().numpy() if logits else None
    if not features:
        return Prediction(path, "", probabilities)
    by_clip = torch.cat(slices).float().unflatten(0, (protocol.clips, protocol.crops)).mean(dim=1)
    return Prediction(
        path, "", probabilities, torch.cat(means).float().mean(dim=0).cpu().numpy(), by_clip.cpu().numpy()
    )


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


def print_table(done: Iterable[Prediction], protocol: Protocol) -> None:
    """Prints the three most likely classes of each readable video."""
    table = Table("video", "class", "probability", "then")
    for prediction in done:
        if (probabilities := prediction.probabilities) is not None:
            best = np.argsort(-probabilities, kind="stable")[:3].tolist()
            first, *rest = [(protocol.name(number), f"{probabilities[number]:.1%}") for number in best]
            table.add_row(
                printable(os.path.relpath(prediction.path)), *first, ", ".join(" ".join(pair) for pair in rest)
            )
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False).print(table)


@contextlib.contextmanager
def csv_writer(file: Path | None, protocol: Protocol) -> Iterator[Callable[[Prediction], None]]:
    """Writes a line per video as soon as it is called: path, likeliest class, reason if unreadable, probabilities."""
    if file is None:
        yield lambda _: None
        return
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
        writer = csv.writer(handle)
        writer.writerow(["video", "class", "unreadable", *map(protocol.name, range(protocol.classes))])

        def write(prediction: Prediction) -> None:
            values = prediction.probabilities
            best = "" if values is None else protocol.name(int(values.argmax()))
            numbers = [] if values is None else values.tolist()
            writer.writerow([prediction.path, best, prediction.reason, *numbers])
            handle.flush()

        yield write


def write_features(file: Path, done: Sequence[Prediction]) -> None:
    """Writes the features of the readable videos; see the module for the arrays."""
    read = [prediction for prediction in done if prediction.mean is not None]
    arrays: dict[str, Any] = {"videos": np.array([prediction.path for prediction in read])}
    arrays |= {name: np.array([getattr(prediction, name) for prediction in read]) for name in ("mean", "slices")}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            np.savez(handle, **arrays)

    write_atomically(file, write)


def check_outputs(files: Iterable[Path | None]) -> None:
    """Raises ConfigError if one of the files cannot be written, before hours of work."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"the folder {file.absolute().parent} does not exist; create it, or choose another file")
        if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
            raise ConfigError(f"{file} must be a file that can be written; choose another one")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mvd.predict", description=__doc__, formatter_class=formatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="run directory, weights file or timm folder")
    parser.add_argument("videos", metavar="VIDEO_OR_FOLDER", type=Path, nargs="+", help="videos, or folders of them")
    parser.add_argument("--views", metavar="N", type=int, help="N clips with one centre crop (default: the test's)")
    parser.add_argument("--sampling", choices=get_args(Sampling), help="of frames (default: the model's)")
    parser.add_argument("--stride", metavar="N", type=int, help="frames between those of a clip (default: the model's)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all probabilities to this file")
    parser.add_argument("--features", metavar="FILE.npz", type=Path, help="write the encoder's features to this file")
    options = parser.parse_args(argv)
    for name in ("views", "stride"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    check_outputs([options.csv, options.features])
    return options


def load(options: argparse.Namespace) -> Trained:
    """The network, with the views of the command line; ConfigError if it cannot do what is asked for."""
    trained = load_trained(options.model)
    changes = {name: value for name in ("sampling", "stride") if (value := getattr(options, name)) is not None}
    if options.views is not None:
        changes |= {"clips": options.views, "crops": 1}
    if not trained.protocol.classes and (options.features is None or options.csv is not None):
        raise ConfigError(
            f"{options.model} has no classification head; fine-tune it first, or give --features FILE.npz without --csv"
        )
    return trained._replace(protocol=dataclasses.replace(trained.protocol, **changes))


def run(options: argparse.Namespace) -> int:
    """Predicts and writes everything; returns 0, or 1 if no video could be read."""
    videos = find_videos(options.videos)
    trained = load(options)
    pause = 0.5 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    done = []
    with csv_writer(options.csv, trained.protocol) as write:
        predictions = predict(trained, videos, features=options.features is not None)
        for prediction in tqdm(predictions, "predicting", len(videos), unit="video", mininterval=pause):
            write(prediction)
            done.append(prediction)
            if prediction.reason:
                tqdm.write(printable(f"unreadable: {prediction.path}: {prediction.reason}"), file=sys.stderr)
    if trained.protocol.classes:
        print_table(done, trained.protocol)
    if options.features is not None:
        write_features(options.features, done)
    for file in (options.csv, options.features):
        if file is not None:
            print(f"wrote {file}")
    return int(all(prediction.reason for prediction in done))


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns 0, 1 if no video could be read, 2 for invalid arguments, or 130 if interrupted."""
    try:
        return run(parse(argv))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; a file of --csv has the videos so far", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
