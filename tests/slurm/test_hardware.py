"""Hosts with broken hardware: a spare node takes the place of one that is blamed."""

import json
import os
import signal
from pathlib import Path

from tests.slurm.conftest import TINY, Site, stage_ids
from tests.slurm.lab import Lab, processes

(STAGE,) = stage_ids(TINY)["pretrain"]


def hosts(lab: Lab, job: str) -> dict[int, str]:
    """Rank -> node of a running job's processes."""
    return {rank: processes.environment_of(pid)["SLURMD_NODENAME"] for rank, pid in lab.tasks(job).items()}


def test_a_spare_node_takes_the_place_of_one_on_which_a_process_dies_of_a_bus_error(site: Site, lab: Lab):
    site.brake.touch()
    site.submit(TINY, "cluster.pretrain.nodes=2", "cluster.slurm.spare_nodes=1", "--until", "pretrain")
    reached = site.brake.with_suffix(".reached")
    site.wait("training", reached.exists)
    job = site.record(STAGE).job_id
    before = hosts(lab, job)
    assert len(set(before.values())) == 2
    reached.unlink()
    os.kill(lab.tasks(job)[0], signal.SIGBUS)  # on the first node, where the batch script stays

    site.wait("training on the spare node", reached.exists)
    record, after = site.record(STAGE), hosts(lab, job)
    (allocated,) = lab.run("squeue", "-h", "-j", job, "-o", "%N").split()
    spare = set(lab.run("scontrol", "show", "hostnames", allocated).split()) - set(before.values())
    assert set(after.values()) == {before[1], *spare} and record.requeued == 0 and record.restarted == 1
    assert record.attempts[0].error.endswith(f"\nrank 0 on {before[0]}: bus error (SIGBUS)")
    assert "restarted in place 1 times" in site.states(TINY)[STAGE]

    site.brake.unlink()
    site.wait_for_result(STAGE)
    (first, second) = json.loads(Path(site.runs / STAGE / "provenance.json").read_text())
    assert first["host"] == before[0] != second["host"] and second["slurm"]["SLURM_JOB_NUM_NODES"] == "2"
