"""Measures how well the features of an encoder separate classes: the cosine k-NN top-1 of the curve probe/knn_top1.

RUN is the run directory of a pre-training, a video teacher or a fine-tuning (its final weights, or else its newest good
checkpoint, of any number of processes and any ZeRO stage), one of its checkpoint folders, or a file of weights. The
videos are those of the row's fine-tuning if its run directory is beside this one, or else the run's own.

examples:
  python -m mvd.probe runs/pretrain-vitb_from_vitb_e400-cc3d28b5
  python -m mvd.probe runs/pretrain-vitb_from_vitb_e400-cc3d28b5/checkpoints/step-00023400
  python -m mvd.probe student.pth --data data/mine
  torchrun --standalone --nproc-per-node 8 -m mvd.probe runs/pretrain-vitb_from_vitb_e400-cc3d28b5
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mvd.config import SIZES, ConfigError, DatasetPaths, Finetune, Pretrain, Sampling, VideoTeacher, dataset_of
from mvd.data.annotations import Entry, Split, load_annotations
from mvd.data.datasets import load_entries
from mvd.data.views import ViewDataset, Views
from mvd.distributed.faults import HostFault
from mvd.distributed.process import Process, start_processes
from mvd.evaluation.probe import Probe, choose_videos, probe
from mvd.evaluation.trained import build_encoder
from mvd.export import build_network
from mvd.host import usable_cores
from mvd.models import build_classifier
from mvd.models.checkpoints import load_official
from mvd.models.encoder import VideoEncoder
from mvd.models.weight_files import read_weights
from mvd.run_directory import MANIFEST, RunDirectory
from mvd.stage import Stage
from mvd.train.checkpoint_reader import verify
from mvd.train.reshard import read_parameters
from mvd.weight_keys import plain_key

MOST_CLASSES = 1_000_000  # of lists without a data set's record
SPLITS: tuple[Split, Split] = ("train", "val")
VIDEOS_AT_ONCE = 8


class Source(NamedTuple):
    """Weights by name, what they are, and the stage that made them; None for a file."""

    weights: Mapping[str, Tensor]
    what: str
    stage: Stage | None = None


class Videos(NamedTuple):
    """The training and validation videos to choose from, and how a clip is sampled."""

    name: str
    train: list[Entry]
    val: list[Entry]
    sampling: Sampling
    stride: int


def read_source(place: Path, process: Process) -> Source:
    """Reads RUN (see above); all processes call it together.

    Raises:
        ConfigError: it is none of these, or has no good weights yet.
    """
    if place.is_file():
        return Source(read_weights(place).entries, str(place))
    is_checkpoint = (place / MANIFEST).is_file()
    files = RunDirectory(place.absolute().parents[1] if is_checkpoint else place)
    if not files.stage.is_file():
        raise ConfigError(f"{place} is not a file of weights, a run directory (with stage.yaml) or a checkpoint of one")
    stage = Stage.from_yaml(files.stage)
    stage = dataclasses.replace(stage, execution=dataclasses.replace(stage.execution, runs=str(files.path.parent)))
    if not isinstance(stage.recipe, Pretrain | VideoTeacher | Finetune):
        raise ConfigError(f"{stage.id} trains no video encoder; give the run of a pre-training or a fine-tuning")
    if files.weights.is_file() and not is_checkpoint:
        return Source(read_weights(files.weights).entries, f"{stage.id}, final weights", stage)
    for folder in [place] if is_checkpoint else reversed(files.complete_checkpoints()):
        manifest, damaged = verify(folder, process)
        if manifest is not None and not damaged:
            flat = read_parameters(folder, manifest["world_size"], manifest["zero_stage"])
            with torch.device("meta"):
                shapes = {name: weight.shape for name, weight in build_network(stage.recipe).named_parameters()}
            weights = {name: values.view(shapes[name]) for name, values in flat.items()}
            return Source(weights, f"{stage.id}, checkpoint of update {manifest['update']}", stage)
    raise ConfigError(f"{place} has no good checkpoint yet; wait for its first one, or give a file of weights")


def encoder_of(weights: Mapping[str, Tensor], what: str) -> tuple[VideoEncoder, str]:
    """The encoder that a student's, a video teacher's or a classifier's weights are of, and the name of its size.

    Raises:
        ConfigError: they are of another network.
    """
    shapes = {plain_key(name): tuple(weight.shape) for name, weight in weights.items()}
    embedding = shapes.get("patch_embed.proj.weight", ())
    sizes = [name for name, size in SIZES.items() if _embedding_shape(name) == embedding]
    if not sizes:
        raise ConfigError(f"{what} holds no video encoder of a size that this version has ({', '.join(SIZES)})")
    (name,) = sizes
    if "fc_norm.weight" in shapes:
        if "head.weight" not in shapes:
            raise ConfigError(f"{what} is a classifier without its head.weight; give the file before it was removed")
        model: VideoEncoder = build_classifier(name, num_classes=shapes["head.weight"][0])
    else:
        model = build_encoder(SIZES[name], of_video_teacher="encoder_to_decoder.weight" in shapes)
    load_official(model, weights)
    return model.requires_grad_(False).eval(), name


def _embedding_shape(name: str) -> tuple[int, ...]:
    clip = SIZES[name].clip
    return SIZES[name].encoder.width, 3, clip.tubelet, clip.patch_size, clip.patch_size


def find_videos(stage: Stage | None, folder: Path | None) -> Videos:
    """The videos of --data, or else of the fine-tuning that starts from the stage's weights, or else of the stage.

    Raises:
        ConfigError: a list is missing, or there is neither a folder nor a stage.
    """
    source = None if stage is None else _finetuning_of(stage) or stage
    sampling: Sampling = "dense"
    stride = 4
    if source is not None:
        recipe = source.recipe
        sampling = recipe.sampling if isinstance(recipe, Finetune) else dataset_of(recipe).sampling
        stride = recipe.stride
    if folder is not None:
        paths = DatasetPaths(root=str(folder))
        train, val = (load_annotations(paths, split, MOST_CLASSES) for split in SPLITS)
        return Videos(str(folder), train, val, sampling, stride)
    if source is None:
        raise ConfigError(
            "a file of weights does not say which videos to use; give --data FOLDER, as prepare writes it"
        )
    train, val = (load_entries(source, split) for split in SPLITS)
    return Videos(source.recipe.dataset, train, val, sampling, stride)


def _finetuning_of(stage: Stage) -> Stage | None:
    """The fine-tuning beside a run that starts from its weights; None if there is none, or if they use several sets."""
    found: dict[str, Stage] = {}
    for path in sorted(stage.directory.parent.glob("finetune-*/stage.yaml")):
        other = Stage.from_yaml(path)
        if Path(other.inputs.get("pretrain", "")).parent.name == stage.id:
            found[other.recipe.dataset] = other
    return next(iter(found.values())) if len(found) == 1 else None


def measure(place: Path, folder: Path | None, process: Process) -> str:
    """Probes RUN; returns one sentence with the result. All processes call it together.

    Raises:
        ConfigError: see `read_source`, `encoder_of` and `find_videos`.
    """
    source = read_source(place, process)
    videos = find_videos(source.stage, folder)
    encoder, name = encoder_of(source.weights, source.what)
    train, val = choose_videos(videos.train, videos.val)
    views = Views(videos.sampling, clips=1, crops=1, stride=videos.stride, clip=SIZES[name].clip)
    dataset = ViewDataset([*train, *val], views)
    gpu = process.device.type == "cuda"
    precision = source.stage.execution.precision if source.stage is not None else "bf16" if gpu else "fp32"
    total = -(-len(dataset) // process.world_size)
    with tqdm(total=total, unit="video", desc="probing", disable=not process.is_first) as bar:
        values = probe(
            encoder.to(process.device),
            dataset,
            len(train),
            process,
            precision,
            videos=VIDEOS_AT_ONCE,
            workers=usable_cores() if len(dataset) > VIDEOS_AT_ONCE else 0,
            show=lambda done: _advance(bar, done),
        )
    if values is None or Probe.metric not in values:
        raise ConfigError(f"no training or no validation video of {videos.name} can be read")
    chance = 100 / len({entry.label for entry in train})
    return (
        f"{source.what}: k-NN top-1 {values[Probe.metric]:.2f} % on {videos.name} ({len(train)} training and "
        f"{len(val)} validation videos, {values['probe/unreadable']:.0f} unreadable; chance is {chance:.1f} %)"
    )


def _advance(bar: "tqdm[Any]", done: int) -> None:
    bar.update(done - bar.n)


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns 0, or 2 for invalid arguments."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mvd.probe", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, checkpoint folder, or file of weights")
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="a prepared data set, with train.csv and val.csv")
    options = parser.parse_args(argv)
    try:
        if not options.run.exists():
            raise ConfigError(f"there is no file or folder {options.run}")
        process = start_processes()
        result = measure(options.run, options.data, process)
        if process.is_first:
            print(result)
    except (ConfigError, HostFault, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
