"""Whether the processes of a job start again in its allocation, and where. SLURM is stood in for; see tests/slurm."""

import contextlib
import io
import json
from datetime import datetime, timedelta

import pytest

from launch.job import attempts, guard, restart
from launch.job.attempts import REFUSED, main
from launch.job.record import Record, now, read_record, write_record
from launch.job.restart import choose
from launch.job.students import FOLDERS
from launch.slurm.jobs import QueuedJob
from mvd.run_directory import RunDirectory

LAUNCH_FAILED = "srun: error: Task launch for StepId=24.0 failed on node node2: Communication connection failure"


@pytest.fixture
def job(tmp_path, monkeypatch, fake_slurm):
    """A job of two nodes with two GPUs each and a spare node, which SLURM says is running."""
    variables = {"SLURM_JOB_ID": "24", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "node[1,2,3]"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "MVD_START"):
        monkeypatch.delenv(name, raising=False)
    for module, name in ((attempts, "SECONDS_AGAIN"), (guard, "SECONDS_BETWEEN")):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(restart.time, "sleep", lambda _: None)
    record = Record("24", str(tmp_path), now(), 2, ["row"], [], spare_nodes=1, warning_seconds=300)
    write_record(RunDirectory(tmp_path / "stage"), record)
    (tmp_path / FOLDERS).write_text(json.dumps([[str(tmp_path / "stage")]]))
    fake_slurm.runs("24", nodes="node[1,2,3]")
    return Job(tmp_path, fake_slurm, monkeypatch)


class Job:
    def __init__(self, submission, slurm, monkeypatch):
        self.submission, self.slurm, self.monkeypatch = submission, slurm, monkeypatch
        self.files = RunDirectory(submission / "stage")
        self.starts = 0

    def begin(self):
        """srun's options for the next start."""
        self.monkeypatch.setenv("MVD_START", str(self.starts))
        return self._main("begin").split()

    def end(self, code=137):
        """Whether the processes start again in the allocation."""
        self.starts += 1
        return self._main("end", str(code)) == "again\n"

    def blame(self, host):
        time = attempts.now()
        self.files.append_fault({"time": time, "fault": "hardware", "update": 1, "hosts": [host], "message": "broken"})

    def wait(self):
        """From now on it is a minute later."""
        later = datetime.fromisoformat(attempts.now()) + timedelta(minutes=1)
        self.monkeypatch.setattr(attempts, "now", lambda: later.isoformat(timespec="seconds"))

    def save(self, update):
        """As far as `RunDirectory.progress` looks."""
        self.monkeypatch.setattr(RunDirectory, "progress", lambda _: update)

    def log(self, *lines):
        with open(self.record.log(), "a") as handle:
            handle.write("".join(f"{line}\n" for line in lines))

    def _main(self, verb, *more):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.code = main([verb, str(self.submission), *more])
        return printed.getvalue()

    @property
    def record(self):
        return read_record(self.files)

    @property
    def requeues(self):
        return len(self.slurm.called("scontrol requeue"))


def alone(job):
    """The job as one without spare nodes."""
    record = job.record
    record.spare_nodes = 0
    write_record(job.files, record)
    return job


def test_without_spare_nodes_the_processes_start_again_on_all(job):
    assert alone(job).begin() == []
    assert job.end() and job.begin() == ["--overlap"]
    assert job.requeues == 0 and job.record.restarted == 1 and job.record.attempts[-1].start == 1


def test_spare_nodes_stay_idle_until_another_one_is_blamed_or_lost(job):
    assert job.begin() == ["--nodes=2", "--ntasks=4", "--nodelist=node1,node2"]
    assert job.end() and job.begin() == ["--overlap", "--nodes=2", "--ntasks=4", "--nodelist=node1,node2"]
    job.blame("node1")
    assert job.end(76) and job.begin()[-1] == "--nodelist=node2,node3"
    assert job.requeues == 0


@pytest.fixture
def shrinking(job):
    """The job as one of three nodes without a spare one, for a batch of 12, that may go on with fewer processes."""
    record = job.record
    record.nodes, record.spare_nodes, record.fewer = 3, 0, [1, 2, 3, 4]
    write_record(job.files, record)
    return job


def test_a_job_that_may_shrink_goes_on_with_as_many_processes_as_divide_its_batch(shrinking):
    job = shrinking
    assert job.begin()[-3:] == ["--nodes=3", "--ntasks=6", "--nodelist=node1,node2,node3"]
    job.blame("node1")
    assert job.end(76)
    assert job.begin() == ["--overlap", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=node2,node3"]
    assert job.record.attempts[-1].shrunk_to == 4
    job.save(3)
    job.slurm.runs("24", nodes="node[1,3]")  # node2 is lost, and node1 is still to blame
    assert job.end(76) and job.begin()[-4:] == ["--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--nodelist=node3"]
    job.save(6)
    assert not job.end(0) and job.requeues == 1  # as near the time limit
    assert job.slurm.called("scontrol update")[0][-1] == "NumNodes=3"


def test_an_error_with_fewer_processes_is_not_the_end_of_the_stage(shrinking, capsys):
    job = shrinking
    job.begin()
    job.blame("node1")
    job.end(76)
    job.begin()
    error = {"rank": 0, "host": "node2", "lines": "error: out of GPU memory", "final": True, "signal": None}
    job.files.error.write_text(json.dumps(error))
    assert not job.end(2) and job.requeues == 1 and job.record.error is None
    assert "requeued, since it has saved nothing new with 4 processes" in capsys.readouterr().err


def test_a_lost_node_is_left_out(job):
    job.begin()
    job.slurm.runs("24", nodes="node[1,3]")  # SLURM has removed node2
    assert job.end(76) and job.begin()[-1] == "--nodelist=node1,node3"


def test_a_lost_node_that_slurm_has_not_noticed_is_found_when_a_process_cannot_start_there(job):
    job.begin()
    job.log("=== job 24, rank 0", LAUNCH_FAILED)
    assert job.end(233) and job.begin()[-1] == "--nodelist=node1,node3"
    (fault,) = job.files.read_faults()
    assert fault["hosts"] == ["node2"] and fault["fault"] == "launch"


@pytest.mark.parametrize("spares", [0, 1])
def test_a_blamed_node_without_a_spare_one_is_a_requeue(job, spares, capsys):
    if spares:
        job.slurm.runs("24", nodes="node[1,2]")
    else:
        alone(job)
    job.begin()
    job.blame("node2")
    assert not job.end(76) and job.requeues == 1
    assert job.record.avoided == ["node2"] and "the job is requeued, since node2 is to blame" in capsys.readouterr().err
    resized = [call[-1] for call in job.slurm.called("scontrol update") if "NumNodes" in call[-1]]
    assert resized == (["NumNodes=3"] if spares else [])  # SLURM has lowered the number


def test_too_few_nodes_are_a_requeue_also_if_slurm_itself_has_requeued_the_job(job, capsys):
    job.begin()
    job.slurm.runs("24", nodes="node3")
    assert not job.end(76) and job.requeues == 1
    assert "only 1 of 2 nodes are left" in capsys.readouterr().err
    job.monkeypatch.setenv("SLURM_JOB_NODELIST", "node3")
    job.starts = 0
    assert job.begin() == [] and job.code == REFUSED and job.requeues == 2
    assert [call[-1] for call in job.slurm.called("scontrol update") if "NumNodes" in call[-1]] == ["NumNodes=3"] * 2


def test_a_blamed_node_is_left_out_for_as_long_as_the_job_holds_its_allocation(job):
    job.begin()
    job.blame("node1")
    assert job.end(76)
    job.wait()
    job.begin()
    job.blame("node2")
    assert not job.end(76) and job.requeues == 1  # node1 does not come back in its place


def test_nodes_that_were_blamed_in_an_earlier_allocation_do_not_end_this_one(job):
    job.begin()
    job.blame("node1")
    job.blame("node2")
    assert not job.end(76)
    job.wait()
    job.starts = 0
    job.begin()  # SLURM has given the same nodes again
    assert job.end(137) and job.requeues == 1


@pytest.mark.parametrize(
    ("left", "again"), [("15:00", True), ("9:59", False), ("UNLIMITED", True), ("1-00:00:00", True)]
)
def test_near_the_time_limit_the_job_is_requeued(job, left, again):
    job.begin()
    job.slurm.runs("24", nodes="node[1,2,3]", left=left)
    assert job.end() == again and job.requeues == (not again)


def test_a_preempted_job_and_one_that_was_told_to_stop_are_requeued(job):
    job.begin()
    job.slurm.says("scontrol show job", "JobId=24 PreemptTime=2026-11-25T03:00:00\n")
    assert not job.end(137) and job.requeues == 1
    job.starts = 0
    job.begin()
    assert not job.end(0) and job.requeues == 2


def test_processes_that_have_outlived_their_srun_are_killed_first(job):
    job.begin()
    job.slurm.steps = ["24.0"]
    assert job.end(137) and job.slurm.called("scancel") == [("scancel", "--signal=KILL", "24.0")]


def test_a_cancelled_job_is_not_started_again(job):
    job.begin()
    job.slurm.runs("24", "COMPLETING")
    assert not job.end(143) and job.requeues == 0


def test_nodes_blamed_longest_ago_are_used_if_there_are_too_few_others():
    assert choose(["n1", "n2", "n3", "n4"], 2, blamed=["n2", "n1"]) == ["n3", "n4"]
    assert choose(["n1", "n2", "n3"], 2, blamed=["n2", "n1"]) == ["n1", "n3"]  # n2 was blamed last


def test_the_guard_requeues_a_job_that_has_lost_its_first_node(job):
    states = [("RUNNING", "node[1,2,3]"), ("RUNNING", "node[2,3]")]

    def next_state(_):
        state, nodes = states.pop(0)
        job.slurm.runs("24", state, nodes=nodes)

    job.monkeypatch.setattr(guard.time, "sleep", next_state)
    assert guard.main([str(job.submission), "node1"]) == 0
    assert job.requeues == 1 and job.slurm.called("scontrol update")[0][-1] == "NumNodes=3"
    states += [("COMPLETING", "node[2,3]"), ("PENDING", "")]  # its processes on node1 have left first
    assert guard.main([str(job.submission), "node1"]) == 0 and job.requeues == 1


@pytest.mark.parametrize(
    ("left", "seconds"), [("1-02:03:04", 93784), ("2:00", 120), ("1:00:00", 3600), ("INVALID", None)]
)
def test_the_time_that_squeue_says_is_left(left, seconds):
    found = QueuedJob("RUNNING", "None", "0:10", left).seconds_left
    assert found == (float("inf") if seconds is None else seconds)
