"""A batch script that is killed alone, by an administrator or for lack of memory, while its processes train."""

import os
import signal

from tests.slurm.conftest import TINY, stage_ids


def test_a_job_whose_batch_script_alone_was_killed_goes_on_from_its_last_update(site, lab):
    site.brake.touch()
    site.submit(TINY, "--until", "finetune")
    ids = stage_ids(TINY)
    (stage,), children = ids["pretrain"], ids["finetune"]
    job = site.record(stage).job_id
    site.wait("the first updates", site.brake.with_suffix(".reached").exists)
    os.kill(lab.batch_script(job), signal.SIGKILL)
    site.wait("the job's end or requeue", lambda: site.queued(job).get(job) in (None, "PENDING"))
    assert site.queued(job) == {job: "PENDING"}, (lab.run("sacct", "-X", "-D", "-j", job), site.states(TINY))
    states = site.states(TINY)
    assert all(states[child] == f"waiting for {stage}" for child in children)

    site.brake.unlink()
    site.wait_for_result(stage)
    record = site.record(stage)
    assert record.job_id == job and record.requeued == 1 and record.error is None
    assert "batch script" in (record.attempts[0].error or "")
    assert record.attempts[1].saved > 0
