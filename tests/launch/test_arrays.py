"""How stages become SLURM arrays, and what each array waits for."""

import dataclasses

import pytest

from launch.cluster import Cluster, Layout, Resources
from launch.plan.arrays import Array, build_arrays
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from launch.plan.rows import load_rows
from mvd.config import KINDS
from mvd.config.typed import parse_override


def plan(*targets, settings=(), jobs=(), complete=(), cluster=None, largest=None):
    """The arrays of rows; `jobs` and `complete` say by the names of rows which of their stages are not to submit."""
    cluster = cluster or Cluster()
    nodes = build_graph(load_rows(list(targets), [parse_override(text) for text in settings]))
    known = {node.id: job for node in nodes for kind, row, job in jobs if kind == node.kind and row in node.rows}
    done = {node.id for node in nodes if any(node.kind == kind and row in node.rows for kind, row in complete)}
    stages = [build_stage(node, cluster) for node in nodes if node.id not in known and node.id not in done]
    return build_arrays(nodes, stages, known, cluster, largest=largest)


def summary(arrays: list[Array]) -> list[tuple[str, int, str]]:
    return [(array.stages[0].kind, array.size, array.dependency) for array in arrays]


def test_a_row_is_three_plain_jobs_in_a_chain():
    arrays = plan("vith_k400")
    assert summary(arrays) == [("pretrain", 1, ""), ("finetune", 1, "afterok:#1"), ("test", 1, "afterok:#2")]
    assert [array.layout for array in arrays] == [Layout(4, 8), Layout(4, 8), Layout(1, 8)]
    assert [array.job_ids for array in arrays] == [["#1"], ["#2"], ["#3"]]


def test_a_suite_follows_index_by_index():
    arrays = plan("k400")
    assert summary(arrays) == [("pretrain", 7, ""), ("finetune", 7, "aftercorr:#1"), ("test", 7, "aftercorr:#2")]
    assert [len({array.stages[index].recipe.size for array in arrays[1:]}) for index in range(7)] == [1] * 7
    pretrain, finetune, _ = arrays
    inputs = [stage.inputs["pretrain"] for stage in finetune.stages]
    assert [stage.id in path for stage, path in zip(pretrain.stages, inputs, strict=True)] == [True] * 7


def test_an_array_is_split_where_the_site_allows_no_larger_one():
    arrays = plan("k400", largest=3)
    sizes = {kind: [array.size for array in arrays if array.stages[0].kind == kind] for kind in KINDS[2:]}
    assert sizes == {"pretrain": [3, 3, 1], "finetune": [3, 3, 1], "test": [3, 3, 1]}
    assert [array.dependency for array in arrays[3:]] == [
        *("aftercorr:#1", "aftercorr:#2", "afterok:#3"),
        *("aftercorr:#4", "aftercorr:#5", "afterok:#6"),
    ]
    assert [stage.id for array in plan("k400", largest=7) for stage in array.stages] == [
        stage.id for array in plan("k400") for stage in array.stages
    ]


def test_an_earlier_larger_array_is_followed_as_far_as_a_smaller_one_can():
    jobs = [("pretrain", name, f"24_{index}") for index, name in enumerate(row.name for row in load_rows(["k400"], []))]
    arrays = plan("k400", jobs=jobs, largest=5)
    finetunes = [array for array in arrays if array.stages[0].kind == "finetune"]
    assert [(array.size, array.dependency) for array in finetunes] == [
        (5, "aftercorr:24"),
        (1, "afterok:24_5"),
        (1, "afterok:24_6"),
    ]


def test_all_rows_are_five_calls_and_share_the_pretrainings():
    assert summary(plan("all")) == [
        ("pretrain", 7, ""),
        ("finetune", 7, "aftercorr:#1"),
        ("finetune", 7, "aftercorr:#1"),
        ("test", 7, "aftercorr:#2"),
        ("test", 7, "aftercorr:#3"),
    ]


def test_stages_with_the_same_parents_are_one_array_after_them():
    rows = ("vitl_k400", "vitl_e800_k400")
    arrays = plan(*rows, settings=["teachers=train"])
    assert summary(arrays)[:3] == [("image_teacher", 1, ""), ("video_teacher", 1, ""), ("pretrain", 2, "afterok:#1:#2")]
    assert summary(plan("vitl_k400", "vitl_ssv2"))[1] == ("finetune", 2, "afterok:#1")


def test_what_does_not_line_up_waits_for_the_right_elements():
    arrays = plan("vitl_k400", "vitb_from_vitb_k400", jobs=[("pretrain", "vitl_k400", "24_5")])
    assert summary(arrays) == [
        ("pretrain", 1, ""),
        ("finetune", 1, "afterok:24_5"),
        ("finetune", 1, "afterok:#1"),
        ("test", 1, "afterok:#2"),
        ("test", 1, "afterok:#3"),
    ]


def test_another_suite_attaches_to_a_queued_array():
    rows = [row.name for row in load_rows(["ssv2"], [])]
    jobs = [("pretrain", row, f"24_{index}") for index, row in enumerate(rows)]
    assert summary(plan("ssv2", jobs=jobs)) == [("finetune", 7, "aftercorr:24"), ("test", 7, "aftercorr:#1")]


def test_only_the_beginning_of_a_queued_array_is_followed_index_by_index():
    rows = [row.name for row in load_rows(["ssv2"], [])]
    jobs = [("pretrain", row, f"24_{index}") for index, row in enumerate(rows) if index != 2]
    arrays = plan("ssv2", jobs=jobs, complete=[("pretrain", rows[2])])
    assert summary(arrays)[0] == ("finetune", 2, "aftercorr:24")
    assert {dependency for kind, _, dependency in summary(arrays)[1:] if kind == "finetune"} == {
        "",
        *(f"afterok:24_{index}" for index in (3, 4, 5, 6)),
    }


def test_complete_parents_are_not_waited_for():
    assert summary(plan("vith_k400", complete=[("pretrain", "vith_k400")])) == [
        ("finetune", 1, ""),
        ("test", 1, "afterok:#1"),
    ]
    assert plan("vith_k400", complete=[(kind, "vith_k400") for kind in ("pretrain", "finetune", "test")]) == []


def test_a_split_test_is_an_array_of_jobs_with_one_gpu():
    arrays = plan("vitl_k400", "vith_k400", cluster=Cluster(test_shards=4))
    assert summary(arrays)[2:] == [("test", 4, "afterok:#2_0"), ("test", 4, "afterok:#2_1")]
    assert arrays[2].layout == Layout(1, 1) and arrays[2].stages[0].execution.world_size == 1
    assert arrays[2].job_ids == ["#3"]
    tuned = [("finetune", name) for name in ("vitl_k400", "vith_k400")]
    pretrained = [("pretrain", name) for _, name in tuned]
    again = plan("vitl_k400", "vith_k400", complete=[*pretrained, *tuned], cluster=Cluster(test_shards=4))
    assert summary(again) == [("test", 4, ""), ("test", 4, "")]  # one can be cancelled without the other


@pytest.mark.parametrize(
    ("nodes", "gpus", "layout"),
    [(4, 8, Layout(4, 8)), (1, 3, Layout(1, 2)), (4, 6, Layout(4, 4)), (3, 8, Layout(2, 8))],
)
def test_a_batch_of_512_gets_the_most_gpus_that_it_splits_over_evenly(nodes, gpus, layout):
    (row,) = load_rows(["vith_k400"], [])
    assert Cluster(nodes=nodes, gpus_per_node=gpus).layout("pretrain", row.pretrain) == layout


def test_stages_of_another_shape_are_another_array():
    cluster = dataclasses.replace(Cluster(), nodes=1, gpus_per_node=12, finetune=Resources(micro_batch=2))
    shapes = {(array.stages[0].kind, array.layout) for array in plan("ssv2", cluster=cluster)}
    assert {layout for kind, layout in shapes if kind == "finetune"} == {Layout(1, 12), Layout(1, 8)}
