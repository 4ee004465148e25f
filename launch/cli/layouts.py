"""What submit.py --layouts prints: how each stage that trains would run on 1, 2, 4 and 8 nodes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.cli.output import command, counted, print_next, print_table
from launch.cli.parser import Request
from launch.cli.plan_output import memory_text
from launch.cluster import Cluster
from launch.plan.graph import Node
from launch.plan.resolve import build_stage
from launch.plan.together import gpus_of
from mvd.config import KINDS, ConfigError
from mvd.flops import gpu_hours

NODES = (1, 2, 4, 8)


def print_layouts(request: Request, nodes: Sequence[Node]) -> None:
    """Prints a table of the stages that train, with one line per number of nodes."""
    columns = ["stage", "nodes>", "GPUs>", "micro-batch>", "accumulation>", "GB per GPU>", "GPU-hours>", "days>"]
    rate = request.cluster.sustained_tflops
    lines, impossible = [], []
    for node in nodes:
        if node.kind == "test":
            continue
        hours = gpu_hours(node.recipe, rate)
        for count in NODES:
            cluster = on_nodes(request.cluster, count)
            used = str(cluster.layout(node.kind, node.recipe).nodes)
            try:
                stage = build_stage(node, cluster)
            except ConfigError as error:
                lines.append([node.id, used, *6 * ["-"]])
                impossible.append(f"{node.id} on {counted(count, 'node')}: {error}")
                continue
            how = stage.execution
            batch = [str(how.world_size), str(how.micro_batch), str(how.accumulation), memory_text(stage)]
            lines.append([node.id, used, *batch, f"{hours:,.0f}", f"{hours / gpus_of(stage) / 24:,.1f}"])
    print_table(f"layouts with {request.cluster.gpus_per_node} GPUs per node", columns, lines)
    print("\n".join(impossible), end="\n" if impossible else "")
    print(f"GPU-hours and days at {rate:g} TFLOP/s sustained per GPU (cluster.sustained_tflops) in every layout")
    if request.cluster.gpu_memory_gb is None:
        print("official micro-batches: set gpu_memory_gb for the largest that fit (cluster.gpu_memory_gb=80)")
    print_next([("see the plan with the profile's nodes", command("submit.py", *request.plan_words, "--dry-run"))])


def on_nodes(cluster: Cluster, count: int) -> Cluster:
    """The profile with at most so many nodes for every kind of stage."""
    kinds: Any = {kind: dataclasses.replace(cluster.resources(kind), nodes=None) for kind in KINDS if kind != "test"}
    return dataclasses.replace(cluster, nodes=count, **kinds)
