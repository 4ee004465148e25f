"""A stage that is longer than its time limit. Its job was submitted when the session began."""

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


def stopped(record: Record) -> list[str]:
    """What the attempts say that were told to stop in the middle of training."""
    return [attempt.error for attempt in record.attempts if attempt.error and "stopped before" in attempt.error]
