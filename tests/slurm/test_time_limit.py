"""Stages that are longer than their time limit, or whose start is. The jobs were submitted when the session began."""

from launch.job.record import Record
from tests.slurm.conftest import LONG, TINY, stage_ids


def test_a_stage_goes_on_over_its_time_limits(limited):
    ids = stage_ids(TINY, LONG)
    (stage,) = ids["pretrain"]
    job = limited.record(stage).job_id
    limited.wait("two time limits", lambda: len(stopped(limited.record(stage))) >= 2, seconds=300)
    assert limited.queued(job) and not (limited.runs / stage / "result.json").exists()
    limited.brake.unlink()
    limited.wait_for_result(stage)
    record = limited.record(stage)
    assert record.job_id == job and record.error is None
    saved = [attempt.saved for attempt in record.attempts]
    assert saved == sorted(saved) and len(set(saved)) >= 3  # each attempt went on from where the one before had saved
    limited.wait("the children's start", lambda: all(limited.record(child).attempts for child in ids["finetune"]))


def test_a_stage_that_saves_nothing_before_its_time_limit_is_given_up(stuck):
    ids = stage_ids(TINY)
    (stage,) = ids["pretrain"]
    stuck.wait("the final error", lambda: stuck.record(stage).error is not None, seconds=480)
    record = stuck.record(stage)
    assert sum(attempt.at_limit for attempt in record.attempts) == 3  # beside those that other tests may end
    assert "3 attempts have come to their time limit" in record.error and "slurm.time_limit_hours" in record.error
    stuck.wait_until_idle()
    assert not any(stuck.record(child).attempts for child in ids["finetune"])
    assert stuck.states()[stage].startswith("failed: 3 attempts have come to their time limit")


def stopped(record: Record) -> list[str]:
    """What the attempts say that were told to stop in the middle of training."""
    return [attempt.error for attempt in record.attempts if attempt.error and "stopped before" in attempt.error]
