"""Students that share their teachers in one job: it is killed in part, one is complete early, and one is cancelled."""

import json
import os
import signal

from safetensors.torch import load_file

from mvd.owner import read_owner
from mvd.run_directory import RunDirectory
from tests.slurm.conftest import stage_ids

TRIO = "tests/slurm/trio"
HELD = "cluster.slurm.options.hold=true"
UPDATES_OF_A = 6


def test_each_student_of_a_job_has_a_life_of_its_own(site, lab, new_site, tmp_path):
    ids = stage_ids(TRIO)
    a, b, c = ids["pretrain"]
    child_of = dict(zip((a, b, c), ids["finetune"], strict=True))
    often = "cluster.checkpoint_every=1"
    (tmp_path / "alone").mkdir()
    alone = new_site(tmp_path / "alone")
    alone.submit(TRIO, "cluster.pretrain.share_teachers=false", often, "--until", "pretrain")
    lab.run("scancel", alone.record(c).job_id)

    site.brake.write_text(json.dumps({"updates": 6}))  # two of each student
    printed = site.submit(TRIO, often, "--until", "finetune")
    jobs = {stage: site.record(stage).job_id for stage in (a, b, c, *child_of.values())}
    assert len({jobs[stage] for stage in (a, b, c)}) == 1 and printed.count(f"afterok:{jobs[a]}") == 1
    reached = site.brake.with_suffix(".reached")
    site.wait("the first updates", reached.exists)
    reached.unlink()
    site.brake.write_text(json.dumps({"updates": 3 * UPDATES_OF_A + 2}))  # by then, A is complete in any case
    os.kill(lab.tasks(jobs[a])[0], signal.SIGKILL)
    site.wait("the end of A", reached.exists)
    assert [len(site.record(stage).attempts) for stage in (a, b, c)] == [2, 2, 2]
    assert site.record(b).attempts[1].start == 1 and "signal 9" in site.record(b).attempts[0].error
    assert "=== job " in site.run("logs.py", a) and site.run("logs.py", a) == site.run("logs.py", b)

    site.wait("the turn of A's child", lambda: site.record(child_of[a]).attempts)
    assert site.queued(jobs[b]) == {jobs[b]: "RUNNING"}
    states = site.states(TRIO)
    assert states[a].startswith("done") and states[b].startswith("running for")
    assert states[child_of[b]] == f"waiting for {b}"
    printed = site.run("cancel.py", c, child_of[c])
    assert f"cancelled: {c}, job {jobs[c]}, which goes on with the others" in printed
    assert f"cancelled: {child_of[c]}, job {jobs[child_of[c]]}" in printed
    assert site.states(TRIO)[c].startswith("cancelled, while its job goes on with others")
    assert f"queued or running already: {b}" in site.submit(TRIO, HELD, "--until", "pretrain")
    assert site.record(c).job_id != jobs[c]  # C is submitted again, and nothing else
    assert site.record(b).job_id == jobs[b]

    site.brake.unlink()
    site.wait_for_result(b)
    site.wait("the turn of B's child", lambda: site.record(child_of[b]).attempts)
    site.wait("the end of the job", lambda: jobs[b] not in site.queued(jobs[b]))
    site.wait("the account", lambda: site.account(jobs[b]) == {jobs[b]: "COMPLETED"}, seconds=20)
    assert all(read_owner(RunDirectory(site.runs / stage)) is None for stage in (a, b, c))
    assert not (site.runs / c / "result.json").exists()
    for stage in (a, b):
        alone.wait_for_result(stage)
        ours, theirs = (load_file(where.runs / stage / "weights.safetensors") for where in (site, alone))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
