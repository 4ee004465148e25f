"""Exports the weights of a finished stage for other programs.

official      a .pth file with the state dict under `model`, as in the official releases of MVD, MAE and VideoMAE
safetensors   the same keys in a .safetensors file
timm          a folder for timm.create_model("local-dir:FOLDER", pretrained=True); classifiers only
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from mvd.config import ConfigError, Finetune, ImageTeacher, Pretrain, Recipe, VideoTeacher, dataset_of
from mvd.evaluation.protocol import KEY, describe, protocol_of
from mvd.files import write_atomically
from mvd.host import python_command
from mvd.models import build_classifier, build_image_autoencoder, build_student, build_video_autoencoder
from mvd.models.checkpoints import load_official, to_official
from mvd.models.registry import timm_name
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
EXAMPLES = """examples:
  python -m mvd.export runs/finetune-vitb_from_vitb_k400-8aa3af5e --to timm
  python -m mvd.export runs/pretrain-vitb_from_vitb_e400-cc3d28b5 --to official --output vitb_student.pth
"""


def export_official(model: nn.Module, stage: Stage, output: Path) -> None:
    """Writes the weights, with the stage's id, as a pickle that `torch.load(weights_only=True)` reads."""
    content = {"model": to_official(model), "stage": stage.id, **describe(stage)}
    write_atomically(output, lambda path: torch.save(content, path))


def export_safetensors(model: nn.Module, stage: Stage, output: Path) -> None:
    """Writes the official keys, with the stage's id in the file's metadata."""
    metadata = {"format": "pt", "stage": stage.id, **describe(stage)}
    write_atomically(output, lambda path: safetensors.torch.save_file(to_official(model), path, metadata))


def export_timm(model: nn.Module, stage: Stage, output: Path) -> None:
    """Writes timm's own folder: config.json, with the architecture and its input size, and model.safetensors."""
    classes = dataset_of(stage.recipe).classes
    registered = timm.create_model(timm_name(stage.recipe.size), num_classes=classes)
    registered.load_state_dict(model.state_dict())
    unfinished = output.with_name(f".{output.name}.unfinished")
    protocol = protocol_of(stage).as_dict()
    config = {"label_names": protocol["names"], KEY: protocol}
    try:
        save_for_hf(registered, str(unfinished), safe_serialization=True, model_config=config)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Format(NamedTuple):
    """A format: the end of its file names, and the function that writes it."""

    suffix: str
    write: Callable[[nn.Module, Stage, Path], None]


FORMATS = {
    "official": Format(".pth", export_official),
    "safetensors": Format(".safetensors", export_safetensors),
    "timm": Format("-timm", export_timm),
}


def export(directory: Path, form: str, output: Path | None = None) -> Path:
    """Writes a finished stage's weights in a format of FORMATS; returns the file, or for timm the folder.

    output: file to write; None for the stage's id in the current folder.

    Raises:
        ConfigError: the directory has no finished training stage, timm has no such network, or the output exists or
            cannot be written.
    """
    stage = read_stage(directory)
    if form == "timm" and not isinstance(stage.recipe, Finetune):
        raise ConfigError(f"--to timm needs a classifier, but {stage.id} has none; export it --to safetensors")
    output = output or Path(stage.id + FORMATS[form].suffix)
    check_suffix(form, output)
    if output.exists():
        raise ConfigError(f"{output} already exists; remove it, or choose another --output")
    if not output.absolute().parent.is_dir():
        raise ConfigError(
            f"the folder {output.absolute().parent} does not exist; create it, or choose another --output"
        )
    model = build_network(stage.recipe)
    load_official(model, RunDirectory(directory).weights)
    try:
        FORMATS[form].write(model, stage, output)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of torch and safetensors raise the others
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{output} cannot be written ({reason}); check the free space on its disk") from error
    return output


def check_suffix(form: str, output: Path) -> None:
    """Raises ConfigError for a file name that would be read as another format."""
    if form == "official" and output.suffix == ".safetensors":
        raise ConfigError(f"--to official writes a pickle, so --output must not end in .safetensors, got {output.name}")


def read_stage(directory: Path) -> Stage:
    """The stage of a run directory with final weights.

    Raises:
        ConfigError: it is not a run directory, or has no final weights.
    """
    if not RunDirectory(directory).stage.is_file():
        raise ConfigError(f"{directory} is not a run directory (it has no stage.yaml); choose one of the runs folder")
    stage = Stage.from_yaml(RunDirectory(directory).stage)
    if stage.kind == "test":
        tested = Path(stage.inputs["finetune"]).parent
        raise ConfigError(f"{stage.id} is a test and has no weights; export the stage that it tested, {tested}")
    if not (RunDirectory(directory).weights).is_file():
        raise ConfigError(f"{stage.id} is not finished (it has no weights.safetensors); run it to its end first")
    return stage


def build_network(recipe: Recipe) -> nn.Module:
    """The network that a recipe trains, freshly initialised."""
    match recipe:
        case ImageTeacher():
            return build_image_autoencoder(recipe.size)
        case VideoTeacher():
            return build_video_autoencoder(recipe.size)
        case Pretrain():
            return build_student(recipe.student, teacher=recipe.teacher)
        case Finetune():
            return build_classifier(recipe.size, num_classes=dataset_of(recipe).classes)
    raise ConfigError(f"a {type(recipe).__name__} trains no network")


def next_command(stage: Stage, form: str, output: Path) -> tuple[str, str]:
    """The next command for the exported weights, as (purpose, command line)."""
    place, recipe = str(output.absolute()), stage.recipe
    if form == "timm":
        name = json.dumps(f"local-dir:{place}")  # double quotes, since shlex.quote adds single ones
        code = f"import mvd.models, timm; print(timm.create_model({name}, pretrained=True))"
        return "build the model in Python", shlex.join([python_command(), "-c", code])
    submit = [python_command(), "-m", "launch.submit"]
    if isinstance(recipe, Finetune):
        row = stage.id.removeprefix("finetune-").rpartition("-")[0]
        if (EXPERIMENTS / f"{row}.py").is_file() and not dataset_of(recipe).generated:  # experiments/demo has more rows
            return "test it", shlex.join([*submit, row, f"finetune.weights={place}", "--dry-run"])
        return "classify videos of yours", shlex.join([python_command(), "-m", "mvd.predict", place, "VIDEOS"])
    if isinstance(recipe, Pretrain):
        return "fine-tune it, in a row of yours", shlex.join([*submit, "ROW", f"pretrain.weights={place}", "--dry-run"])
    teacher = f"cluster.teachers.{recipe.name}={place}"
    return "distil from it, in a row of yours", shlex.join([*submit, "ROW", teacher, "--dry-run"])


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def main(argv: Sequence[str]) -> int:
    """Runs the export of a command line; returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m mvd.export", description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="run directory of a finished training stage")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format, see above")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="file or folder to write (default: the stage's id, in the current folder)",
    )
    try:
        options = parser.parse_args(argv)
        output = export(options.directory, options.to, options.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}; fix that", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    purpose, line = next_command(Stage.from_yaml(RunDirectory(options.directory).stage), options.to, output)
    print(f"\nnext:\n  {purpose}:\n    {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
