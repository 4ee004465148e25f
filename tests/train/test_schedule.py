import math

import numpy as np
import pytest

from experiments import all as all_rows
from mvd.config import DATASETS, Optimization
from mvd.data.loader import steps_per_epoch
from mvd.train.schedule import cosine_schedule
from tests.official import golden

SCHEDULES = golden("lr_schedules.json")


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_official_one(name):
    file = SCHEDULES[name]
    rates = cosine_schedule(
        file["scaled_lr"], file["scaled_min_lr"], file["epochs"], file["warmup_epochs"], file["steps_per_epoch"]
    )
    assert rates.dtype == np.float64 and len(rates) == file["total_iters"]
    updates, values = zip(*file["values"], strict=True)
    np.testing.assert_allclose(rates[list(updates)], values, rtol=1e-12)
    assert rates.sum() == pytest.approx(file["sum"], rel=1e-10)


BY_NAME = {row.name: row for row in all_rows.rows}
# the official schedule: the recipe it belongs to
OFFICIAL = {
    "vitb_pretrain_401ep": BY_NAME["vitb_from_vitb_k400"].pretrain,
    "vith_pretrain_801ep": BY_NAME["vith_k400"].pretrain,
    "vits_ft_k400_150ep": BY_NAME["vits_from_vitb_k400"].finetune,
    "vith_ft_ssv2_30ep": BY_NAME["vith_ssv2"].finetune,
}
RECIPES = {f"{row.name}-{kind}": getattr(row, kind) for row in all_rows.rows for kind in ("pretrain", "finetune")}


def rates_of(recipe) -> tuple[np.ndarray, int]:
    """All learning rates of a recipe on the paper's data, and its steps per epoch."""
    o: Optimization = recipe.optimization
    steps = steps_per_epoch(DATASETS[recipe.dataset].train_samples, o.global_batch)
    return cosine_schedule(o.peak_lr, o.floor_lr, o.laid_out_epochs, o.warmup_epochs, steps), steps


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_recipe_lays_out_the_official_schedule(name):
    file, recipe = SCHEDULES[name], OFFICIAL[name]
    rates, steps = rates_of(recipe)
    assert steps == file["steps_per_epoch"] and len(rates) == file["total_iters"]
    updates, values = zip(*file["values"], strict=True)
    np.testing.assert_allclose(rates[list(updates)], values, rtol=1e-12)
    for epoch, value in file["epoch_first_values"].items():
        assert rates[int(epoch) * steps] == pytest.approx(value, rel=1e-10)
    assert [recipe.optimization.weight_decay] == file["weight_decay_unique"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_lays_out_warmup_and_cosine(name):
    """Written out update by update, for every row."""
    recipe = RECIPES[name]
    o = recipe.optimization
    rates, steps = rates_of(recipe)
    videos = 168_913 if recipe.dataset == "ssv2" else 240_436
    laid_out = o.epochs + 1 if name.endswith("pretrain") else o.epochs
    warmup, total = (40 if name.endswith("pretrain") else 5) * steps, laid_out * steps
    assert steps == videos // o.global_batch and len(rates) == total
    peak, floor = o.base_lr * o.global_batch / 256, o.min_lr * o.global_batch / 256
    for update in (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, o.epochs * steps - 1, total - 1):
        if update < warmup:
            expected = peak * update / (warmup - 1)
        else:
            expected = floor + (peak - floor) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2
        assert rates[update] == pytest.approx(expected, rel=1e-10, abs=1e-18)


def test_the_epoch_that_is_laid_out_but_not_run_is_the_one_the_official_loop_overran():
    """In the official code the leftover mini-batch of the last epoch needs an update beyond the schedule."""
    names = {"vitb": "vitb_from_vitb", "vitl": "vitl", "vitb_from_l": "vitb_from_vitl", "vith": "vith"}
    for name, facts in golden("engine_quirks.json")["pretrain_real_sizes"].items():
        recipe = BY_NAME[f"{names[name]}_k400"].pretrain
        rates, steps = rates_of(recipe)
        assert (steps, len(rates)) == (facts["steps_per_epoch"], facts["schedule_len"])
        assert facts["last_epoch_last_index"] == len(rates)  # one too far
        assert recipe.optimization.epochs * steps == len(rates) - steps


def test_warmup_starts_at_zero_and_the_peak_comes_twice():
    rates = cosine_schedule(1.0, 0.1, epochs=4, warmup_epochs=1, steps_per_epoch=5)
    assert rates[0] == 0
    assert rates[4] == rates[5] == rates.max() == 1.0
    assert rates[-1] > 0.1


def test_no_warmup_and_nothing_but_warmup():
    assert cosine_schedule(1.0, 0.0, epochs=2, warmup_epochs=0, steps_per_epoch=3)[0] == 1.0
    assert cosine_schedule(1.0, 0.0, epochs=2, warmup_epochs=2, steps_per_epoch=3)[-1] == 1.0
