"""The device of a process: which GPU, and what happens if there is none although the job asked for one."""

import json
import os
import socket

import pytest
import torch

from mvd.config import ConfigError
from mvd.distributed.device import choose_device, gpu_index
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import HostFault
from tests.runs import run_cli, small_stage


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 7, 0), (2, 1, 1)],
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(visible, local_rank, index):
    assert gpu_index(visible, local_rank) == index


def test_a_host_with_fewer_gpus_than_processes_is_at_fault():
    with pytest.raises(HostFault, match="only 3 GPUs are visible, too few for local rank 3"):
        gpu_index(3, 3)


def test_deepspeed_is_told_which_gpu_it_is(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert choose_device() == torch.device("cuda", 0) and taken == [torch.device("cuda", 0)]
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_pytorch_without_cuda_is_no_hosts_fault(monkeypatch):
    monkeypatch.setenv("MVD_EXPECT_GPU", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="is built without CUDA; install a CUDA build"):
        choose_device()


def test_a_job_without_gpus_runs_on_the_cpu(monkeypatch):
    monkeypatch.delenv("MVD_EXPECT_GPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")


def test_a_job_that_asked_for_gpus_never_trains_on_the_cpu(tmp_path):
    stage = small_stage("video_teacher", "blind", tmp_path, tmp_path, world_size=1, accumulation=4)
    finished = run_cli(stage, 1, MVD_EXPECT_GPU="1", CUDA_VISIBLE_DEVICES="")
    assert finished.code == RETRYABLE
    said = f"{socket.gethostname()}: this job asked for GPUs, but no GPU is usable (CUDA_VISIBLE_DEVICES is '')"
    assert f"error: {said}" in finished.output[0].splitlines() and "Traceback" not in finished.output[0]
    fault = json.loads((stage.directory / "faults.jsonl").read_text())
    assert (fault["fault"], fault["hosts"], fault["message"]) == ("hardware", [socket.gethostname()], said)
    assert not (stage.directory / "metrics.jsonl").exists()
