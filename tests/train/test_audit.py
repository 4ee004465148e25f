"""Processes that compute wrong numbers without an error: who is named, and that a run without them stays as it is."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvd.config.run_settings import DatasetPaths, Faults
from mvd.distributed.faults import HostFault
from mvd.distributed.process import Process, gather, start_processes
from mvd.files import write_json
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train import bad_updates
from mvd.train import engine as engine_module
from mvd.train.audit import Audits, Claim, agree, majority
from mvd.train.loop import TrainingRun
from mvd.train.update import Update
from tests.runs import read_result, small_stage, succeed, write_stage
from tests.slurm.hooks.wrong_matmul import break_linear
from tests.train.test_engine import SHARDED

VIDEOS = 36  # in updates of 6, with a checkpoint after every 3
# Stage -> the fault of rank 1 (tests/slurm/hooks/wrong_matmul.py), until the run has been ended because of it.
MATMUL: dict[str, dict[str, Any]] = {"broken": {"rank": 1, "from": 4}, "broken-unseen": {"rank": 1, "from": 4}}
# Stage -> by what the loss of rank 1 is multiplied in the first forward pass of update 5, and in no other.
LOSS = {"nan": math.nan, "nan-unseen": math.nan, "spike": 1e4, "spike-unseen": 1e4}
AUDIT = {"once"}  # of rank 1, the first repetition in the audit before the save after update 6 is wrong


def run_all(folder: Path) -> None:
    """ZeRO stage 3 comes last: it replaces torch's linear function by DeepSpeed's for the rest of the process."""
    engine_module.DS_CONFIGS = folder / "ds_configs"
    bad_updates.SPIKE_MINIMUM = 4
    process = start_processes()
    break_linear(Update, folder / "wrong")
    break_losses(process.rank)
    stages = [Stage.from_yaml(path) for path in folder.glob("*/stage.yaml")]
    for stage in sorted(stages, key=lambda stage: (stage.execution.deepspeed == "sharded", stage.id)):
        if process.is_first:
            write_json(folder / "wrong", MATMUL.get(stage.id))
        gather(None)  # so that all processes find the file
        try:
            run_stage(stage)
        except HostFault as error:
            write_json(stage.directory / f"ended-{process.rank}.json", str(error))
            if process.is_first:
                write_json(folder / "wrong", None)  # the next attempt has another host
            gather(None)
            run_stage(stage)


def break_losses(rank: int) -> None:
    build, repeat, recompute = TrainingRun.__init__, Audits._repeat, Audits.recompute_if_bad
    left = {*LOSS, *AUDIT}

    def strikes(run: TrainingRun, faults: Any, update: int, when: int) -> bool:
        if rank != 1 or run.stage.id not in faults or run.stage.id not in left or update != when:
            return False
        left.remove(run.stage.id)
        return True

    def build_broken(run: TrainingRun, *arguments: Any, **named: Any) -> None:
        build(run, *arguments, **named)
        losses = run.task.losses
        factor = LOSS.get(run.stage.id, 1.0)

        def broken(*given: Any) -> dict[str, torch.Tensor]:
            bad = factor if run.running and strikes(run, LOSS, run.update + 1, 5) else 1.0
            return {name: loss * bad for name, loss in losses(*given).items()}

        def wrong_once(raw: dict[str, Any]) -> Claim:
            claim = repeat(run.audits, raw)
            if strikes(run, AUDIT, run.update, 6):
                claim = claim._replace(losses=(claim.losses[0] * (1 + 1e-6), *claim.losses[1:]))
            return claim

        def recompute_unless_off(update: Update, values: dict[str, float]) -> None:
            recompute(run.audits, update, {"loss": 0.0} if run.stage.id.endswith("-unseen") else values)

        run.task.losses, run.audits._repeat, run.audits.recompute_if_bad = broken, wrong_once, recompute_unless_off

    TrainingRun.__init__ = build_broken


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("audit")
    shutil.copytree(engine_module.DS_CONFIGS, folder / "ds_configs")
    write_json(folder / "ds_configs" / "sharded.json", {"zero_optimization": SHARDED})
    lines = (motion_root / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("".join(f"{line}\n" for line in lines[:VIDEOS]))
    data = DatasetPaths(root=str(motion_root), train=str(folder / "train.csv"))
    how: dict[str, Any] = {"world_size": 3, "micro_batch": 1, "accumulation": 2, "global_batch": 6, "epochs": 1}
    how |= {"schedule_epochs": None, "checkpoint_every": 3, "validate_every": 9, "drop_path": 0.3}
    made = {}

    def add(name: str, every: int, kind: str = "pretrain", zero: str = "zero2", **fields: Any) -> None:
        faults, inputs = Faults(audit_every=every, spike_factor=5.0), teachers if kind == "pretrain" else None
        made[name] = small_stage(kind, name, folder, data, inputs, faults=faults, deepspeed=zero, **how | fields)
        write_stage(made[name])

    for name, every in {"plain": 0, "broken": 2, "broken-unseen": 0, "once": 9, "nan": 2}.items():
        add(name, every)
    add("spike", every=2)
    for name in ("nan-unseen", "spike-unseen"):
        add(name, every=0)
    tuning = {"head_dropout": 0.3, "global_batch": 12, "micro_batch": 4, "accumulation": 1}
    add("quiet", 0, "finetune", "sharded", **tuning)
    add("audited", 1, "finetune", "sharded", **tuning)
    succeed(run_all, folder, count=3)
    return made


def same_weights(runs: dict[str, Stage], name: str, other: str = "plain") -> bool:
    ours, plain = (load_file(runs[stage].files.weights) for stage in (name, other))
    return all(ours[key].equal(plain[key]) for key in plain)


def fault(runs: dict[str, Stage], name: str) -> dict[str, Any]:
    """The first fault, whose sentence must name rank 1 and nobody else."""
    first = runs[name].files.read_faults()[0]
    assert len(first["hosts"]) == 1 and first["message"].startswith("rank 1 on ") and "rank 0" not in first["message"]
    return first


def test_audits_change_nothing(runs):
    """Under ZeRO stage 3, with drop path, dropout, erasing and mixing; under stage 2, see below."""
    assert same_weights(runs, "audited", "quiet") and runs["audited"].files.read_faults() == []


def test_a_process_that_multiplies_wrongly_is_named_and_left(runs):
    found = fault(runs, "broken")
    assert (found["fault"], found["update"]) == ("audit", 4)
    ended = [(runs["broken"].directory / f"ended-{rank}.json").read_text() for rank in range(3)]
    assert all("rank 1 on" in text and "repeatedly" in text for text in ended)
    assert same_weights(runs, "broken") and len(runs["broken"].files.read_faults()) == 1


def test_a_result_that_is_wrong_once_is_found_before_a_save_and_sends_the_run_back(runs):
    found = fault(runs, "once")
    assert (found["fault"], found["update"]) == ("audit", 6)
    assert same_weights(runs, "once") and not (runs["once"].directory / "ended-0.json").exists()


def test_without_audits_the_same_wrong_products_end_in_other_weights(runs):
    assert not same_weights(runs, "broken-unseen") and runs["broken-unseen"].files.read_faults() == []


@pytest.mark.parametrize("name", ["nan", "spike"])
def test_a_bad_loss_that_does_not_come_again_is_the_machines_and_the_update_is_made_again(runs, name):
    found = fault(runs, name)
    assert (found["fault"], found["update"]) == ("recomputed", 5)
    assert same_weights(runs, name) and read_result(runs[name])["skipped_updates"] == []
    assert len(runs[name].files.read_faults()) == 1


@pytest.mark.parametrize(("name", "skipped"), [("nan-unseen", [5]), ("spike-unseen", [])])
def test_without_the_recomputation_the_same_loss_ends_in_other_weights(runs, name, skipped):
    assert not same_weights(runs, name) and read_result(runs[name])["skipped_updates"] == skipped


def test_who_has_the_majority():
    def vote(*losses: float, exact: bool = True) -> Claim | None:
        claims = [Claim(rank, (loss,), "GPU") for rank, loss in enumerate(losses)]
        return majority(claims, partial(agree, tolerance=1e-4, exact=exact))

    assert vote(2.0, 1.0, 1.0) == Claim(1, (1.0,), "GPU")
    assert vote(1.0, 2.0) is None and vote(1.0, 1.0, 2.0, 2.0) is None
    assert vote(1.0, 1.00001) is None and vote(1.0, 1.00001, exact=False) is not None
    assert vote(math.nan, math.nan) is not None and vote(math.inf, 1.0, exact=False) is None


def test_other_hardware_may_round_otherwise():
    one, other = Claim(0, (1.0, 0.5), "GPU"), Claim(1, (1.00001, 0.5), "another GPU")
    assert agree(one, other, tolerance=1e-4, exact=True) and not agree(one, other, tolerance=1e-6, exact=True)
    assert not agree(one, other._replace(hardware="GPU"), tolerance=1e-4, exact=True)


def test_hardware_that_rounds_otherwise_each_time_is_not_blamed():
    audits = object.__new__(Audits)
    audits.exact, audits.tolerance, audits.process = True, 1e-4, Process(0, 2, torch.device("cpu"))
    near, far = [[Claim(rank, (loss,), "GPU") for rank, loss in enumerate(losses)] for losses in ((1, 1.00001), (1, 2))]
    assert not audits._only_rounds(far) and audits.exact
    assert audits._only_rounds(near) and not audits.exact
