"""Who may write to a run directory: one attempt at a time. tests/slurm tries it with real jobs."""

import dataclasses
import os
import threading

import pytest

from launch.job.ownership import is_gone
from launch.job.record import Record, jobs_in_history, now
from launch.slurm.client import slurm
from mvd import owner as owner_module
from mvd.config import ConfigError
from mvd.host import hostname
from mvd.owner import VARIABLE, OwnedByAnother, Owner, give_back, lost_to, read_owner, take
from mvd.run_directory import RunDirectory


@pytest.fixture
def files(tmp_path):
    return RunDirectory(tmp_path / "stage")


def owner(job="24", attempt=0, host="node1", **more):
    return Owner(job, attempt, host, "2026-01-01", **more)


def gone(_):
    return True


def there(_):
    return False


def test_a_second_owner_is_told_who_the_first_is_and_writes_nothing(files):
    take(files, owner(), there)
    before = sorted(files.path.iterdir())
    said = "stage belongs to job 24, attempt 1, on node1 since 2026-01-01; cancel that first"
    with pytest.raises(OwnedByAnother, match=said):
        take(files, owner("25", host="node2"), there)
    assert read_owner(files) == owner() and sorted(files.path.iterdir()) == before


def test_a_record_that_was_given_back_can_be_taken(files):
    take(files, owner(), there)
    give_back(files, owner("25"))  # not its own
    assert read_owner(files) == owner()
    give_back(files, owner())
    take(files, owner("25"), there)
    assert read_owner(files) == owner("25") and [path.name for path in files.path.iterdir()] == ["owner.json"]


def test_a_stale_owner_is_taken_over(files):
    take(files, owner(), there)
    take(files, owner("25"), gone)
    assert read_owner(files) == owner("25") and [path.name for path in files.path.iterdir()] == ["owner.json"]


def test_a_later_attempt_replaces_the_earlier_one_of_its_job_but_not_the_other_way_round(files):
    take(files, owner(attempt=0), there)
    take(files, owner(attempt=1), there)
    assert read_owner(files) == owner(attempt=1)
    with pytest.raises(OwnedByAnother):
        take(files, owner(attempt=0), there)


def test_of_many_that_take_over_at_once_one_gets_it(files):
    take(files, owner("stale"), there)
    barrier, got, refused = threading.Barrier(8), [], []

    def try_it(number):
        mine = owner(f"{number}")
        barrier.wait()
        try:
            take(files, mine, lambda other: other.job == "stale")
            got.append(mine)
        except OwnedByAnother:
            refused.append(mine)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7 and read_owner(files) == got[0]


def test_a_record_taken_between_judging_and_replacing_the_stale_one_is_kept(files, monkeypatch):
    take(files, owner("stale"), there)
    replace = owner_module._replace

    def overtaken(files, stale, mine):
        monkeypatch.setattr(owner_module, "_replace", replace)
        take(files, owner("quick"), gone)
        return replace(files, stale, mine)

    monkeypatch.setattr(owner_module, "_replace", overtaken)
    with pytest.raises(OwnedByAnother, match="belongs to job quick"):
        take(files, owner("slow"), lambda other: other.job == "stale")
    assert read_owner(files) == owner("quick")
    assert [path.name for path in files.path.iterdir()] == ["owner.json"]


def test_whoever_was_killed_while_it_replaced_the_record_blocks_nobody_for_long(files, monkeypatch):
    take(files, owner("stale"), there)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: os._exit(9))
        pid = os.fork()
        if pid == 0:
            take(files, owner("killed"), gone)
        os.waitpid(pid, 0)
    monkeypatch.setattr(owner_module, "REPLACING_SECONDS", 0.1)
    take(files, owner("next"), gone)
    assert read_owner(files) == owner("next")


def test_a_link_whose_answer_was_lost_counts(files, monkeypatch):
    link = os.link

    def lossy(source, target):
        link(source, target)
        raise FileExistsError(target)  # what NFS says when it repeats a request that had gone through

    monkeypatch.setattr(os, "link", lossy)
    take(files, owner(), there)
    assert read_owner(files) == owner()


def test_a_process_knows_whether_its_attempt_still_owns_the_directory(files, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    take(files, owner(attempt=2), there)
    assert "belongs to job 24, attempt 3, on node1" in lost_to(files)  # not to a process that was started by hand
    monkeypatch.setenv(VARIABLE, "24.2.0")
    assert lost_to(files) is None
    monkeypatch.setenv(VARIABLE, "24.1.0")
    assert "no longer belongs to this attempt (24.1.0), but to job 24, attempt 3, on node1" in lost_to(files)
    files.owner.unlink()
    assert "but to none" in lost_to(files)
    monkeypatch.delenv(VARIABLE)
    assert lost_to(files) is None


def test_a_damaged_record_is_reported(files):
    files.path.mkdir()
    files.owner.write_text("{")
    with pytest.raises(ConfigError, match="owner.json is damaged; delete it if no job of this stage is running"):
        take(files, owner(), there)


def test_a_job_is_gone_when_slurm_says_so(fake_slurm):
    slept = []
    assert is_gone(owner())
    fake_slurm.runs("24", "PENDING")
    assert not is_gone(owner())
    fake_slurm.runs("24", directory="/home/somebody")
    assert is_gone(owner(directory="/runs/jobs/1"))  # another job under the same id

    def end(seconds):
        slept.append(seconds)
        del fake_slurm.queue["24"]

    fake_slurm.runs("24", "COMPLETING")
    assert is_gone(owner(), end) and len(slept) == 1


def test_another_users_job_that_the_site_hides_is_not_gone(fake_slurm, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1001)
    theirs = owner(uid=1002)
    monkeypatch.setattr(slurm, "_config", {"PrivateData": "none"})
    assert is_gone(theirs)
    monkeypatch.setattr(slurm, "_config", {"PrivateData": "jobs,usage"})
    assert not is_gone(theirs) and is_gone(owner(uid=1001))
    fake_slurm.history["24"] = ("COMPLETED", "")
    assert is_gone(theirs)
    fake_slurm.history["24"] = ("RUNNING", "")
    assert not is_gone(theirs)
    del fake_slurm.history["24"]
    monkeypatch.setattr(slurm, "_config", {})  # scontrol does not answer
    assert not is_gone(theirs)


def test_accounting_counts_if_squeue_does_not_answer(fake_slurm):
    fake_slurm.fails("squeue", times=3)
    fake_slurm.history["24"] = ("NODE_FAIL", "")
    assert is_gone(owner())
    fake_slurm.fails("squeue", times=3)
    fake_slurm.history["24"] = ("RUNNING", "")
    with pytest.raises(ConfigError, match="squeue does not answer"):
        is_gone(owner())


def test_a_local_run_is_gone_when_its_process_is(fake_slurm):
    mine = owner(f"local-{os.getpid()}", host=hostname())
    assert not is_gone(mine)
    dead = dataclasses.replace(mine, job="local-999999999")
    assert is_gone(dead) and not is_gone(dataclasses.replace(dead, host="another"))
    fake_slurm.missing.add("sbatch")
    assert not is_gone(owner()) and fake_slurm.calls == []


def test_a_job_that_never_started_is_known_without_its_directory(fake_slurm):
    record = Record("24", "/runs/jobs/1", now(), 1, ["row"], [], directory="/runs/jobs/1")
    fake_slurm.history["24"] = ("CANCELLED by 0", "")
    assert jobs_in_history([record])["24"].state == "CANCELLED"
    fake_slurm.history["24"] = ("COMPLETED", "/somebody/else")
    assert jobs_in_history([record]) == {}
