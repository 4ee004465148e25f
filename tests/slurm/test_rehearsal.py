"""A rehearsal as jobs: in the stages' own layout, resumed on another one, and used by the plan."""

import json

from tests.slurm.conftest import TINY


def test_a_rehearsal_runs_in_its_layout_and_is_resumed_on_fewer_nodes(site):
    words = (TINY, "pretrain=null", "cluster.nodes=2")
    folder = site.runs / "rehearsals"
    printed = site.submit(*words, "--rehearse")
    assert "submitted to SLURM" in printed and "random weights for the fine-tuned classifier: test-tiny-" in printed
    assert "queued or running" not in site.submit(*words, "--rehearse")  # they are in the queue
    names = sorted(path.parent.name for path in folder.glob("*/job.json"))
    whole, resumed, test = names
    assert whole.startswith("finetune-tiny-") and resumed == f"{whole}-resumed" and test.startswith("test-tiny-")
    site.wait("their results", lambda: all((folder / name / "result.json").exists() for name in names), seconds=300)
    jobs = [json.loads((folder / name / "job.json").read_text())["job_id"] for name in names]
    site.wait("the jobs' end", lambda: not site.queued(*jobs))
    results = {name: json.loads((folder / name / "result.json").read_text())["rehearsal"] for name in names}
    assert [results[name]["gpus"] for name in names] == [2, 1, 1]
    assert results[test]["samples_per_second"] > 0
    assert len(list(folder.glob("jobs/*"))) == 3 and not list(site.runs.glob("*/stage.yaml"))

    report = site.submit(*words, "--rehearse")
    assert "2 rehearsals of 2: speed" in report and "for # 1, 2, 3, 4, without validation" in report
    assert "at the rates that rehearsals measured on CPUs for # 1, 2, 3, 4" in site.submit(*words, "--dry-run")
