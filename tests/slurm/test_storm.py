"""A short storm; `make chaos-slurm` runs a long one, with the faults too that take long to be noticed."""

from tests.slurm.storm import Storm

FAULTS = 6
QUICK = ("TERM", "kill one", "scontrol failing", "disk full at the end", "port taken", "hardware error")


def test_a_job_that_meets_many_faults_ends_as_the_undisturbed_one(lab, motion_root, teachers, tmp_path):
    storm = Storm(lab, tmp_path, motion_root, teachers, seed=0, nodes=2, epochs=5)
    storm.disturb(FAULTS, QUICK)
    assert storm.faults.total() >= FAULTS
