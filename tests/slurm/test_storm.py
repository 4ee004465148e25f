"""A short storm; `make chaos-slurm` blows a long one, which has the faults too that SLURM is slow to notice."""

from tests.slurm.storm import Storm

FAULTS = 6
QUICK = ("TERM", "kill one", "scontrol failing", "disk full at the end", "port taken", "hardware error")


def test_a_job_that_meets_many_faults_ends_as_the_undisturbed_one(lab, motion_root, teachers, tmp_path):
    storm = Storm(lab, tmp_path, motion_root, teachers, seed=0)
    storm.blow(FAULTS, QUICK)
    assert storm.faults.total() >= FAULTS
