"""The start of several processes: who is missing, and which host is blamed for it."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from mvd import run as run_module
from mvd.config import Faults
from mvd.distributed import rendezvous as module
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.faults import HostFault, PeerLost
from mvd.distributed.rendezvous import diagnose, rendezvous
from mvd.distributed.signals import Interrupted
from mvd.run_directory import RunDirectory
from tests.runs import small_stage, write_stage

HOSTS = ["node1", "node2", "node3"]


def test_a_host_none_of_whose_ranks_arrived_is_blamed():
    arrived = {0: "node1", 1: "node1", 4: "node3", 5: "node3"}
    message, hosts = diagnose(arrived, 6, HOSTS)
    assert hosts == ["node2"]
    assert message == "ranks 2, 3 on node2 did not arrive (ranks that arrived: node1 (2), node3 (2))"


def test_a_host_some_of_whose_ranks_arrived_is_blamed_whatever_the_order_of_ranks():
    arrived = {0: "node1", 1: "node2", 2: "node3", 3: "node1", 5: "node3"}  # --distribution=cyclic
    message, hosts = diagnose(arrived, 6, HOSTS)
    assert hosts == ["node2"] and message.startswith("rank 4 on node2 did not arrive")


def test_without_a_list_of_hosts_the_ranks_are_named_and_nobody_is_blamed():
    message, hosts = diagnose({0: "node1"}, 2, [])
    assert hosts == [] and message == "rank 1 did not arrive (ranks that arrived: node1 (1))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_when_all_are_ready(folder: Path) -> None:
    """`python -m mvd.run`, once as many processes as the file `ready` says have imported torch."""
    (folder / f"ready-{os.environ['RANK']}").touch()
    while len(list(folder.glob("ready-*"))) < int((folder / "ready").read_text()):
        time.sleep(0.05)
    sys.argv = ["mvd.run", str(folder / "late" / "stage.yaml")]
    sys.exit(run_module.main())


def start_some(folder: Path, ranks: list[int], **environment: str) -> tuple[list[str], list[dict]]:
    """Starts only these ranks of three, each on a host of its own; returns what they printed, and the faults."""
    stage = small_stage("video_teacher", "late", folder, folder, faults=Faults(rendezvous_minutes=0.1))
    write_stage(stage)
    (folder / "ready").write_text(str(len(ranks)))
    shared = {"WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.runs", __name__, run_when_all_are_ready.__name__, str(folder)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**os.environ, **shared, "RANK": str(rank), "SLURMD_NODENAME": HOSTS[rank], **environment},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for rank in ranks
        ]
        printed = [process.communicate(timeout=300)[0] for process in processes]
        codes = [process.returncode for process in processes]
    assert codes == [RETRYABLE] * len(ranks), printed
    return printed, stage.files.read_faults()


def test_a_process_that_never_comes_ends_the_others_and_its_host_is_blamed(tmp_path):
    printed, faults = start_some(tmp_path, [0, 1], MVD_HOSTS=",".join(HOSTS))
    assert [(fault["fault"], fault["hosts"]) for fault in faults] == [("rendezvous", ["node3"])]
    said = "rank 2 on node3 did not arrive (ranks that arrived: node1 (1), node2 (1)) within 0.1 min"
    assert faults[0]["message"] == said
    assert any(f"error: {said}" in output for output in printed)
    assert all(output.count("error: ") == 1 and "Traceback (most" not in output for output in printed)


def test_without_slurm_a_process_that_never_comes_is_named_by_its_rank(tmp_path):
    _, (fault,) = start_some(tmp_path, [0, 1], MVD_HOSTS="")
    assert fault["hosts"] == [] and fault["message"].startswith("rank 2 did not arrive (ranks that arrived: node1 (1)")


def test_a_first_process_that_never_comes_is_blamed_too(tmp_path):
    printed, (fault,) = start_some(tmp_path, [1], MVD_HOSTS=",".join(HOSTS))
    assert fault["hosts"] == ["node1"] and "rank 0 on node1 did not open port" in fault["message"]
    assert "error: rank 0 on node1" in printed[0]


@pytest.fixture
def address(monkeypatch) -> int:
    """A free port of this host, at which the processes are to meet."""
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MVD_HOSTS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def test_a_port_that_is_taken_is_said_and_blames_nobody(tmp_path, address):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", address))
        taken.listen()
        with pytest.raises(PeerLost, match=f"127.0.0.1:{address}: the port is taken; set another MASTER_PORT"):
            rendezvous(0, 2, 0.1, RunDirectory(tmp_path))
    assert not (tmp_path / "faults.jsonl").exists()


def test_another_start_at_the_same_address_is_not_joined(tmp_path, address, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "24")
    store = module._connect(True, 2)
    monkeypatch.setattr(module, "_connect", lambda *_: store)
    store.set("host of 1", "node9")
    module.PrefixStore("23///", store).set("host of 1", "node9")
    with pytest.raises(HostFault, match="rank 1 did not arrive"):
        rendezvous(0, 2, 0.01, RunDirectory(tmp_path))


def test_a_signal_ends_the_wait(tmp_path, address, monkeypatch):
    monkeypatch.setattr(module, "stop_requested", lambda: True)
    with pytest.raises(Interrupted, match="stopped by a signal while waiting for the other processes"):
        rendezvous(1, 2, 1.0, RunDirectory(tmp_path))
    assert not (tmp_path / "faults.jsonl").exists()


def test_the_only_process_waits_for_nobody(tmp_path, address):
    assert rendezvous(0, 1, 0.01, None).get("host of 0")
