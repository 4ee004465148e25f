"""The graph of stages, their identities, and the batches they get."""

import dataclasses
import hashlib

import pytest

from experiments import all as all_rows
from experiments import vitb_from_vitb_k400, vith_k400
from experiments.teachers import mae_vitb
from launch.cluster import Cluster, PretrainResources, Resources, load_cluster
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage, missing_settings
from launch.plan.rows import load_rows
from mvd.config import KINDS, ConfigError
from mvd.config.run_settings import DatasetPaths
from mvd.config.typed import parse_override
from mvd.flops import gpu_hours, tflop_per_sample, total_tflop
from mvd.stage import Stage


def ids(rows, *settings):
    overrides = [parse_override(text) for text in settings]
    return {node.id for node in build_graph(load_rows([row.name for row in rows], overrides))}


def test_all_rows_share_seven_pretrainings():
    nodes = build_graph(all_rows.rows)
    counts = [sum(node.kind == kind for node in nodes) for kind in KINDS]
    assert counts == [0, 0, 7, 14, 14]
    assert all(len(node.rows) == 2 for node in nodes if node.kind == "pretrain")


def test_parents_come_first_and_belong_to_the_row():
    rows = [dataclasses.replace(row, teachers="train") for row in all_rows.rows]
    nodes = build_graph(rows)
    assert [sum(node.kind == kind for node in nodes) for kind in KINDS] == [3, 3, 7, 14, 14]
    place = {node.id: number for number, node in enumerate(nodes)}
    for node in nodes:
        assert all(place[parent] < place[node.id] for parent in node.stage_parents)
        assert all(set(node.rows) <= set(nodes[place[parent]].rows) for parent in node.stage_parents)
    roles = {node.kind: tuple(node.parents) for node in nodes}
    assert roles["pretrain"] == ("image_teacher", "video_teacher")
    assert (roles["finetune"], roles["test"]) == (("pretrain",), ("finetune",))


def test_until_leaves_the_later_kinds_out():
    assert {node.kind for node in build_graph(all_rows.rows, until="finetune")} == {"pretrain", "finetune"}


def test_a_teacher_alone_is_a_plan_of_one_stage():
    (node,) = build_graph([mae_vitb.row])
    assert node.kind == "image_teacher" and node.parents == {}


def test_without_pretraining_nothing_is_trained_before_the_finetuning():
    (row,) = load_rows(["vitb_from_vitb_k400"], [parse_override("pretrain=null"), parse_override("teachers=train")])
    finetune, test = build_graph([row])
    assert (finetune.kind, finetune.parents) == ("finetune", {})
    assert test.parents == {"finetune": finetune.id}


def test_identity_follows_the_recipe():
    rows = [vitb_from_vitb_k400.row]
    before = ids(rows)
    assert ids(rows, "pretrain.optimization.base_lr=1.5e-4", "finetune.optimization.warmup_epochs=5") == before
    assert ids(rows, "finetune.optimization.micro_batch=2", "finetune.activation_checkpointing=true") == before
    assert ids(rows, "target.top1=99") == before
    pretrain = {name for name in before if name.startswith("pretrain")}
    assert ids(rows, "finetune.seed=1") & before == pretrain
    assert not ids(rows, "pretrain.seed=1") & before
    assert not ids(rows, "teachers=train") & before


def test_identity_does_not_know_the_cluster(tmp_path):
    here = Cluster(teachers={"mae_vitb": "/a", "videomae_vitb": "/b"}, datasets={"k400": DatasetPaths(root="/k")})
    there = dataclasses.replace(
        here, runs=str(tmp_path), pretrain=PretrainResources(nodes=2, deepspeed="zero3"), workers=1
    )
    for node in build_graph([vitb_from_vitb_k400.row]):
        one, other = build_stage(node, here), build_stage(node, there)
        assert one.id == other.id and one.execution != other.execution


def test_every_row_and_teacher_solves_on_the_default_cluster():
    for node in build_graph([dataclasses.replace(row, teachers="train") for row in all_rows.rows]):
        how = build_stage(node, Cluster()).execution
        assert how.world_size == (8 if node.kind == "test" else 32)
        if node.kind != "test":
            assert how.micro_batch * how.accumulation * how.world_size == node.recipe.optimization.global_batch
            assert how.micro_batch <= node.recipe.optimization.micro_batch


def test_a_micro_batch_ceiling_is_made_up_by_accumulation():
    cluster = Cluster(pretrain=PretrainResources(micro_batch=5))
    node = build_graph([vith_k400.row])[0]
    how = build_stage(node, cluster).execution
    assert (how.micro_batch, how.accumulation, how.world_size) == (4, 4, 32)


def test_an_impossible_batch_names_the_gpu_counts_that_work():
    node = build_graph([vith_k400.row])[0]
    with pytest.raises(ConfigError, match=r"vith_from_vith.* 512 .* 56 GPUs; use 32 or 64 GPUs"):
        build_stage(node, Cluster(pretrain=PretrainResources(nodes=7)))


def test_stages_start_from_their_parents_weights_and_survive_yaml(tmp_path):
    cluster = Cluster(runs=str(tmp_path), teachers={"mae_vitb": "/t/image.pth", "videomae_vitb": "/t/video.pth"})
    nodes = build_graph([vitb_from_vitb_k400.row])
    stages = [build_stage(node, cluster) for node in nodes]
    assert stages[0].inputs == {"image_teacher": "/t/image.pth", "video_teacher": "/t/video.pth"}
    assert stages[1].inputs == {"pretrain": f"{tmp_path}/{nodes[0].id}/weights.safetensors"}
    assert stages[2].inputs == {"finetune": f"{tmp_path}/{nodes[1].id}/weights.safetensors"}
    for stage in stages:
        path = tmp_path / "stage.yaml"
        path.write_text(stage.to_yaml())
        assert Stage.from_yaml(path) == stage


def test_a_given_pretraining_is_not_run_and_its_content_is_part_of_the_identity(tmp_path):
    given, copy = tmp_path / "student.pth", tmp_path / "copy.pth"
    given.write_bytes(b"weights")
    copy.write_bytes(b"weights")
    rows = [vitb_from_vitb_k400.row]
    with_file = ids(rows, f"pretrain.weights={given}")
    assert {name.partition("-")[0] for name in with_file} == {"finetune", "test"}
    assert not with_file & ids(rows)
    assert ids(rows, f"pretrain.weights={copy}") == with_file
    given.write_bytes(b"other weights")
    assert not ids(rows, f"pretrain.weights={given}") & with_file


def test_a_stage_starts_from_the_given_file_and_knows_its_content(tmp_path):
    given = tmp_path / "student.pth"
    given.write_bytes(b"weights")
    (row,) = load_rows(["vitb_from_vitb_k400"], [parse_override(f"pretrain.weights={given}")])
    finetune, test = (build_stage(node, Cluster(runs=str(tmp_path))) for node in build_graph([row]))
    assert finetune.inputs == {"pretrain": str(given)}
    assert finetune.digests == {"pretrain": hashlib.sha256(b"weights").hexdigest()}
    assert test.inputs == {"finetune": f"{finetune.directory}/weights.safetensors"} and test.digests == {}


def test_a_given_finetuning_leaves_only_the_test(tmp_path):
    for name in ("student.pth", "classifier.pth"):
        (tmp_path / name).write_bytes(name.encode())
    settings = [f"pretrain.weights={tmp_path}/student.pth", f"finetune.weights={tmp_path}/classifier.pth"]
    (row,) = load_rows(["vitb_from_vitb_k400"], [parse_override(text) for text in settings])
    (test,) = build_graph([row])
    assert build_stage(test, Cluster()).inputs == {"finetune": f"{tmp_path}/classifier.pth"}


def test_a_given_file_has_to_exist(tmp_path):
    (row,) = load_rows(["vitb_from_vitb_k400"], [parse_override(f"finetune.weights={tmp_path}/none.pth")])
    with pytest.raises(ConfigError, match=r"finetune.weights: there is no file .*none.pth; correct the path"):
        build_graph([row])


@pytest.mark.parametrize(
    ("setting", "together", "apart"),
    [
        ("pretrain", ["vitb_from_vitb_k400", "vitb_from_vitb_ssv2"], ["vitb_from_vitb_k400", "vitb_from_vitl_k400"]),
        ("finetune", ["vitb_from_vitb_k400"], ["vitb_from_vitb_k400", "vitb_from_vitl_k400"]),
    ],
)
def test_one_file_cannot_stand_for_different_stages(tmp_path, setting, together, apart):
    (tmp_path / "given.pth").write_bytes(b"weights")
    override = parse_override(f"{setting}.weights={tmp_path}/given.pth")
    assert build_graph(load_rows(together, [override]))
    with pytest.raises(ConfigError, match=rf"given.pth cannot replace different {setting} stages"):
        build_graph(load_rows(apart, [override]))


def test_undeclared_fields_are_listed_once():
    fields = [line.split(":")[0] for line in missing_settings(build_graph(all_rows.rows), Cluster())]
    assert len(fields) == len(set(fields)) == 8
    assert {"datasets.k400.root", "datasets.ssv2.root", "teachers.mae_vith", "teachers.videomae_vitb"} <= set(fields)


def test_declared_paths_have_to_exist(tmp_path):
    nodes = build_graph([vitb_from_vitb_k400.row], until="pretrain")
    cluster = Cluster(datasets={"k400": DatasetPaths(root=str(tmp_path))})
    assert f"datasets.k400.root: {tmp_path}/train.csv does not exist; correct the path" in missing_settings(
        nodes, cluster
    )
    (tmp_path / "train.csv").touch()
    assert [line.split(":")[0] for line in missing_settings(nodes, cluster)] == [
        "teachers.mae_vitb",
        "teachers.videomae_vitb",
    ]
    found = missing_settings(nodes, dataclasses.replace(cluster, teachers={"mae_vitb": str(tmp_path / "gone.pth")}))
    assert f"teachers.mae_vitb: there is no file {tmp_path}/gone.pth; correct the path (or teachers=train)" in found


def test_generated_data_needs_no_declaration(tmp_path):
    empty = tmp_path / "cluster.yaml"
    empty.touch()
    cluster = load_cluster(str(empty), [])
    assert missing_settings(build_graph(load_rows(["demo"], [])), cluster) == []
    assert cluster.datasets["motion"].root.endswith("data/motion")


@pytest.mark.parametrize(
    ("row", "pretrain", "finetune"),
    [
        ("vits_from_vitb_k400", 0.78, 0.34),
        ("vits_from_vitl_k400", 2.31, 0.34),
        ("vitb_from_vitb_k400", 1.09, 1.07),
        ("vitb_from_vitl_k400", 2.63, 1.07),
        ("vitl_k400", 2.84, 3.57),
        ("vith_k400", 6.09, 7.13),
    ],
)
def test_cost_per_clip(row, pretrain, finetune):
    """Against a count of the real networks' multiply-adds."""
    (row,) = load_rows([row], [])
    assert tflop_per_sample(row.pretrain) == pytest.approx(pretrain, rel=0.02)
    assert tflop_per_sample(row.finetune) == pytest.approx(finetune, rel=0.02)


def test_cost_of_a_stage_counts_whole_updates_and_copies():
    row = vitb_from_vitb_k400.row
    assert total_tflop(row.pretrain) == pytest.approx(tflop_per_sample(row.pretrain) * 234 * 1024 * 400)
    assert total_tflop(row.finetune) == pytest.approx(tflop_per_sample(row.finetune) * 626 * 384 * 2 * 75)
    assert gpu_hours(row.pretrain, 50.0) == pytest.approx(2 * gpu_hours(row.pretrain, 100.0))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("vits_from_vitl_k400", "zero0"),
        ("vitb_from_vitl_ssv2", "zero0"),
        ("vitl_k400", "zero1"),
        ("vith_ssv2", "zero1"),
    ],
)
def test_only_large_networks_are_divided_among_the_gpus_unless_the_profile_says_so(row, expected):
    nodes = build_graph(load_rows([row], []))[:2]
    assert [build_stage(node, Cluster()).execution.deepspeed for node in nodes] == [expected, expected]
    profile = Cluster(finetune=Resources(deepspeed="zero2"))
    assert [build_stage(node, profile).execution.deepspeed for node in nodes] == [expected, "zero2"]
