"""A job that is preempted, requeued, killed in part and loses a node, and still ends with its stage complete."""

import json
import os
import signal

from tests.slurm.conftest import TINY, Site, stage_ids


def updates(site: Site, stage: str) -> int:
    path = site.runs / stage / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["update"] if lines else 0


class Life:
    """The attempts of one job, each of which is let train a little before it meets its end."""

    def __init__(self, site: Site, stage: str) -> None:
        self.site, self.stage, self.number = site, stage, 0
        self.job = site.record(stage).job_id

    def train(self) -> None:
        """Waits until the next attempt has done two updates, which may be those that the one before could not save."""
        self.number += 1
        site, paused = self.site, self.site.brake.with_suffix(".reached")
        site.wait(f"attempt {self.number}", lambda: len(site.record(self.stage).attempts) == self.number)
        start = site.record(self.stage).attempts[-1].saved
        site.wait(f"the pause of attempt {self.number}", paused.exists)
        paused.unlink()
        assert updates(site, self.stage) >= start + 2

    def error(self, number: int) -> str:
        return self.site.record(self.stage).attempts[number - 1].error or ""


def test_a_job_survives_preemption_requeue_a_killed_rank_and_a_crashed_node(site, lab):
    shape = ("cluster.nodes=2", "cluster.pretrain.nodes=2", "cluster.checkpoint_every=1")
    site.brake.touch()
    site.submit(TINY, *shape, "pretrain.optimization.epochs=4", "--until", "finetune")
    ids = stage_ids(TINY, "pretrain.optimization.epochs=4")
    (stage,), children = ids["pretrain"], ids["finetune"]
    life = Life(site, stage)

    life.train()
    (node, *_) = lab.run("squeue", "-h", "-j", life.job, "-o", "%N").replace("node[", "node").split(",")
    command = ("sbatch", "-p", "high", "--exclusive", "-w", node[:5], "-o", "/dev/null", "--wrap", "sleep 1")
    lab.run(*command)

    life.train()
    assert "stopped before" in life.error(1) and site.record(stage).attempts[1].saved >= 2
    lab.run("scontrol", "requeue", life.job)

    life.train()
    allocation = lab.batch_script(life.job)
    os.kill(lab.tasks(life.job)[1], signal.SIGKILL)

    life.train()
    assert lab.batch_script(life.job) == allocation  # no other one was asked for
    assert "exit code 137, signal 9" in life.error(3)
    lab.crash("node1")
    site.wait("the end of the job on the crashed node", lambda: site.queued(life.job).get(life.job) != "RUNNING")
    lab.restart("node1")

    life.train()
    states = site.states(TINY, "pretrain.optimization.epochs=4")
    assert "requeued 3 times (" in states[stage] and "running" in states[stage]
    assert "restarted in place 1 times (" in states[stage]
    assert all(states[child] == f"waiting for {stage}" for child in children)
    site.brake.unlink()
    site.wait_for_result(stage)
    record = site.record(stage)
    assert record.job_id == life.job and len(record.attempts) == 5 and record.error is None
    saved = [attempt.saved for attempt in record.attempts]
    assert saved == sorted(saved) and saved[0] == 0
    provenance = json.loads((site.runs / stage / "provenance.json").read_text())
    assert [entry["slurm"]["SLURM_JOB_ID"] for entry in provenance] == [life.job] * 5
    first = site.record(children[0]).job_id
    site.wait("the children's turn", lambda: site.record(children[0]).attempts or first not in site.queued(first[:-2]))
