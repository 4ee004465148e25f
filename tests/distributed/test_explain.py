"""What the errors of a run mean: exit code, message, and whether a host is blamed."""

import json
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from experiments.recipes import VITH_E800
from mvd import run as run_module
from mvd.config import ConfigError
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.explain import explain_errors
from mvd.distributed.faults import HostFault, PeerLost, RunFailed
from mvd.distributed.process import start_processes
from mvd.memory import memory_of
from mvd.stage import Execution, Stage
from tests.runs import call, small_stage, write_stage

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.0 GiB is free. "
)
OWN = "Including non-PyTorch memory, this process has 77.20 GiB memory in use. "
OTHER = "Process 4711 has 60.00 GiB memory in use. "


def stage_of(kind: str, folder: Path, **fields):
    stage = small_stage(kind, "broken", folder, folder, **fields)
    write_stage(stage)
    return stage


def faults(stage) -> list[dict]:
    return stage.files.read_faults() if stage.files.faults.exists() else []


def test_a_hardware_error_blames_this_host(tmp_path):
    stage = stage_of("pretrain", tmp_path)
    with pytest.raises(HostFault, match="uncorrectable ECC error .* start the stage again on another host"):
        with explain_errors(stage):
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nmore")
    (fault,) = faults(stage)
    assert (fault["fault"], fault["hosts"]) == ("hardware", [socket.gethostname()])


def test_a_hardware_error_is_recorded_for_every_student_of_a_job(tmp_path):
    stages = [small_stage("pretrain", name, tmp_path, tmp_path) for name in ("one", "other")]
    for stage in stages:
        write_stage(stage)
    with pytest.raises(HostFault), explain_errors(*stages):
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    assert [faults(stage)[0]["hosts"] for stage in stages] == [[socket.gethostname()]] * 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("a bug"),
        RunFailed("training diverged"),
        ConfigError("Xid is no data set"),
    ],
)
def test_a_bug_and_what_was_said_already_pass_unchanged_and_blame_nobody(tmp_path, error):
    stage = stage_of("pretrain", tmp_path)
    with pytest.raises(type(error)) as raised, explain_errors(stage):
        raise error
    assert raised.value is error and faults(stage) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dist.DistNetworkError("Connection reset by peer"), "lost another rank"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "lost another rank"),
        (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "), "lost a data loader process"),
    ],
)
def test_a_lost_process_blames_nobody(tmp_path, error, said):
    stage = stage_of("pretrain", tmp_path)
    with pytest.raises(PeerLost, match=said), explain_errors(stage):
        raise error
    assert faults(stage) == []


@pytest.mark.parametrize(
    ("kind", "micro_batch", "error", "said"),
    [
        (
            "pretrain",
            24,
            torch.OutOfMemoryError(FULL + OWN),
            "set cluster.pretrain.micro_batch=12, half of the present 24",
        ),
        ("finetune", 5, RuntimeError("CUDA error: out of memory"), "set cluster.finetune.micro_batch=2, half of"),
        (
            "finetune",
            2,
            torch.OutOfMemoryError(FULL),
            "smallest micro_batch, 2; set cluster.gpu_memory_gb=1.8, with which activations are recomputed",
        ),
        ("image_teacher", 1, torch.OutOfMemoryError(FULL), "smallest micro_batch, 1; use GPUs with more memory, or"),
        ("pretrain", 8, torch.OutOfMemoryError(FULL + OTHER), "micro_batch=4"),  # its own, by a container's process id
        ("pretrain", 8, RuntimeError("NCCL error: Last error:\nCuda failure 2 'out of memory'"), "micro_batch=4"),
    ],
)
def test_too_little_gpu_memory_is_final_and_says_which_micro_batch_to_set(tmp_path, kind, micro_batch, error, said):
    stage = stage_of(kind, tmp_path, micro_batch=micro_batch)
    with pytest.raises(ConfigError) as raised, explain_errors(stage):
        raise error
    assert said in str(raised.value) and faults(stage) == []


def test_on_a_gpu_the_counted_memory_decides_which_micro_batch_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24e9))
    execution = Execution(micro_batch=64, world_size=8)
    stage = Stage(kind="pretrain", id="broken", recipe=VITH_E800, execution=execution)
    counted = memory_of(VITH_E800, 8, "zero1", "bf16")
    with pytest.raises(ConfigError) as raised, explain_errors(stage):
        raise torch.OutOfMemoryError(FULL)
    (advised,) = re.findall(r"set cluster.pretrain.micro_batch=(\d+), less than the present 64", str(raised.value))
    assert counted.total(int(advised)) <= 0.92 * 24e9 < counted.total(int(advised) + 1)


@pytest.mark.parametrize("text", [FULL + OTHER + OWN, FULL + OWN + OTHER])
def test_gpu_memory_that_another_process_holds_is_the_hosts_fault(tmp_path, text):
    stage = stage_of("pretrain", tmp_path)
    with pytest.raises(HostFault, match="process 4711, not of this run, holds 60.00 GiB of the GPU's memory"):
        with explain_errors(stage):
            raise torch.OutOfMemoryError(text)
    assert faults(stage)[0]["hosts"] == [socket.gethostname()]


def run_with_a_broken_gpu(folder: Path) -> None:
    """Rank 1 meets a hardware error instead of training; rank 0 waits for it."""
    process = start_processes()

    def train(*_):
        if process.rank == 1:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
        dist.barrier()

    run_module.train = train
    sys.argv = ["mvd.run", str(folder / "broken" / "stage.yaml")]
    sys.exit(run_module.main())


def test_a_hardware_error_of_one_rank_ends_the_run_so_that_it_can_be_retried_elsewhere(tmp_path):
    stage = stage_of("video_teacher", tmp_path)
    finished = call(run_with_a_broken_gpu, tmp_path)
    assert finished.code == RETRYABLE
    assert "error: rank 1 on " in finished.output[1] and "Traceback" not in finished.output[1]
    (line,) = (stage.directory / "faults.jsonl").read_text().splitlines()
    assert json.loads(line)["message"].startswith("rank 1 on ")
