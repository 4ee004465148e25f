"""What a data set was prepared from, so that another command does not overwrite it."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvd.config import ConfigError
from mvd.data.annotations import MANIFEST

SPLITS = ("train", "val", "test")


def request_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide which videos are in which list, as plain values."""
    names = ["videos", "dataset", "labels", *SPLITS]
    if not any(getattr(arguments, split) for split in SPLITS):
        names += ["val_share", "test_share"]
    values = {name: getattr(arguments, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def check_output(output: Path, request: Mapping[str, Any]) -> None:
    """Refuses a folder whose lists this command has not written, or has written for another request.

    Raises:
        ConfigError: names a difference.
    """
    manifest = output / MANIFEST
    if not manifest.is_file():
        lists = (output / f"{split}.csv" for split in SPLITS)
        found = next((file for file in lists if file.exists()), None)
        if found is not None and not any(output.glob("records*.jsonl")):  # those of an interrupted run
            raise ConfigError(f"{found} is not from this command, which would overwrite it; choose another OUTPUT")
        return
    try:
        before = json.loads(manifest.read_text(encoding="utf-8")).get("request")
    except (ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{manifest} is not from this command, which would overwrite it; choose another OUTPUT"
        ) from error
    if not isinstance(before, dict):  # written by version 0.1
        return
    for name in (*request, *before):
        if request.get(name) != before.get(name):
            raise ConfigError(
                f"{output} holds a data set with {name}={before.get(name)}, but this command has "
                f"{name}={request.get(name)}; choose another OUTPUT, or remove {manifest} to have its lists replaced"
            )
