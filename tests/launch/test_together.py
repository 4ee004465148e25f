"""Which stages of a plan run in one job, and how `--local` runs them."""

import dataclasses
import json
import sys

import pytest

from experiments import all as all_rows
from launch import submit
from launch.cluster import Cluster, PretrainResources
from launch.local import run as local
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.together import form_groups, with_shared_batches
from mvd.config import ConfigError

FROM_B = ["vits_from_vitb_k400", "vitb_from_vitb_k400"]
# Writes weights and result of each stage.yaml among its arguments, and what the processes were started with.
JOB = """
import json, os, pathlib, sys
for path in map(pathlib.Path, sys.argv[1:]):
    if os.environ["RANK"] == "0":
        (path.parent / "weights.safetensors").touch()
        (path.parent / "seen.json").write_text(json.dumps([len(sys.argv) - 1, os.environ["MVD_OWNER"]]))
        result = {"epochs": 1, "wall_seconds": 3.4, "loss": 0.25, "unreadable": []}
        (path.parent / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="module")
def nodes():
    return build_graph(all_rows.rows, until="pretrain")


def planned(nodes, cluster, *asked):
    groups = form_groups(nodes, cluster, asked)
    return groups, with_shared_batches([build_stage(node, cluster) for node in nodes], groups, cluster)


def test_all_that_can_share_run_together_unless_the_profile_says_otherwise(nodes):
    groups, stages = planned(nodes, Cluster())
    assert sorted(len(group) for group in groups) == [2, 4]
    assert planned(nodes, Cluster(pretrain=PretrainResources(share_teachers=False)))[0] == []
    by_name = {stage.recipe.name: stage.execution for stage in stages}
    split = {name: (how.micro_batch, how.accumulation, how.batch_parts) for name, how in by_name.items()}
    assert split == {
        "vits_from_vitb_e400": (16, 2, 1),
        "vitb_from_vitb_e400": (16, 2, 1),
        "vits_from_vitl_e400": (8, 4, 2),
        "vitb_from_vitl_e400": (8, 4, 2),
        "vitl_from_vitl_e400": (8, 2, 1),
        "vitl_from_vitl_e800": (8, 2, 1),
        "vith_from_vith_e800": (8, 2, 1),
    }
    assert [stage.id for stage in stages] == [node.id for node in nodes]


def test_a_group_has_the_gpus_that_divide_its_smallest_batch(nodes):
    _, stages = planned(nodes, Cluster(nodes=128))
    by_name = {stage.recipe.name: stage.execution for stage in stages}
    assert by_name["vits_from_vitb_e400"].world_size == 1024 and by_name["vits_from_vitl_e400"].world_size == 512
    assert (by_name["vits_from_vitl_e400"].micro_batch, by_name["vits_from_vitl_e400"].accumulation) == (1, 2)


def test_rows_or_stages_can_be_asked_to_run_together(nodes):
    ids = {node.recipe.name: node.id for node in nodes}
    groups, _ = planned(nodes, Cluster(), f"vitl_k400,{ids['vits_from_vitl_e400']}")
    assert groups == [[ids["vitl_from_vitl_e400"], ids["vits_from_vitl_e400"]]]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            "vitl_k400,vith_k400",
            "cannot share their teachers: pretrain.teacher differs (large and huge); run them apart",
        ),
        ("vitl_k400,vitl_ssv2", "needs two pre-trainings or more, got only pretrain-vitl_from_vitl_e400"),
        ("vitl_k400,demo", "the plan has no pre-training of 'demo'; use some of "),
    ],
)
def test_what_cannot_share_is_refused_with_the_reason(nodes, asked, reason):
    with pytest.raises(ConfigError) as caught:
        form_groups(nodes, Cluster(), [asked])
    assert str(caught.value).startswith(f"--together {asked}: ") and reason in str(caught.value)


def test_the_plan_says_what_runs_together_and_what_that_saves(profile, capsys):
    assert submit.main([*FROM_B, "--local", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "stages 1, 2 run together with one pass of their teachers: 333 instead of 504 GPU-hours, 171 saved" in printed
    )
    assert submit.main([*FROM_B, "--local", "--dry-run", "cluster.pretrain.share_teachers=false"]) == 0
    assert "run together" not in capsys.readouterr().out


@pytest.fixture
def two_students(nodes, tmp_path):
    """The stages of two pre-trainings whose inputs exist, and the rows they belong to."""
    cluster = dataclasses.replace(
        local.this_machine(Cluster(runs=str(tmp_path / "runs"))),
        teachers=dict.fromkeys(("mae_vitb", "videomae_vitb"), ""),
    )
    members = [node for node in nodes if set(node.rows) & set(FROM_B)]
    (tmp_path / "teacher").touch()
    inputs = dict.fromkeys(("image_teacher", "video_teacher"), str(tmp_path / "teacher"))
    groups = form_groups(members, cluster, ())
    stages = with_shared_batches([build_stage(node, cluster) for node in members], groups, cluster)
    return [(node, dataclasses.replace(stage, inputs=inputs)) for node, stage in zip(members, stages, strict=True)]


def test_students_run_in_one_job_that_owns_their_run_directories(two_students, monkeypatch):
    command = [sys.executable, "-S", "-c", JOB]
    monkeypatch.setattr(local, "stage_command", lambda *stages: [*command, *(str(s.files.stage) for s in stages)])
    assert local.run_stages(all_rows.rows, two_students) == 0
    for _, stage in two_students:
        count, owner = json.loads((stage.directory / "seen.json").read_text())
        record = json.loads(stage.files.job.read_text())
        assert count == 2 and owner.startswith("local-") and not stage.files.owner.exists()
        assert record["folder"] == str(two_students[0][1].directory / "logs")
        assert record["attempts"][0]["error"] is None and record["attempts"][0]["ended"]


def test_only_the_student_without_a_result_has_failed(two_students, monkeypatch):
    first, second = (stage for _, stage in two_students)
    program = f"{JOB}\nif os.environ['RANK'] == '0':\n    os.remove({str(second.files.result)!r})\n    sys.exit(2)"
    command = [sys.executable, "-S", "-c", program]
    monkeypatch.setattr(local, "stage_command", lambda *stages: [*command, *(str(s.files.stage) for s in stages)])
    assert local.run_stages(all_rows.rows, two_students) == 2
    errors = [json.loads(stage.files.job.read_text())["attempts"][0]["error"] for stage in (first, second)]
    assert errors[0] is None and errors[1] == "exit code 2"
