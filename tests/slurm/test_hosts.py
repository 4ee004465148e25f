"""A machine that a fault has named: the next attempts run on others, as long as there are enough."""

from tests.slurm.conftest import TINY, Site, stage_ids
from tests.slurm.lab import Lab

(STAGE,) = stage_ids(TINY)["pretrain"]
SHAPE = ("cluster.pretrain.nodes=2", "cluster.slurm.exclude=node4", "--until", "pretrain")


def nodes_of(lab: Lab, job: str, field: str) -> set[str]:
    """What `scontrol show job` says in NodeList or ExcNodeList."""
    words = lab.run("scontrol", "show", "job", job).split()
    (listed,) = [word.partition("=")[2] for word in words if word.startswith(f"{field}=")]
    return set(lab.run("scontrol", "show", "hostnames", listed).split())


def wait_for_attempt(site: Site, number: int) -> None:
    """Waits until the attempt has met a bad machine or is training."""

    def there() -> bool:
        attempts = site.record(STAGE).attempts
        return len(attempts) > number or (len(attempts) == number and attempts[-1].ended is not None)

    site.wait(f"the end of attempt {number}", there)


def test_a_machine_that_a_fault_names_is_avoided_while_enough_others_are_left(site, lab):
    site.bad.touch()
    site.submit(TINY, *SHAPE)
    job = site.record(STAGE).job_id
    wait_for_attempt(site, 1)
    first = site.bad.read_text()
    site.bad.write_text("")  # in the next attempt another one, so that not enough are left
    site.wait("the requeue", lambda: site.record(STAGE).avoided)
    assert site.record(STAGE).avoided == [first] and first in site.record(STAGE).attempts[0].error
    assert nodes_of(lab, job, "ExcNodeList") == {first, "node4"}
    assert f"avoids {first}" in site.states(TINY)[STAGE]

    wait_for_attempt(site, 2)
    second = site.bad.read_text()
    assert second not in (first, "node4")
    site.wait("the second requeue", lambda: site.record(STAGE).avoided == [second])
    assert f"{first} is not avoided: allocation failure: Requested node" in site.record(STAGE).attempts[1].error

    site.brake.touch()
    site.wait("the third attempt", lambda: site.brake.with_suffix(".reached").exists())
    assert nodes_of(lab, job, "NodeList") == {"node1", "node2", "node3"} - {second}
    assert "running for" in site.states(TINY)[STAGE] and f"avoids {second}" in site.states(TINY)[STAGE]

    site.run("cancel.py", TINY)
    site.wait_until_idle()
    printed = site.submit(TINY, *SHAPE, "cluster.slurm.options.hold=true")
    assert f"{second}, blamed for faults in the last 24 h, is avoided" in printed
    assert f"{first}, blamed for faults in the last 24 h, would be avoided" in printed
    assert nodes_of(lab, site.record(STAGE).job_id, "ExcNodeList") == {second, "node4"}
