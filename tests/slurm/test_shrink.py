"""A job that has too few nodes, after one is to blame and no spare one is left, goes on with fewer processes."""

import os
import signal

from tests.slurm.conftest import TINY, Site, stage_ids
from tests.slurm.lab import Lab
from tests.slurm.test_hardware import hosts

(STAGE,) = stage_ids(TINY)["pretrain"]


def test_a_job_without_a_spare_node_goes_on_with_fewer_processes(site: Site, lab: Lab):
    site.brake.touch()
    shape = ("cluster.pretrain.nodes=4", "cluster.slurm.shrink=true", "cluster.checkpoint_every=1")
    site.submit(TINY, *shape, "--until", "pretrain")
    reached = site.brake.with_suffix(".reached")
    site.wait("training", reached.exists)
    job = site.record(STAGE).job_id
    before = hosts(lab, job)
    reached.unlink()
    os.kill(lab.tasks(job)[2], signal.SIGBUS)

    site.wait("training on the nodes that are left", reached.exists)
    after = hosts(lab, job)
    assert sorted(after) == [0, 1] and before[2] not in after.values()  # three processes would not divide the batch
    said = site.states(TINY)[STAGE]
    assert "restarted in place 1 times" in said and "on 2 GPUs until the next requeue" in said
    site.brake.unlink()
    site.wait_for_result(STAGE)
    record = site.record(STAGE)
    assert record.requeued == 0 and [attempt.shrunk_to for attempt in record.attempts] == [0, 2]
    assert record.attempts[1].saved >= 1  # what four processes have saved
