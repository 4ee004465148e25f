"""Runs that hang: which rank is blamed, what is logged, and that all ranks exit."""

import json
import os
import pickle
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from mvd.config.run_settings import Faults
from mvd.distributed import watchdog
from mvd.distributed.exit_codes import RETRYABLE
from mvd.distributed.process import start_processes
from mvd.distributed.watchdog import STEPS, Seen, Watchdog, background_heartbeat, diagnose, heartbeat
from mvd.run import run_stage
from mvd.run_directory import RunDirectory
from mvd.stage import Stage
from mvd.train import checkpoint_writer
from mvd.train.loop import TrainingRun
from tests.runs import Finished, call, small_stage, write_stage

READING, WORKING, WAITING = STEPS[1:4]
UPDATING, SAVING, WRITING, WAITING_FOR_FILES = STEPS[4:8]


def seen(rank: int, step: str, update: int = 7, seconds: float = 900.0, silent: float = 1.0) -> Seen:
    return Seen(rank, f"node{rank}", step, update, seconds, silent)


def test_the_rank_that_the_others_wait_for_is_blamed():
    message, hosts = diagnose([seen(0, WAITING), seen(1, READING, seconds=880), seen(2, WAITING)], [])
    assert message == f"rank 1 on node1 has been {READING} for 880 s at update 7" and hosts == ["node1"]


def test_the_rank_that_is_an_update_behind_is_blamed():
    assert diagnose([seen(0, READING, 8), seen(1, WAITING, 7)], [])[1] == ["node1"]


def test_the_rank_that_is_a_students_turn_behind_is_blamed():
    """In a group, the student that trains next may be at an earlier update."""
    ahead, behind = seen(0, WAITING, 3)._replace(turn=8), seen(1, WAITING, 7)._replace(turn=7)
    assert diagnose([ahead, behind], [])[1] == ["node1"]


def test_a_rank_that_makes_progress_is_not_blamed():
    assert diagnose([seen(0, "testing", 3, seconds=2), seen(1, "testing", 90)], [])[1] == ["node1"]


def test_a_rank_without_a_heartbeat_is_blamed_before_all_others():
    everyone = [seen(0, WAITING), seen(1, READING), seen(2, WAITING, silent=400)]
    message, hosts = diagnose(everyone, everyone[2:])
    assert "rank 2 on node2 has sent no heartbeat for 400 s" in message and hosts == ["node2"]


def test_nobody_is_blamed_if_all_ranks_hang_in_the_same_step():
    message, hosts = diagnose([seen(0, WAITING), seen(1, WAITING)], [])
    assert message == f"all processes have been {WAITING} for 900 s at update 7" and hosts == []


@pytest.mark.parametrize("behind", [UPDATING, SAVING, WRITING])
def test_the_rank_that_a_save_waits_for_is_blamed(behind):
    everyone = [seen(0, WAITING_FOR_FILES), seen(1, behind), seen(2, WAITING_FOR_FILES)]
    message, hosts = diagnose(everyone, [])
    assert message == f"rank 1 on node1 has been {behind} for 900 s at update 7" and hosts == ["node1"]


def test_a_step_may_have_less_time_than_the_others():
    guard = object.__new__(Watchdog)
    guard.usual_limit, guard.update = 600.0, 7
    guard.heartbeat("checking the hosts", 0, minutes=1.0)
    assert (guard.limit, guard.update) == (60.0, 0)
    guard.heartbeat(READING, None, minutes=20.0)
    assert (guard.limit, guard.update) == (600.0, 0)
    guard.heartbeat(WORKING, 1)
    assert (guard.limit, guard.update) == (600.0, 1)


def hang(folder: Path) -> None:
    """Rank 1 hangs in update 3, in a wait that never ends or because it is stopped, or else in the save before it.

    A save hangs in its thread, while the training goes on until the next save is due.
    """
    process = start_processes()
    train_once, write = TrainingRun._one_update, checkpoint_writer.write_atomically

    def hang_in_a_save(path: Path, *arguments) -> None:
        if process.rank == 1:
            wait_for_ever()
        write(path, *arguments)

    def limit() -> None:
        guard = watchdog._current
        guard.usual_limit = guard.limit = 9.0  # a loaded machine may keep a process silent for seconds

    def hang_at_3(run: TrainingRun, *arguments) -> None:
        saves = (folder / "saves").exists()
        if run.update + 1 == 2 and saves:
            limit()
            checkpoint_writer.write_atomically = hang_in_a_save
        if run.update + 1 == 3 and not saves:
            limit()
            if process.rank == 1:
                wait_for_ever() if (folder / "waits").exists() else os.kill(os.getpid(), signal.SIGSTOP)
        train_once(run, *arguments)

    TrainingRun._one_update = hang_at_3
    watchdog.POLL_SECONDS = 0.2
    run_stage(Stage.from_yaml(folder / "hangs" / "stage.yaml"))


def wait_for_ever() -> None:
    threading.Event().wait()


def run_hanging(folder: Path, data: Path) -> tuple[Finished, dict]:
    write_stage(small_stage("video_teacher", "hangs", folder, data, checkpoint_every=2, faults=Faults(audit_every=0)))
    finished = call(hang, folder)
    (line,) = (folder / "hangs" / "faults.jsonl").read_text().splitlines()
    return finished, json.loads(line)


def test_a_hang_logs_every_stack_blames_the_host_and_ends_the_run(tmp_path, motion_root):
    (tmp_path / "waits").touch()
    finished, fault = run_hanging(tmp_path, motion_root)
    assert finished.code == RETRYABLE
    assert all("--- stacks of rank " in output and "thread MainThread:" in output for output in finished.output)
    assert "wait_for_ever" in finished.output[1] and "_agree" in finished.output[0]
    assert fault["fault"] == "hang" and fault["hosts"] == [socket.gethostname()]
    assert "rank 1 on" in fault["message"] and "rank 0" not in fault["message"]
    for rank in range(2):
        recorded = pickle.loads((tmp_path / "hangs" / "flight_recorder" / f"rank_{rank}").read_bytes())
        assert any(
            "allreduce" in entry["profiling_name"] or "all_reduce" in entry["profiling_name"]
            for entry in recorded["entries"]
        )


def test_a_hang_in_a_save_blames_the_rank_that_is_missing(tmp_path, motion_root):
    (tmp_path / "saves").touch()
    finished, fault = run_hanging(tmp_path, motion_root)
    assert finished.code == RETRYABLE
    assert fault["message"].startswith("rank 1 on ") and f" has been {WRITING} for " in fault["message"]
    assert "rank 0" not in fault["message"] and "at update 2" in fault["message"]
    assert "thread checkpoint writer:" in finished.output[1] and "hang_in_a_save" in finished.output[1]


def hang_in_one_of_two_saves(folder: Path) -> None:
    """On rank 1, the thread of one student's checkpoint hangs, while that of another one ends."""
    process = start_processes()
    watchdog.POLL_SECONDS = 0.2
    with Watchdog(RunDirectory(folder / "hangs"), process, minutes=6 / 60):
        if process.rank == 1:
            hangs = threading.Thread(target=lambda: (background_heartbeat(WRITING, 7), wait_for_ever()), daemon=True)
            ends = threading.Thread(target=lambda: (background_heartbeat(WRITING, 7), background_heartbeat(None)))
            for thread in (hangs, ends):
                thread.start()
            ends.join()
        heartbeat(WAITING_FOR_FILES, 7)
        while True:
            if process.rank == 1:
                heartbeat(WRITING)  # the training waits for the thread
            time.sleep(0.1)


def test_a_hang_in_one_of_two_saves_blames_the_rank_that_is_missing(tmp_path):
    (tmp_path / "hangs").mkdir()
    assert call(hang_in_one_of_two_saves, tmp_path).code == RETRYABLE
    (line,) = (tmp_path / "hangs" / "faults.jsonl").read_text().splitlines()
    assert re.match(rf"rank 1 on \S+ has been {WRITING} for ", json.loads(line)["message"])


def test_a_rank_whose_heartbeat_stops_ends_the_run(tmp_path, motion_root):
    finished, fault = run_hanging(tmp_path, motion_root)
    assert finished.code == RETRYABLE
    assert "rank 1 on" in fault["message"] and "has sent no heartbeat for" in fault["message"]
