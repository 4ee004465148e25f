"""benchmarks/gpu.py: how it looks for the largest micro-batch, and what it says where there is no GPU."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import find_largest, table_line, unit
from benchmarks.real_size import recipes
from mvd.config import Finetune, Pretrain
from mvd.identity import identity

RECIPES = recipes()


def card(capacity: float, fixed: float, each: float) -> Callable[[Sequence[int], float], list[dict[str, float]]]:
    """A GPU on which a micro-batch of m takes fixed + each * m, and which holds a tenth less than it says."""

    def run(micro_batches: Sequence[int], seconds: float) -> list[dict[str, float]]:
        fitting = []
        for size in micro_batches:
            memory = fixed + each * size
            if memory > 0.9 * capacity:
                break
            fitting.append({"micro_batch": size, "clips_per_second": 1.0, "memory": memory, "capacity": capacity})
        return fitting

    return run


@pytest.mark.parametrize("name", ["pretrain-vith_from_vith_e800", "finetune-vith_k400"])
@pytest.mark.parametrize(("capacity", "fixed", "each"), [(141, 30, 0.7), (80, 30, 2.5), (24, 17, 0.05)])
def test_the_largest_micro_batch_is_found_to_a_sixteenth(name, capacity, fixed, each):
    recipe = RECIPES[name]
    found = find_largest(recipe, card(capacity, fixed, each))["micro_batch"]
    largest = (0.9 * capacity - fixed) / each
    assert found <= largest and found % unit(recipe) == 0
    assert found + max(found / 16, unit(recipe)) + unit(recipe) > largest


def test_what_does_not_fit_is_said():
    recipe = RECIPES["finetune-vith_k400"]
    assert find_largest(recipe, card(16, 20, 1)) is None
    assert "does not fit" in table_line("a", recipe, None, 700.0)
    assert find_largest(recipe, card(16, 10, 2))["micro_batch"] == 2


def test_a_peak_outside_the_forward_pass_does_not_mislead():
    """Memory that grows with the micro-batch only from some size on."""

    def run(micro_batches: Sequence[int], seconds: float) -> list[dict[str, float]]:
        sizes = itertools.takewhile(lambda size: size <= 13, micro_batches)
        return [{"micro_batch": size, "clips_per_second": 1.0, "memory": 10, "capacity": 16} for size in sizes]

    assert find_largest(RECIPES["pretrain-vith_from_vith_e800"], run)["micro_batch"] == 13


def test_a_line_counts_the_arithmetic_of_augmented_copies():
    figures = {"micro_batch": 8, "clips_per_second": 10.0, "memory": 5e9}
    line = table_line("stage", RECIPES["finetune-vith_k400"], figures, 100.0)
    assert line == "| stage | 8 | 16 | 10.0 | 71 | 71% | 5.0 |"


def test_every_stage_of_the_rows_is_there_once():
    kinds = [type(recipe) for recipe in RECIPES.values()]
    assert (kinds.count(Pretrain), kinds.count(Finetune)) == (7, 9)
    assert len({str(identity(recipe)) for recipe in RECIPES.values()}) == 16


def test_without_a_gpu_it_says_so_and_stops(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "finds no GPU" in printed.err and printed.out == ""


@pytest.mark.gpu
@pytest.mark.fullsize
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_stage_is_measured_on_a_gpu(capsys):
    assert gpu.main(["--only", "pretrain-vits_from_vitb_e400"]) == 0
    assert capsys.readouterr().out.count("| pretrain-vits_from_vitb_e400 | ") == 1
