"""The doctor on a real SLURM: the profile, the jobs of a row, and a compute node."""

from tests.slurm.conftest import TINY


def lines(printed: str) -> dict[str, str]:
    """Subject -> verdict and text."""
    found = [line.split(maxsplit=1) for line in printed.splitlines() if line.startswith(("ok ", "FIX "))]
    return {rest.partition(": ")[0]: f"{verdict} {rest.partition(': ')[2]}" for verdict, rest in found}


def test_a_profile_that_fits_the_site(site):
    said = lines(site.run("doctor.py", TINY, "--job", code=None))
    said.pop("runs folder")  # whose free space is this machine's
    assert [text for text in said.values() if not text.startswith("ok ")] == []
    assert said["partition"].startswith("ok main: up, 4 nodes")
    assert {"a pretrain job of 1 x 1 GPUs", "a finetune job of 1 x 1 GPUs", "a test job of 1 x 1 GPUs"} <= said.keys()
    (clients,) = [subject for subject in said if subject.startswith("SLURM clients on node")]
    assert said[clients] == "ok scontrol, squeue" and f"runs folder on {clients.split()[-1]}" in said


def test_a_profile_that_does_not(site):
    said = lines(site.run("doctor.py", TINY, "cluster.slurm.partition=gpu", code=2))
    assert said["partition"] == "FIX slurm.partition=gpu does not exist; set slurm.partition to one of main, high"
    assert said["a pretrain job of 1 x 1 GPUs"].startswith("FIX sbatch would refuse it: ")
