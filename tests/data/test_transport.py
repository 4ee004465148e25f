"""Batches arrive from loader processes as they are, and nothing of them is left over, however a run ends."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mvd.data.transport import Inline, SharedPixels
from tests.data.stages import stage
from tests.waiting import LIMIT, wait_until

SMALL = "1m"  # of /dev/shm: less than the batches that wait in the queue, and than the 64 MB that containers have
PRIVATE = f'mount -t tmpfs -o size={SMALL} tmpfs /dev/shm && "$@"; code=$?; ls -A /dev/shm; exit $code'

PROGRAM = """
import os
import signal
import sys
import torch
import mvd.data.loader
from mvd.data.datasets import build_dataset
from mvd.data.loader import train_loader
from mvd.data.views import ViewDataset, Views, view_loader
from tests.data.stages import stage
from tests.data.test_transport import parts

def batches(kind, workers):
    made = stage(sys.argv[1], kind, micro_batch=4, epochs=1, workers=workers)
    return train_loader(made, build_dataset(made), 0)

def views(workers):
    dataset = ViewDataset(list(build_dataset(stage(sys.argv[1], "finetune")).entries)[:5], Views("segment", clips=2))
    return view_loader(dataset, 0, 1, 2, workers)

if __name__ == "__main__":
    if sys.argv[2] == "parent":
        loaded = iter(batches("pretrain", 2))
        next(loaded)
        print(*(worker.pid for worker in loaded._workers), flush=True)
        signal.pause()
    for method, workers, kinds in (("fork", 2, ("pretrain", "finetune")), ("forkserver", 1, ("finetune",))):
        mvd.data.loader.LOADER_START_METHOD = method
        for kind in kinds:
            for one, other in zip(batches(kind, 0), batches(kind, workers), strict=True):
                assert parts(one) == parts(other), (method, kind)
    assert [parts(batch) for batch in views(0)] == [parts(batch) for batch in views(2)]
    mvd.data.loader.LOADER_START_METHOD = "fork"
    loaded = iter(batches("pretrain", 2))
    next(loaded)
    os.kill(loaded._workers[0].pid, signal.SIGKILL)
    list(loaded)
"""


def parts(batch):
    """A batch with bytes in place of tensors, and without the time that it took."""
    if isinstance(batch, dict):
        return {name: parts(value) for name, value in batch.items() if name != "decode_ms"}
    if isinstance(batch, list | tuple):
        return [parts(value) for value in batch]
    return (batch.dtype, tuple(batch.shape), batch.numpy().tobytes()) if torch.is_tensor(batch) else batch


def run_privately(tmp_path, *arguments: str) -> subprocess.Popen:
    """Runs the program with a small /dev/shm of its own; at the end, the names of what is left there are printed."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("a /dev/shm of its own needs root")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", PRIVATE, "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_batches_arrive_whole_and_leave_nothing_after_the_end_an_error_and_a_killed_worker(motion_root, tmp_path):
    """Under fork and forkserver, for training and test batches, with a /dev/shm that could not hold them."""
    program = run_privately(tmp_path, str(motion_root), "worker")
    left, errors = program.communicate(timeout=LIMIT)
    assert program.returncode == 1 and "\nRuntimeError: DataLoader worker" in errors, errors
    assert left == ""


def test_a_killed_training_process_leaves_nothing(motion_root, tmp_path):
    program = run_privately(tmp_path, str(motion_root), "parent")
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(workers[0])])), signal.SIGKILL)
    left, _ = program.communicate(timeout=LIMIT)
    assert left == ""
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


class Sent(Dataset):
    """Batches of all kinds of content."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict:
        pixels = SharedPixels((2, 3, 5))
        pixels.array[:] = number
        return {"pixels": pixels, "small": Inline(torch.arange(number)), "name": str(number)}


def test_what_is_sent_arrives_as_tensors_that_can_be_written_to():
    descriptors = len(os.listdir("/proc/self/fd"))
    for number, batch in enumerate(DataLoader(Sent(), batch_size=None, num_workers=1, collate_fn=lambda item: item)):
        assert batch["pixels"].dtype == torch.uint8 and batch["small"].tolist() == list(range(number))
        np.testing.assert_array_equal(batch["pixels"], np.full((2, 3, 5), number))
        batch["pixels"].add_(1)
        assert batch["name"] == str(number)
    del batch  # which holds one
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)  # queues close their pipes in a thread


def send_and_wait(connection) -> None:
    connection.send(SharedPixels((2, 3)))
    signal.pause()


def test_pixels_of_a_process_that_is_gone_are_a_loader_that_ended():
    """Which can be started again (mvd.distributed.explain); PyTorch may not know yet that the process is dead."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=send_and_wait, args=(theirs,), daemon=True)
    worker.start()
    wait_until(ours.poll)
    worker.kill()
    worker.join()
    with pytest.raises(RuntimeError, match="DataLoader worker ended before its batch was received"):
        ours.recv()


def test_a_worker_that_cannot_send_its_batch_is_an_error(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)  # longer than the path of a socket may be
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    with pytest.raises(RuntimeError, match=f"DataLoader worker could not send its batch: .*{long}.*set TMPDIR"):
        next(iter(DataLoader(Sent(), batch_size=None, num_workers=1, collate_fn=lambda item: item)))


def test_samples_without_a_loader_are_ordinary_memory(motion_root):
    from mvd.data.datasets import SampleKey, build_dataset

    dataset = build_dataset(stage(motion_root, "pretrain"))
    keys = [SampleKey(0, 1), SampleKey(0, 2)]
    batch = dataset.collate(dataset.__getitems__(keys))
    assert torch.equal(batch["video"][1:], dataset[keys[1]]["video"])
