"""Training files that could not be read: the same list on all processes."""

import json
from pathlib import Path

import pytest

from mvd.config.run_settings import Faults
from mvd.distributed.faults import RunFailed
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.stage import Stage
from mvd.train.skipped_files import SkippedFiles
from tests.runs import small_stage, succeed, write_stage


def count(folder: Path) -> None:
    """The second process does not see yet what the first one wrote; then it finds four more files."""
    process = start_processes()
    files = SkippedFiles(Stage.from_yaml(folder / str(process.rank) / "stage.yaml"), process, 10)
    before = files.share(1)
    files.found.update([f"{name}.mp4" for name in "cdef"] if process.rank == 1 else [])
    try:
        files.share(1)
    except RunFailed as error:
        said = str(error)
    files = SkippedFiles(Stage.from_yaml(folder / str(process.rank) / "stage.yaml"), process, 1000)
    files.found.update(["c.mp4", "c.mp4", "d.mp4"] if process.rank == 1 else ["c.mp4"])
    replaced = [files.share(epoch)["replaced"] for epoch in (1, 1, 2)]
    write_json(folder / f"counted-{process.rank}.json", {"before": before, "said": said, "replaced": replaced})


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("unreadable")
    for rank in range(2):
        stage = small_stage("video_teacher", str(rank), folder, folder, faults=Faults(unreadable_share=0.3))
        write_stage(stage)
    (folder / "0" / "unreadable.txt").write_text("a.mp4\nb.mp4\n")
    succeed(count, folder)
    return [json.loads((folder / f"counted-{rank}.json").read_text()) for rank in range(2)]


def test_every_process_counts_the_files_that_the_first_one_knows(counted):
    assert [one["before"] for one in counted] == [{"unreadable": 2, "replaced": 0}] * 2


def test_replaced_samples_are_counted_once_and_by_epoch(counted):
    assert [one["replaced"] for one in counted] == [[4, 4, 0]] * 2


def test_all_processes_give_up_together(counted):
    assert ["6 of 10 training files cannot be read" in one["said"] for one in counted] == [True, True]


def test_one_missing_file_of_a_small_set_is_tolerated():
    faults = Faults(unreadable_share=0.02)
    worst = {n: max(bad for bad in range(n + 1) if not faults.too_many_unreadable(bad, n)) for n in (1, 12, 500, 1000)}
    assert worst == {1: 0, 12: 6, 500: 10, 1000: 20}
