"""Hosts with broken hardware: they are blamed, and the next attempt runs elsewhere."""

import os
import signal
from pathlib import Path

from tests.slurm.conftest import TINY, Site, stage_ids
from tests.slurm.lab import Lab

(STAGE,) = stage_ids(TINY)["pretrain"]


def test_a_host_on_which_a_process_dies_of_a_bus_error_is_avoided(site: Site, lab: Lab):
    site.brake.touch()
    site.submit(TINY, "cluster.pretrain.nodes=2", "--until", "pretrain")
    site.wait("training", lambda: site.brake.with_suffix(".reached").exists())
    job = site.record(STAGE).job_id
    process = lab.tasks(job)[1]
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    (node,) = [variable.partition("=")[2] for variable in variables if variable.startswith("SLURMD_NODENAME=")]
    os.kill(process, signal.SIGBUS)
    site.wait("the requeue", lambda: site.record(STAGE).avoided)
    assert site.record(STAGE).avoided == [node]
    assert site.record(STAGE).attempts[0].error.endswith(f"\nrank 1 on {node}: bus error (SIGBUS)")
    site.run("cancel.py", TINY)
    site.wait_until_idle()
