"""Rows from the command line to their accuracy."""

import json
import shlex
import subprocess
import sys

from launch.cluster import ROOT
from tests.runs import timeless
from tests.slurm.conftest import TINY, stage_ids

ROWS = "tests/slurm/two"


def test_the_demo_from_a_login_shell(site):
    """Both its rows, with the stages on 1 or 2 nodes and two tasks on each, to the report."""
    short = [f"{kind}.optimization.epochs=1" for kind in ("image_teacher", "video_teacher", "pretrain", "finetune")]
    cluster = ["nodes=2", "gpus_per_node=2", "pretrain.nodes=2"]
    alone = [f"{kind}.nodes=1" for kind in ("image_teacher", "video_teacher", "finetune")]
    words = [ROWS, *short, *(f"cluster.{setting}" for setting in (*cluster, *alone))]

    def shell(script: str, *options: str) -> str:
        line = shlex.join([f"launch/{script}", *words, *options])
        names = ("SLURM_CONF", "MVD_CLUSTER", "PATH")
        exports = "; ".join(f"export {name}={shlex.quote(site.environment[name])}" for name in names)
        command = ["bash", "-lc", f"{exports}; cd {shlex.quote(str(ROOT))}; {shlex.quote(sys.executable)} {line}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = shell("submit.py")
    assert "submitted to SLURM" in printed and "2 x 2" in printed and f"launch/status.py {ROWS}" in printed
    ids = stage_ids(ROWS, *short)
    for stage in ids["test"]:
        site.wait_for_result(stage, seconds=900)
    report = shell("report.py", "--markdown")
    (row,) = [line for line in report.splitlines() if line.startswith("| demo |")]
    assert row.split("|")[3].strip()[:-1].replace(".", "").replace(" / ", "").isdigit()
    provenance = json.loads((site.runs / ids["pretrain"][0] / "provenance.json").read_text())
    assert provenance[0]["processes"] == 4 and provenance[0]["slurm"]["SLURM_JOB_NUM_NODES"] == "2"
    site.wait_until_idle()
    assert all(state.startswith("done: ") for state in site.states(*words).values())


def test_two_rows_share_a_pretraining_and_their_arrays_line_up(site, lab):
    site.submit(TINY)
    ids = stage_ids(TINY)
    jobs = [site.record(ids[kind][0]).job_id for kind in ("pretrain", "finetune", "test")]
    root, finetunes, tests = (job.partition("_")[0] for job in jobs)
    assert [site.record(stage).job_id for stage in ids["finetune"]] == [f"{finetunes}_0", f"{finetunes}_1"]
    assert [site.record(stage).job_id for stage in ids["test"]] == [f"{tests}_0", f"{tests}_1"]
    waits = dict(line.split("|") for line in lab.run("squeue", "-h", "-r", "-o", "%i|%E").splitlines())
    assert all(waits[f"{finetunes}_{n}"].startswith(f"afterok:{root}(") for n in (0, 1))
    assert all(waits[f"{tests}_{n}"].startswith(f"aftercorr:{finetunes}_") for n in (0, 1))
    site.wait_for_result(ids["test"][1])
    site.wait_until_idle()
    expected = dict.fromkeys((root, *(f"{job}_{n}" for job in (finetunes, tests) for n in (0, 1))), "COMPLETED")
    site.wait("the accounts", lambda: site.account(root, finetunes, tests) == expected, seconds=20)
    whole = json.loads((site.runs / ids["test"][0] / "result.json").read_text())

    printed = site.submit(TINY, "--force", ids["test"][0], "cluster.test_shards=3")
    assert "put aside" in printed and "complete already: 4 of 5" in printed
    site.wait_for_result(ids["test"][0])
    split = json.loads((site.runs / ids["test"][0] / "result.json").read_text())
    assert timeless(split) == timeless(whole)
    site.wait_until_idle()
    assert len(list((site.runs / ids["test"][0] / "shards").iterdir())) == 3
    assert site.states(TINY)[ids["test"][0]].startswith("done: test top-1")
