"""A run whose directory another attempt takes over stops on all processes, before it writes to it."""

import os
import sys
from pathlib import Path

from mvd.distributed.faults import RunFailed
from mvd.owner import VARIABLE, Owner, read_owner, take
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train.checkpoint_policy import CheckpointPolicy
from tests.runs import run_cli, small_stage, succeed, write_stage

FIRST, SECOND = Owner("24", 0, "node1", "2026-01-01"), Owner("25", 0, "node2", "2026-01-02")
TAKEN_AT = 8


def run_until_it_is_taken_over(folder: Path) -> None:
    """Another attempt becomes the owner between two saves; each process leaves the error that it gets."""
    (path,) = folder.glob("*/*/stage.yaml")
    stage = Stage.from_yaml(path)
    due = CheckpointPolicy.due

    def taken_over(policy: CheckpointPolicy, update: int) -> bool:
        if update == TAKEN_AT and policy.process.is_first:
            take(stage.files, SECOND, lambda _: True)
        return due(policy, update)

    CheckpointPolicy.due = taken_over
    os.environ[VARIABLE] = FIRST.name
    try:
        run_stage(stage)
    except RunFailed as error:
        print(f"stopped: {error}")
        sys.stdout.flush()
        os._exit(0)


def test_a_run_that_is_taken_over_stops_everywhere_before_its_next_save(tmp_path, motion_root):
    stage = small_stage("finetune", "finetune", tmp_path / "runs", motion_root, checkpoint_every=4)
    write_stage(stage)
    take(stage.files, FIRST, lambda _: False)
    printed = succeed(run_until_it_is_taken_over, tmp_path)
    said = f"stopped: {stage.directory} no longer belongs to this attempt (24.0.0), but to job 25, attempt 1, on node2"
    assert all(said in output for output in printed)
    assert [path.name for path in stage.files.complete_checkpoints()] == ["step-00000004"]
    assert not stage.files.result.exists() and read_owner(stage.files) == SECOND


def test_a_run_started_by_hand_does_not_disturb_an_owner(tmp_path, motion_root):
    stage = small_stage("finetune", "finetune", tmp_path / "runs", motion_root)
    write_stage(stage)
    take(stage.files, FIRST, lambda _: False)
    finished = run_cli(stage, 2)
    assert finished.code == 2
    assert f"error: {stage.directory} belongs to job 24, attempt 1, on node1" in "".join(finished.output)
    names = {path.name for path in stage.directory.iterdir() if path.name != "printed"}
    assert names == {"stage.yaml", "owner.json"}
