import numpy as np
import pytest

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


def test_warmup_starts_at_zero_and_the_peak_comes_twice():
    rates = cosine_schedule(1.0, 0.1, epochs=4, warmup_epochs=1, steps_per_epoch=5)
    assert rates[0] == 0
    assert rates[4] == rates[5] == rates.max() == 1.0
    assert rates[-1] > 0.1


def test_no_warmup_and_nothing_but_warmup():
    assert cosine_schedule(1.0, 0.0, epochs=2, warmup_epochs=0, steps_per_epoch=3)[0] == 1.0
    assert cosine_schedule(1.0, 0.0, epochs=2, warmup_epochs=2, steps_per_epoch=3)[-1] == 1.0
