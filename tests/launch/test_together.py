"""Which stages of a plan run in one job, and how `--local` runs them."""

import dataclasses
import json
import re
import sys

import pytest

from experiments import all as all_rows
from launch import submit
from launch.cluster import Cluster, Layout, PretrainResources
from launch.job.record import Record, read_record, write_record
from launch.local import run as local
from launch.plan.arrays import build_arrays
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from launch.plan.together import (
    days_until_complete,
    form_groups,
    memory_of_stages,
    plan_together,
    with_shared_batches,
)
from mvd.config import ConfigError
from mvd.config.typed import parse_override
from mvd.memory import CONTEXT, GB, USABLE, memory_of, teacher_bytes
from mvd.owner import Owner, read_owner, take

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


def test_a_group_that_does_not_fit_the_gpus_runs_apart_and_is_refused_if_asked_for(nodes, profile, capsys):
    small = dataclasses.replace(Cluster(), gpu_memory_gb=12.0)
    nodes = [node for node in nodes if node.recipe.teacher == "large"]
    plan = plan_together(nodes, small, [])
    assert plan.groups == [] and all(stage.execution.batch_parts == 1 for stage in plan.stages)
    (sentence,) = plan.apart
    assert "run apart: one job needs GPUs of at least 14.0 GB, got gpu_memory_gb=12; --together can ask" in sentence
    with pytest.raises(ConfigError, match="cannot share their teachers: one job needs GPUs of at least 14.0 GB"):
        plan_together(nodes, small, ["vitl_k400,vits_from_vitl_k400,vitb_from_vitl_k400,vitl_e800_k400"])
    fewer = plan_together(nodes, small, ["vitl_k400,vits_from_vitl_k400"])
    assert len(fewer.groups[0]) == 2
    rows = ["vitl_k400", "vits_from_vitl_k400", "vitb_from_vitl_k400", "vitl_e800_k400", "--until", "pretrain"]
    assert submit.main([*rows, "--dry-run", "cluster.gpu_memory_gb=12"]) == 0
    assert "could share their teachers, but run apart" in capsys.readouterr().out


def test_the_memory_of_a_group_has_the_teachers_once(nodes, profile, capsys):
    """B and S from L alone 10.0 and 6.0 GB with 16 clips each, of which 1.5 are CUDA's and 1.2 the two teachers'."""
    plan = plan_together(nodes, Cluster(gpu_memory_gb=80), ["vits_from_vitl_k400,vitb_from_vitl_k400"])
    small, base = (s for s in plan.stages if s.id in plan.groups[0])
    assert small.execution.micro_batch == base.execution.micro_batch == 32
    alone = [memory_of(s.recipe, 32, s.execution.deepspeed, "bf16") for s in (small, base)]
    common = CONTEXT + teacher_bytes(small.recipe, 2)
    expected = alone[0].fixed + alone[1].fixed - common + 32 * max(memory.sample for memory in alone)
    assert memory_of_stages([small, base]).total(32) == pytest.approx(expected)
    words = ["vits_from_vitl_k400", "vitb_from_vitl_k400", "--dry-run", "cluster.gpu_memory_gb=80"]
    assert submit.main(words) == 0
    assert capsys.readouterr().out.count(f"{expected / GB:.1f}, shared") == 2


@pytest.mark.parametrize("gpu_memory_gb", [16.0, 20.0, 40.0])
def test_the_micro_batch_of_a_group_fits_the_gpus_with_the_states_of_all(nodes, gpu_memory_gb):
    plan = plan_together(nodes, Cluster(gpu_memory_gb=gpu_memory_gb), [])
    assert plan.groups
    for members in plan.members():
        micro_batch = max(stage.execution.micro_batch for stage in members)
        assert memory_of_stages(members).total(micro_batch) <= USABLE * gpu_memory_gb * GB


def test_a_student_that_is_complete_is_not_counted_among_those_that_will_share(nodes, tmp_path):
    plan = plan_together(nodes, Cluster(runs=str(tmp_path)), [])
    sizes = sorted(len(members) for members in plan.missing_members())
    for members in plan.members():
        members[0].directory.mkdir()
        members[0].files.write_result({"epochs": 1})
    assert sizes == [2, 4] and [len(members) for members in plan.missing_members()] == [3]


def test_fourteen_rows_are_seven_calls_of_sbatch_with_shared_teachers():
    nodes = build_graph(all_rows.rows)
    plan = plan_together(nodes, Cluster(), [])
    arrays = build_arrays(nodes, plan.stages, {}, Cluster(), plan.groups)
    shapes = [(array.stages[0].kind, array.size, array.dependency) for array in arrays]
    assert shapes == [
        ("pretrain", 3, ""),
        ("finetune", 4, "afterok:#1_1"),
        ("finetune", 8, "afterok:#1_2"),
        ("finetune", 2, "afterok:#1_0"),
        ("test", 8, "aftercorr:#3"),
        ("test", 4, "aftercorr:#2"),
        ("test", 2, "aftercorr:#4"),
    ]
    assert [len(element) for element in arrays[0].elements] == [1, 2, 4]
    assert [len(job) for job in arrays[0].jobs] == [1, 2, 4] and len(arrays[0].stages) == 7
    parents = {node.id: node.stage_parents for node in nodes}
    ids = {stage.id for stage in arrays[0].elements[2]}
    assert {parent for stage in arrays[2].stages for parent in parents[stage.id]} == ids


def test_single_pretrainings_are_still_followed_index_by_index_beside_a_group():
    nodes = build_graph(all_rows.rows)
    plan = plan_together(nodes, Cluster(), [",".join(FROM_B)])
    arrays = build_arrays(nodes, plan.stages, {}, Cluster(), plan.groups)
    assert len(arrays) == 7 and [array.size for array in arrays] == [6, 5, 5, 4, 5, 5, 4]
    assert [array.dependency for array in arrays[1:4]] == ["aftercorr:#1", "aftercorr:#1", "afterok:#1_5"]
    later = [node for node in nodes if node.kind == "finetune"]
    queued = {stage.id: job for e, job in zip(arrays[0].elements, arrays[0].job_ids, strict=True) for stage in e}
    again = build_arrays(nodes, [build_stage(node, Cluster()) for node in later], queued, Cluster(), plan.groups)
    assert [(array.size, array.dependency) for array in again] == [
        (5, "aftercorr:#1"),
        (5, "aftercorr:#1"),
        (4, "afterok:#1_5"),
    ]


def test_a_group_has_the_nodes_of_its_smallest_batch_and_waits_for_its_teachers_once():
    rows = load_rows([*FROM_B, "vits_from_vitl_k400", "vitl_k400"], [parse_override("teachers=train")])
    nodes, cluster = build_graph(rows, until="pretrain"), Cluster(nodes=128)
    plan = plan_together(nodes, cluster, [])
    arrays = [a for a in build_arrays(nodes, plan.stages, {}, cluster, plan.groups) if a.stages[0].kind == "pretrain"]
    assert sorted((len(array.stages), array.layout, array.dependency.count(":#")) for array in arrays) == [
        (2, Layout(64, 8), 2),
        (2, Layout(128, 8), 2),
    ]


def test_a_student_is_complete_before_its_group_is(nodes):
    plan = plan_together(nodes, Cluster(), [])
    names = {stage.recipe.name: stage.id for stage in plan.stages}
    days = days_until_complete(plan, 100)
    small, longest = (days[names[name]] for name in ("vits_from_vitl_e400", "vitl_from_vitl_e800"))
    assert longest == pytest.approx(1855 / 32 / 24, abs=0.01)
    assert small == pytest.approx((1855 - 759.1) / 32 / 24, abs=0.01)  # L goes on alone for 400 epochs


def test_the_plan_says_what_runs_together_and_what_that_saves(profile, capsys):
    assert submit.main([*FROM_B, "--local", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "stages 1, 2 run together with one pass of their teachers: 329 instead of 500 GPU-hours, 171 saved" in printed
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


def test_a_run_that_was_replaced_keeps_its_hands_off_what_its_successor_has_written(two_students, monkeypatch):
    files, successor = two_students[0][1].files, Record("24", "", "2026-01-01", 1, [], [])

    def replaced(*_):
        take(files, Owner("24", 0, "node1", "2026-01-01"), lambda _: True)
        write_record(files, successor)
        return 1

    monkeypatch.setattr(local, "run_processes", replaced)
    assert local.run_stages(all_rows.rows, two_students) == 1
    assert read_record(files) == successor and read_owner(files).job == "24"


def test_small_gpu_hours_have_decimals(profile, capsys):
    assert submit.main(["demo", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"about 0\.\d\d GPU-hours \(0\.\d\d without shared teachers\)", printed)
    assert re.search(r"0\.\d\d instead of 0\.\d\d GPU-hours, 0\.\d\d saved", printed)
