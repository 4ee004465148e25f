"""Trained networks for use outside of stages, from a run directory, a weights file or an exported timm folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvd.config import DATASETS, SIZES, ConfigError, Precision
from mvd.config.sizes import Size
from mvd.data.class_names import names_of_dataset
from mvd.evaluation.protocol import CROPS, KEY, Protocol, protocol_of
from mvd.models import build_classifier
from mvd.models.checkpoints import load_official
from mvd.models.encoder import VideoEncoder, fixed
from mvd.models.positions import sincos_3d
from mvd.models.teachers import video_teacher_encoder
from mvd.run_directory import RunDirectory
from mvd.stage import Stage
from mvd.weight_keys import plain_key
from mvd.weight_shapes import read_header

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A classifier, or an encoder without a head (protocol.classes is 0), in evaluation mode on its device."""

    model: VideoEncoder
    protocol: Protocol
    precision: Precision
    device: torch.device


def load_trained(source: str | Path) -> Trained:
    """The network of a source (see read_protocol), on the GPU if there is one.

    It computes in the precision of its run, or, from a file, in bf16 on a GPU and in fp32 on a CPU.

    Raises:
        ConfigError: the source is something else, or its weights are damaged or do not fit.
    """
    source = Path(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol, weights = read_protocol(source), weights_of(source)
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    if RunDirectory(source).stage.is_file():
        precision = Stage.from_yaml(RunDirectory(source).stage).execution.precision
    if protocol.classes:
        model: VideoEncoder = build_classifier(protocol.size, num_classes=protocol.classes)
    else:
        of_teacher = "encoder_to_decoder.weight" in map(plain_key, read_header(weights).forms)
        model = build_encoder(SIZES[protocol.size], of_video_teacher=of_teacher)
    report = load_official(model, weights)
    if report.missing:
        raise ConfigError(f"{weights} lacks {', '.join(report.missing)}; use the weights of a fine-tuning")
    return Trained(model.eval().to(device), protocol, precision, device)


def weights_of(source: Path) -> Path:
    """The weights file of a run directory, a timm folder, or the file itself.

    Raises:
        ConfigError: the source is something else, or a run that is not finished.
    """
    files = RunDirectory(source)
    if files.stage.is_file():
        stage = Stage.from_yaml(files.stage)
        weights = Path(stage.inputs["finetune"]) if stage.kind == "test" else files.weights
        if not weights.is_file():
            raise ConfigError(f"{stage.id} has no weights, {weights}; run it to its end first")
        return weights
    if (source / "config.json").is_file():
        return source / "model.safetensors"
    if source.is_dir():
        raise ConfigError(
            f"{source} is neither a run directory (it has no stage.yaml) nor an exported timm folder (no config.json)"
        )
    return source


def read_protocol(source: str | Path) -> Protocol:
    """How the network of a source is applied to videos.

    source: a run directory, an exported timm folder, or a .safetensors or .pth file. Files of this harness say it
    themselves. Of other files, such as the official ones, the weights tell the size and the number of classes, which
    may be those of a known data set; what is assumed then is logged as a warning.

    Raises:
        ConfigError: the source is something else, is damaged, or has no video encoder of a known size.
    """
    source = Path(source)
    stage = RunDirectory(source).stage
    if stage.is_file():
        return protocol_of(Stage.from_yaml(stage))
    header = read_header(weights_of(source))
    text = header.texts.get(KEY)
    try:
        values = json.loads(text) if text else _timm_config(source).get(KEY)
    except ValueError as error:
        raise ConfigError(f"{source}: its description is not valid JSON ({error}); export it again") from error
    if values is not None:
        return Protocol.from_dict(values, str(source))
    return _from_shapes({name: form.shape for name, form in header.forms.items()}, source)


def _timm_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _from_shapes(shapes: Mapping[str, tuple[int, ...]], source: Path) -> Protocol:
    """As far as the weights tell; the rest is assumed."""
    plain = {plain_key(name): shape for name, shape in shapes.items()}
    kernel = plain.get("patch_embed.proj.weight", ())
    depth = len({name.split(".")[1] for name in plain if name.startswith("blocks.")})
    sizes = {
        name
        for name, size in SIZES.items()
        if (size.encoder.width, 3, size.clip.tubelet, size.clip.patch_size, size.clip.patch_size) == kernel
        and size.encoder.depth == depth
    }
    if not sizes:
        raise ConfigError(
            f"{source} has no video encoder of a known size ({', '.join(SIZES)}): its patch embedding is "
            f"{kernel or 'missing'} and it has {depth} blocks"
        )
    is_classifier = "fc_norm.weight" in plain and len(plain.get("head.weight", ())) == 2
    classes = plain["head.weight"][0] if is_classifier else 0
    known = next((name for name, data in DATASETS.items() if data.classes == classes and not data.generated), None)
    names = None if known is None else names_of_dataset(known)
    data = DATASETS["k400" if known is None else known]
    protocol = Protocol(
        size=sizes.pop(),
        sampling=data.sampling,
        clips=data.test_clips,
        classes=classes,
        names=None if names is None else tuple(names),
    )
    whose = f"the views and class names of {known} are" if known else f"{protocol.sampling} sampling is"
    logger.warning(
        "%s does not say how it was trained: %s assumed, with stride %d and %d x %d views",
        *(source, whose, protocol.stride, protocol.clips, CROPS),
    )
    return protocol


def build_encoder(size: Size, *, of_video_teacher: bool) -> VideoEncoder:
    """An encoder without a head, with the position table of a video teacher or of a student."""
    if of_video_teacher:
        return video_teacher_encoder(size)
    return VideoEncoder(size.encoder, size.clip, fixed(sincos_3d(size.encoder.width, size.clip.slices, size.clip.side)))
