"""The host of a process: the cores that it may use."""

import os

import pytest

from mvd.host import usable_cores

STEP = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "64", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("mask", "variables", "cores"),
    [
        (8, STEP, 8),  # --cpus-per-gpu=8: SLURM binds the task and sets no SLURM_CPUS_PER_TASK
        (8, {**STEP, "SLURM_CPUS_PER_TASK": "8"}, 8),
        (1, {**STEP, "SLURM_CPUS_PER_TASK": "8"}, 1),  # a leaked SLURM_CPU_BIND: more would share one core
        (64, {**STEP, "SLURM_CPUS_PER_TASK": "6"}, 6),  # a cluster that does not bind tasks
        (64, STEP, 8),
        (64, {**STEP, "LOCAL_WORLD_SIZE": "1"}, 64),
        (16, {"LOCAL_WORLD_SIZE": "4"}, 4),  # torchrun
        (16, {"LOCAL_WORLD_SIZE": "32"}, 1),
        (16, {"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "64"}, 16),  # in the batch script or in salloc
    ],
)
def test_the_affinity_mask_decides_how_many_cores_a_process_has(monkeypatch, mask, variables, cores):
    for name in (*STEP, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mask)))
    assert usable_cores() == cores
