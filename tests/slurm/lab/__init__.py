"""A real SLURM on one machine, for the tests and for anyone who wants to try the launcher without a cluster.

cluster.py starts and stops it and crashes its nodes, configuration.py writes its files, host.py prepares the machine,
processes.py finds the jobs' processes, and quirks.py adds what real sites do: an unreachable controller, failing
commands, a full disk, an occupied port.
"""

from tests.slurm.lab.cluster import FOLDER, NODES, Lab, running_lab
from tests.slurm.lab.host import can_run, wait_for

__all__ = ["FOLDER", "NODES", "Lab", "can_run", "running_lab", "wait_for"]
