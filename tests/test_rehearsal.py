"""The rates of a rehearsal; tests/launch/test_rehearsal.py runs one in real processes."""

import pytest

from mvd.distributed.faults import RunFailed
from mvd.rehearsal import rates
from tests.runs import small_stage


def test_rates_leave_the_first_quarter_out(tmp_path):
    stage = small_stage("pretrain", "rates", tmp_path, tmp_path)  # a global batch of 8
    slow = {"update": 10, "samples_per_second": 1.0, "data_wait_share": 1.0}
    measured = [
        {"update": 20, "samples_per_second": 8.0, "data_wait_share": 0.5},
        {"update": 30, "samples_per_second": 4.0, "data_wait_share": 0.2},
        {"update": 40, "samples_per_second": 8.0, "data_wait_share": 0.1},
    ]
    # 10 + 20 + 10 seconds for 240 samples, of which 5 + 4 + 1 waiting
    expected = {"samples_per_second": 6.0, "data_wait_share": 0.25}
    assert rates([slow, {"update": 10, "val_top1": 1.0}, *measured], stage) == expected
    assert rates([slow], stage) == {"samples_per_second": 1.0, "data_wait_share": 1.0}
    with pytest.raises(RunFailed, match="no update had a finite loss"):
        rates([{"update": 10, "val_top1": 1.0}], stage)
