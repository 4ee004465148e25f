"""Run directories that version 0.1.0 wrote are resumed by this version."""

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

from mvd.config.run_settings import DatasetPaths
from mvd.stage import Stage
from tests.runs import UPDATES, read_metrics, read_result, run_cli

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-0.1.0.tar.xz"
SAVED = 6  # the update of the checkpoint in it; its metrics continue to the end of the undisturbed run


def test_a_run_directory_of_version_0_1_0_is_resumed(tmp_path, motion_root):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("finetune-*")
    undisturbed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {record["update"]: record["loss"] for record in undisturbed if "loss" in record}
    assert sorted(expected) == list(range(1, UPDATES + 1))

    older = Stage.from_yaml(folder / "stage.yaml")
    execution = dataclasses.replace(older.execution, runs=str(tmp_path), data=DatasetPaths(root=str(motion_root)))
    stage = dataclasses.replace(older, execution=execution)
    finished = run_cli(stage, 2)

    assert finished.code == 0, "\n".join(finished.output)
    assert f"resuming after update {SAVED}" in finished.output[0]
    result = read_result(stage)
    assert result["complete"] and result["updates"] == UPDATES
    curve = [(record["update"], record["loss"]) for record in read_metrics(stage) if "loss" in record]
    assert [update for update, _ in curve] == list(range(1, UPDATES + 1))
    assert dict(curve[:SAVED]) == {update: expected[update] for update in range(1, SAVED + 1)}
    # Another processor sums in another order.
    assert dict(curve[SAVED:]) == {
        update: pytest.approx(expected[update], rel=1e-5) for update in range(SAVED + 1, UPDATES + 1)
    }
