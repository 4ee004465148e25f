"""Stage ids: those of the rows stay as they are, and a field that is added later changes no existing one."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config import SIZES, Pretrain, Size, TrainRecipe
from mvd.config.fields import NOT_HASHED, since
from mvd.config.typed import parse_override
from mvd.identity import stage_id
from tests.data.stages import recipe

TEACHERS = ["mae_vitb", "mae_vitl", "mae_vith", "videomae_vitb", "videomae_vitl", "videomae_vith"]
PLANS = {"all": ["all"], "all teachers=train": ["all"], "demo": ["demo"], "teachers": TEACHERS}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stage_ids.json").read_text())


@pytest.mark.parametrize("name", PLANS)
def test_run_directories_of_every_row_keep_their_names(name):
    overrides = [parse_override("teachers=train")] if name.endswith("teachers=train") else []
    nodes = build_graph(load_rows(PLANS[name], overrides))
    assert [node.id for node in nodes] == GOLDEN[name]


def test_all_stages_of_the_table_are_pinned():
    assert {name: len(ids) for name, ids in GOLDEN.items()} == {
        "all": 35,
        "all teachers=train": 41,
        "demo": 10,
        "teachers": 6,
    }
    assert PLANS.keys() == GOLDEN.keys()


@dataclass(frozen=True, kw_only=True)
class LaterPretrain(Pretrain):
    """A later version's recipe: what every earlier run did is a temperature of 1."""

    temperature: float = field(default=1.0, metadata=since(1.0))


@dataclass(frozen=True, kw_only=True)
class NewDefaultPretrain(Pretrain):
    """A still later version, whose recipes start with another temperature unless they say otherwise."""

    temperature: float = field(default=0.5, metadata=since(1.0))


@dataclass(frozen=True, kw_only=True)
class LaterSize(Size):
    """A later version's size, with one more number."""

    registers: int = field(default=0, metadata=since(0))


def fields_of(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def id_of(settings: TrainRecipe) -> str:
    return stage_id("pretrain", "tiny", settings, {})


@pytest.fixture
def today() -> Pretrain:
    return recipe("pretrain", student="tiny", teacher="tiny")


def test_a_field_added_to_a_recipe_changes_no_existing_id(today):
    assert id_of(LaterPretrain(**fields_of(today))) == id_of(today)


def test_another_value_of_an_added_field_changes_the_id(today):
    assert id_of(LaterPretrain(**fields_of(today), temperature=2.0)) != id_of(today)


def test_ids_follow_what_earlier_runs_did_even_if_the_default_is_changed(today):
    assert id_of(NewDefaultPretrain(**fields_of(today))) != id_of(today)
    assert id_of(NewDefaultPretrain(**fields_of(today), temperature=1.0)) == id_of(today)


def test_a_field_added_to_a_size_changes_no_existing_id(today, monkeypatch):
    before = id_of(today)
    later = LaterSize(**fields_of(SIZES["tiny"]))
    monkeypatch.setitem(SIZES, "tiny", later)
    assert id_of(today) == before
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(later, registers=4))
    assert id_of(today) != before


def test_what_only_says_how_a_stage_runs_is_no_part_of_its_id(today):
    @dataclass(frozen=True, kw_only=True)
    class Faster(Pretrain):
        compiled: bool = field(default=False, metadata=NOT_HASHED)

    assert id_of(Faster(**fields_of(today), compiled=True)) == id_of(today)
    assert id_of(dataclasses.replace(today, activation_checkpointing=True)) == id_of(today)
    assert id_of(dataclasses.replace(today, seed=today.seed + 1)) != id_of(today)
