"""The order of samples does not depend on processes, micro-batches, workers or interruptions."""

import os
import resource
import signal
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mvd.config import ConfigError, Mixing
from mvd.data.datasets import build_dataset
from mvd.data.loader import (
    LoaderStats,
    UpdateSampler,
    epoch_order,
    start_worker,
    steps_per_epoch,
    train_loader,
    worker_count,
)
from mvd.data.on_device import prepare
from tests.data.stages import stage
from tests.waiting import LIMIT

SPLITS = [(1, 16, 0), (1, 4, 2), (2, 2, 1), (4, 4, 0), (4, 2, 0)]  # ranks, micro-batch, workers


def updates(root, kind: str, split: tuple[int, int, int], start: int = 0, **fields) -> list[Counter]:
    """For each update, the multiset of the prepared samples of all ranks, and of their layers' seeds, as bytes."""
    world_size, micro_batch, workers = split
    made = stage(root, kind, world_size=world_size, micro_batch=micro_batch, workers=workers, **fields)
    dataset = build_dataset(made)
    loaders = [iter(train_loader(made, dataset, rank, start)) for rank in range(world_size)]
    count = steps_per_epoch(len(dataset), 16) * made.recipe.optimization.epochs - start
    results = []
    for _ in range(count):
        samples: Counter = Counter()
        for loader in loaders:
            for _ in range(made.execution.accumulation):
                raw = next(loader)
                samples.update(as_bytes({**prepare(raw, made.recipe, "cpu"), "layers": raw["layer_seeds"]}))
        results.append(samples)
    assert all(next(loader, None) is None for loader in loaders)
    return results


def as_bytes(prepared: dict[str, torch.Tensor]) -> list[tuple[bytes, ...]]:
    return [tuple(t.numpy().tobytes() for t in sample) for sample in zip(*prepared.values(), strict=True)]


@pytest.fixture(scope="module")
def reference(motion_root) -> dict[str, list[Counter]]:
    return {kind: updates(motion_root, kind, SPLITS[0]) for kind in ("pretrain", "finetune")}


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("split", SPLITS[1:], ids=lambda s: f"{s[0]}ranks-micro{s[1]}-{s[2]}workers")
def test_an_update_is_the_same_on_any_split(motion_root, reference, kind, split):
    assert updates(motion_root, kind, split) == reference[kind]


@pytest.mark.parametrize("start", [2, 3])
def test_a_later_start_continues_the_same_run(motion_root, reference, start):
    """48 videos in updates of 16: starts inside an epoch and at its border."""
    assert updates(motion_root, "finetune", (2, 8, 0), start) == reference["finetune"][start:]


def test_updates_and_epochs_differ(reference):
    samples = [sample for update in reference["finetune"] for sample in update]
    assert len(set(samples)) == len(samples) == 2 * 48 * 2


def test_another_mixing_group_is_another_recipe(motion_root, reference):
    assert updates(motion_root, "finetune", (1, 16, 0), mixing=Mixing(group=16)) != reference["finetune"]


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_an_epoch_takes_each_sample_once_and_leaves_out_the_rest(motion_root, kind):
    made = stage(motion_root, kind, world_size=2, micro_batch=4)
    keys = [[*UpdateSampler(made, 37, rank)] for rank in range(2)]
    assert len(keys[0]) == len(UpdateSampler(made, 37, 0)) == 2 * 2 * 2
    assert len([*UpdateSampler(made, 37, 0, start_update=1)]) == len(UpdateSampler(made, 37, 0, start_update=1)) == 6
    for epoch in range(2):
        seen = [key.index for rank in keys for batch in rank for key in batch if key.epoch == epoch]
        assert sorted(seen) == sorted(epoch_order(0, epoch, 37)[:32])
    assert epoch_order(0, 0, 37) != epoch_order(0, 1, 37) != epoch_order(1, 1, 37)


def test_a_micro_batch_mirrors_the_pairs_of_its_groups(motion_root):
    made = stage(motion_root, "finetune", micro_batch=4)
    order = epoch_order(0, 0, 48)
    batches = [[order.index(key.index) for key in batch] for batch in UpdateSampler(made, 48, 0)][:4]
    assert batches == [[0, 1, 6, 7], [2, 3, 4, 5], [8, 9, 14, 15], [10, 11, 12, 13]]


def test_what_cannot_be_shared_out_is_refused(motion_root):
    with pytest.raises(ConfigError, match="holds 15 samples, fewer than one global batch of 16"):
        UpdateSampler(stage(motion_root, "pretrain"), 15, 0)
    with pytest.raises(ConfigError, match="must equal the recipe's global_batch, got 3 x 5 x 1 = 15 and 16"):
        UpdateSampler(stage(motion_root, "pretrain", micro_batch=3), 48, 0)
    with pytest.raises(ConfigError, match="micro_batch must be even, because videos are mixed in pairs, got 1"):
        UpdateSampler(stage(motion_root, "finetune", micro_batch=1), 48, 0)


class WorkerFacts(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[bool]:
        ignored = [
            signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        ]
        return [*ignored, torch.get_num_threads() == 1, cv2.getNumThreads() <= 1]


def test_workers_are_single_threaded_and_ignore_the_trainers_signals():
    facts = next(iter(DataLoader(WorkerFacts(), num_workers=1, worker_init_fn=start_worker)))
    assert all(bool(fact) for fact in facts)


END_IN_THE_MIDDLE = """
from torch.utils.data import DataLoader
from mvd.data.loader import start_worker
batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=start_worker))
next(batches)
raise RuntimeError("in the middle of an epoch")
"""


def test_an_error_ends_the_process_whatever_its_workers_do():
    run = subprocess.run([sys.executable, "-c", END_IN_THE_MIDDLE], capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 1 and "in the middle of an epoch" in run.stderr


FORKSERVER = """
import multiprocessing
import os
import sys
from mvd.data.datasets import build_dataset
from mvd.data.loader import train_loader
from tests.data.stages import stage
from tests.data.test_loader import WorkersParent, as_bytes

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    made = stage(sys.argv[1], "pretrain", micro_batch=4, epochs=1, workers=2)
    dataset = build_dataset(made)
    several = [as_bytes({n: t for n, t in b.items() if n in ("video", "mask")}) for b in train_loader(made, dataset, 0)]
    made = stage(sys.argv[1], "pretrain", micro_batch=4, epochs=1, workers=0)
    one = [as_bytes({n: t for n, t in b.items() if n in ("video", "mask")}) for b in train_loader(made, dataset, 0)]
    assert several == one and len(one) == 12
    made = stage(sys.argv[1], "pretrain", micro_batch=4, epochs=1, workers=1)
    (batch, *_) = train_loader(made, WorkersParent(), 0)
    assert batch["parent"] == os.getpid(), "a worker is not the training process's own child"
    print("the same")
"""


class WorkersParent(Dataset):
    """Samples that say which process started the worker that read them."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, key) -> int:
        return os.getppid()

    def collate(self, parents: list[int]) -> dict[str, int]:
        return {"parent": parents[0]}


def test_loaders_fork_their_workers_whatever_pythons_default_is(motion_root, tmp_path):
    """From Python 3.14 on the default is a fork server, which the signals of a job would kill."""
    (tmp_path / "program.py").write_text(FORKSERVER)
    command = [sys.executable, str(tmp_path / "program.py"), str(motion_root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0 and run.stdout == "the same\n", run.stderr


class PageFaults(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        def filled() -> int:
            return int(np.ones(2**22, np.uint8)[0])  # 4 MB, as a clip has: 1,024 pages

        filled()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            filled()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_workers_keep_the_memory_that_they_free():
    faults = next(iter(DataLoader(PageFaults(), num_workers=1, worker_init_fn=start_worker)))
    assert int(faults) < 1024


def test_there_are_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert (worker_count(8), worker_count(32), worker_count(0)) == (8, 16, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert worker_count(8) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert worker_count(8) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_health(motion_root, workers):
    made = stage(motion_root, "pretrain", micro_batch=4, workers=workers)
    batches = iter(train_loader(made, build_dataset(made), 0))
    health = LoaderStats()
    for _ in range(3):
        batch = next(batches)
        health.note(batch, batches)
    assert health.decode_ms[-4:] == batch["decode_ms"].tolist() and len(health.decode_ms) == 12
    report = health.report()
    assert report["decode_ms"] > 0 and 0 <= report["loader_queue"] <= 2
    health.note(batch, batches)
    assert health.report()["decode_ms"] == pytest.approx(batch["decode_ms"].mean().item())
