"""Micro-batch, ZeRO configuration and activation checkpointing that a profile's gpu_memory_gb leads to."""

import dataclasses

import pytest

from experiments import all as all_rows
from experiments import demo, vith_k400, vitl_k400
from launch.cluster import Cluster, PretrainResources
from launch.local import run as local_run
from launch.plan.graph import build_graph
from launch.plan.resolve import build_stage
from mvd.config import ConfigError
from mvd.memory import memory_of
from mvd.stage import Stage

ONE_NODE = Cluster(nodes=1, gpu_memory_gb=80)


def trained(row, cluster: Cluster) -> dict[str, Stage]:
    return {node.kind: build_stage(node, cluster) for node in build_graph([row], "finetune")}


def counted(stage: Stage, micro_batch: int) -> float:
    how = stage.execution
    return memory_of(stage.recipe, how.world_size, how.deepspeed, "bf16").total(micro_batch)


def test_every_row_gets_the_largest_micro_batch_that_fits_and_divides_and_keeps_its_id():
    rows = [dataclasses.replace(row, teachers="train") for row in all_rows.rows]
    for node in build_graph(rows, "finetune"):
        stage = build_stage(node, ONE_NODE)
        how, total = stage.execution, node.recipe.optimization.global_batch
        assert how.micro_batch * how.accumulation * how.world_size == total and stage.id == node.id
        assert counted(stage, how.micro_batch) <= 0.92 * 80e9
        unit = 2 if node.kind == "finetune" else 1
        larger = [m for m in range(how.micro_batch + unit, total // 8 + 1, unit) if (total // 8) % m == 0]
        assert all(counted(stage, m) > 0.92 * 80e9 for m in larger)
        assert node.kind == "image_teacher" or not stage.recipe.activation_checkpointing


def test_activations_are_recomputed_only_where_not_even_the_smallest_micro_batch_fits():
    (needed,) = {counted(stage, 2) / 0.92e9 for stage in [trained(vith_k400.row, ONE_NODE)["finetune"]]}
    for memory, recomputed in ((needed + 0.1, False), (needed - 0.1, True)):
        stage = trained(vith_k400.row, dataclasses.replace(ONE_NODE, gpu_memory_gb=memory))["finetune"]
        assert stage.recipe.activation_checkpointing == recomputed
    without = trained(vith_k400.row, Cluster(nodes=1))["finetune"]
    assert without.recipe == vith_k400.row.finetune and without.execution.micro_batch == 8


def test_a_micro_batch_of_the_profile_stays_an_upper_limit():
    stage = trained(vitl_k400.row, dataclasses.replace(ONE_NODE, pretrain=PretrainResources(micro_batch=10)))[
        "pretrain"
    ]
    assert (stage.execution.micro_batch, stage.execution.accumulation) == (8, 8)


def test_a_global_batch_of_the_whole_data_set_is_allowed_and_a_larger_one_is_not():
    row, alone = demo.rows[0], Cluster(nodes=1, gpus_per_node=1)
    whole, more = (
        dataclasses.replace(
            row.finetune, optimization=dataclasses.replace(row.finetune.optimization, global_batch=batch)
        )
        for batch in (2400, 2408)
    )
    assert trained(dataclasses.replace(row, finetune=whole), alone)["finetune"].execution.world_size == 1
    with pytest.raises(ConfigError, match="motion has 2400 training samples, fewer than one global batch of 2408"):
        trained(dataclasses.replace(row, finetune=more), alone)


def test_a_gpu_that_is_too_small_is_refused_with_what_it_would_need():
    with pytest.raises(
        ConfigError, match=r"pretrain-vith\S+ gpu_memory_gb must be at least [\d.]+ .* got 8; use larger"
    ):
        trained(vith_k400.row, dataclasses.replace(ONE_NODE, gpu_memory_gb=8))


@pytest.mark.parametrize(("memory", "expected"), [(24, "zero1"), (80, "zero1"), (141, "zero0")])
def test_the_bytes_that_zero1_saves_decide_whether_it_is_used(memory, expected):
    stage = trained(vitl_k400.row, dataclasses.replace(ONE_NODE, gpu_memory_gb=memory))["pretrain"]
    assert stage.execution.deepspeed == expected


def test_a_local_run_asks_its_gpus_and_a_cpu_has_none(monkeypatch):
    monkeypatch.setattr(local_run, "count_gpus", lambda: 2)
    monkeypatch.setattr(local_run, "gpu_memory_gb", lambda: 25.0)
    assert local_run.this_machine(Cluster()).gpu_memory_gb == 25.0
    assert local_run.this_machine(ONE_NODE).gpu_memory_gb == 80
    monkeypatch.setattr(local_run, "count_gpus", lambda: 0)
    assert local_run.this_machine(ONE_NODE).gpu_memory_gb is None


def test_layouts_and_a_rows_own_ceiling(launch):
    done = launch(
        "submit.py", "vitl_k400", "--layouts", "cluster.gpu_memory_gb=80", "pretrain.optimization.micro_batch=20"
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("pretrain-")]
    assert [line[1:5] for line in lines] == [
        ["1", "8", "16", "4"],
        ["2", "16", "16", "2"],
        ["4", "32", "16", "1"],
        ["8", "64", "8", "1"],
    ]


def test_a_layout_that_does_not_fit_does_not_hide_the_others(launch):
    done = launch("submit.py", "vith_k400", "--layouts", "cluster.gpu_memory_gb=16", "cluster.gpus_per_node=2")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("pretrain-vith")]
    assert (
        done.returncode == 0
        and lines[0][1:] == ["1", *6 * ["-"]]
        and lines[2][1:3] == ["4", "8"]
        and int(lines[2][3]) >= 1
    )
    assert "on 1 node: " in done.stdout and "must be at least" in done.stdout
