"""Draws what the networks will see of a row's data: one picture to look at before GPUs are used.

Pre-training and the teachers: each cropped clip or image, and below it what the mask leaves visible. Fine-tuning: the
clips of pairs of videos of different classes that are mixed with each other, augmented, erased and mixed, with the
names of the videos and the weight of each class. Test: the middle frame of every view of each video. Videos are of
different classes, as far as the list has so many. `python -m mvd.data.inspect` is the same command.

TARGET and KEY=VALUE are those of submit.py. Of a suite, the first row is drawn.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project, not launch/

from launch.cli.output import command, counted, print_next
from launch.cli.parser import Parser, run_command
from launch.cluster import Cluster
from launch.plan.graph import Node, build_graph
from launch.plan.resolve import missing_settings
from mvd.config import ConfigError, DatasetPaths, dataset_of
from mvd.data.annotations import load_split
from mvd.data.class_names import class_names_of

EXAMPLES = """examples:
  python -m mvd.data.inspect vitb_from_vitb_k400                  with the data of cluster.yaml
  python -m mvd.data.inspect vitb_from_vitb_k400 --data data/k400
  python -m mvd.data.inspect mine.py finetune.augmentation.flip=0 --epoch 3 --output seen.png
"""
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def main(argv: Sequence[str]) -> int:
    """Checks the whole request, then draws the picture; returns the exit code."""
    request = build_parser().read(argv)
    options = request.options
    output: Path = options.output.expanduser()
    check_options(options.videos, options.epoch, output)
    row = request.rows[0]
    nodes = build_graph([row])
    if not nodes:
        raise ConfigError(f"{row.name} has no stage to draw: its weights are given; remove the setting of the weights")
    cluster = request.cluster
    if options.data is not None:
        nodes = [node for node in nodes if node.recipe.own_dataset is not None] or nodes
        cluster = with_folder(cluster, nodes, options.data)
    check_data(nodes, cluster)
    if len(request.rows) > 1:
        print(f"drawing {row.name}, the first of {len(request.rows)} rows")
    draw_stages(nodes, cluster, options.videos, options.epoch, output)
    print_next([("see the plan", command("submit.py", *request.words, "--dry-run"))])
    return 0


def build_parser() -> Parser:
    parser = Parser("inspect_data.py", __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="the folder of the row's own data, or of its data set (default: that of the cluster profile)",
    )
    parser.add_argument("--videos", type=int, default=4, help="videos to draw of each stage (default: %(default)s)")
    parser.add_argument("--epoch", type=int, default=0, help="whose random draws to show (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("inspect.png"),
        metavar="FILE",
        help="picture to write (default: %(default)s)",
    )
    return parser


def check_options(videos: int, epoch: int, output: Path) -> None:
    """Raises ConfigError for what cannot be drawn."""
    if videos < 1:
        raise ConfigError(f"--videos must be at least 1, got {videos}")
    if epoch < 0:
        raise ConfigError(f"--epoch must be 0 or more, got {epoch}")
    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output must end in one of {', '.join(FORMATS)}, got {str(output)!r}")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.absolute().parent}; create it first")


def with_folder(cluster: Cluster, nodes: Sequence[Node], folder: str) -> Cluster:
    """The profile with this folder for the row's data set; ConfigError if the row has several."""
    names = sorted({node.recipe.dataset for node in nodes})
    if len(names) > 1:
        raise ConfigError(
            f"--data gives one folder, but the row uses {' and '.join(names)}; set cluster.datasets.NAME.root=FOLDER "
            "for each instead"
        )
    root = str(Path(folder).expanduser().absolute())
    lists = cluster.datasets.get(names[0], DatasetPaths(root=root))
    return dataclasses.replace(cluster, datasets=cluster.datasets | {names[0]: dataclasses.replace(lists, root=root)})


def check_data(nodes: Sequence[Node], cluster: Cluster) -> None:
    """Raises ConfigError, with submit.py's sentence, for data that is not set or not there."""
    without_inputs = [dataclasses.replace(node, parents={}) for node in nodes]  # teachers' weights are not needed
    needed = missing_settings(without_inputs, cluster)
    if needed:
        raise ConfigError(f"the cluster profile must set {needed[0]} (see cluster.example.yaml), or give --data FOLDER")
    for node in nodes:
        root = Path(cluster.datasets[node.recipe.dataset].root)
        if dataset_of(node.recipe).generated and not (root / "train.csv").is_file():
            raise ConfigError(
                f"{root}: the {node.recipe.dataset} data set is not there; generate it with "
                f"`python -m mvd.data.synthetic_motion {root}`"
            )


def draw_stages(nodes: Sequence[Node], cluster: Cluster, videos: int, epoch: int, output: Path) -> None:
    """Draws the strips of all stages into one picture."""
    from mvd.data.inspect import draw, stage_strips  # imports torch, which a refused request need not wait for
    from mvd.data.video.errors import Unreadable

    strips = []
    for node in nodes:
        paths = cluster.datasets[node.recipe.dataset]
        entries = load_split(node.recipe, paths, "test" if node.kind == "test" else "train")
        if len(entries) < videos:
            print(f"{node.kind}: the list holds {counted(len(entries), 'file')}; all of them are drawn")
        try:
            names = class_names_of(node.recipe, paths)
            strips += list(stage_strips(node.recipe, entries, cluster.reader, videos, epoch, names))
        except Unreadable as error:
            raise ConfigError(f"{node.kind}: {error}") from error
    try:
        draw(strips, output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}") from error
    print(f"{output}: {len(strips)} strips; open it in any image viewer")


if __name__ == "__main__":
    sys.exit(run_command(main))
