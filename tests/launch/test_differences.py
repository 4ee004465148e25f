"""A plan that is not the paper's says so."""

from dataclasses import replace

import pytest

from experiments import all as every
from experiments.demo import rows as demo
from experiments.vitb_from_vitb_k400 import row
from launch import submit
from launch.plan.differences import changed_settings, describe, note_rows, noted_rows
from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config import Row, Target
from mvd.config.typed import parse_override
from mvd.run_directory import RunDirectory

EPOCHS = "finetune.optimization.epochs"


def given(target: str, *settings: str) -> Row:
    return load_rows([target], [parse_override(text) for text in settings])[0]


def test_the_rows_as_they_are_differ_in_nothing():
    assert {describe(known) for known in (*every.rows, *demo)} == {""}


@pytest.mark.parametrize(
    "setting, change",
    [
        (f"{EPOCHS}=10", f"{EPOCHS} 75 -> 10"),
        ("teachers=train", "teachers checkpoint -> train"),
        ("pretrain.optimization.schedule_epochs=null", "pretrain.optimization.schedule_epochs 401 -> null"),
        ("test.clips=1", "test.clips 5 -> 1"),
        ("target.top1=50", "target.top1 82.7 -> 50.0"),
        ("finetune.weights=/mine.pth", "finetune.weights null -> /mine.pth"),
    ],
)
def test_an_override_is_a_difference(setting, change):
    assert changed_settings(given("vitb_from_vitb_k400", setting)) == [change]


@pytest.mark.parametrize("setting", ["finetune.seed=3", "finetune.optimization.micro_batch=2", "pretrain.seed=1"])
def test_seeds_and_what_does_not_change_the_result_are_none(setting):
    assert describe(given("vitb_from_vitb_k400", setting)) == ""


def test_an_edited_row_file_is_compared_with_the_row_whose_target_it_has():
    mine = replace(row, name="mine", finetune=replace(row.finetune, drop_path=0.2), test=replace(row.test, clips=7))
    assert describe(mine) == "2 fields differ from the paper: finetune.drop_path 0.1 -> 0.2, test.clips 5 -> 7"
    assert describe(replace(mine, target=None)) == "", "without a target it claims nothing"
    assert describe(replace(mine, target=Target(top1=12.3))) == ""
    assert (
        describe(given("demo", f"{EPOCHS}=3")) == f"1 field differs from the row demo of experiments/: {EPOCHS} 5 -> 3"
    )


def test_the_plan_prints_the_target_with_the_differences(profile, capsys):
    assert submit.main(["vitb_from_vitb_k400", f"{EPOCHS}=10", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"vitb_from_vitb_k400: target 82.7 / 95.4 (paper); 1 field differs from the paper: {EPOCHS} 75 -> 10" in printed
    )
    assert submit.main(["vitb_from_vitb_k400", "--dry-run"]) == 0
    assert "differ" not in capsys.readouterr().out


def test_what_differs_is_stored_with_the_runs_of_all_rows_that_share_them(tmp_path):
    rows = [given("vitb_from_vitb_k400", f"{EPOCHS}=10"), given("vitb_from_vitb_ssv2")]
    nodes = build_graph(rows)
    for node in nodes:
        (tmp_path / node.id).mkdir()
    for one in rows:
        note_rows([one], [node for node in nodes if one.name in node.rows and len(node.rows) == 1], tmp_path)
    note_rows(rows, [nodes[0]], tmp_path)
    note_rows(rows[1:], build_graph(rows[1:]), tmp_path)  # one of them is submitted again alone
    noted = noted_rows(RunDirectory(tmp_path / nodes[0].id))
    assert noted["vitb_from_vitb_k400"]["differs"] == f"1 field differs from the paper: {EPOCHS} 75 -> 10"
    assert noted["vitb_from_vitb_ssv2"]["differs"] == "" and noted["vitb_from_vitb_ssv2"]["target"]["top1"] == 72.5
    assert list(noted_rows(RunDirectory(tmp_path / nodes[-1].id))) == ["vitb_from_vitb_ssv2"]
