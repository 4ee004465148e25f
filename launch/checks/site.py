"""Whether this site's SLURM can run what the profile asks for."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from launch.checks.finding import Finding, examine
from launch.cluster import Cluster
from launch.slurm.client import SlurmClient
from mvd.config import KINDS, ConfigError

NEEDED = ("sbatch", "squeue", "scontrol", "scancel", "srun")
FAILED = 1  # exit code of a job whose stage has failed for good


def check_site(cluster: Cluster, client: SlurmClient) -> Iterator[Finding]:
    """Clients, controller, accounting, partition, requeueing and limits; ends with the first two if one is missing."""
    missing = [name for name in NEEDED if not client.has(name)]
    config = {} if missing else client.config()
    yield examine("SLURM clients", lambda: _check_clients(missing))
    if missing:
        return
    yield examine("controller", lambda: _check_controller(config))
    if not config:
        return
    yield examine("accounting", lambda: _check_accounting(config, client))
    yield examine("partition", lambda: _check_partition(cluster, client))
    yield examine("requeue", lambda: _check_requeue(config))
    yield examine("arrays", lambda: _check_arrays(config))


def _check_clients(missing: Sequence[str]) -> str:
    if missing:
        raise ConfigError(f"{', '.join(missing)} not found; run this on a login node, or load the site's SLURM module")
    return ", ".join(NEEDED)


def _check_controller(config: dict[str, str]) -> str:
    if not config:
        raise ConfigError("scontrol show config does not answer; try again when the controller is back")
    return f"cluster {config.get('ClusterName', '?')}, SLURM {config.get('SLURM_VERSION', '?')}"


def _check_accounting(config: dict[str, str], client: SlurmClient) -> str:
    if not client.has("sacct") or config.get("AccountingStorageType", "(null)") in ("(null)", "none", ""):
        return "none: jobs that vanish are explained by their logs alone"
    return f"sacct, {config['AccountingStorageType']}"


def _check_partition(cluster: Cluster, client: SlurmClient) -> str:
    """State, time limit and node count of the profile's partitions, one of which must fit, or of the site's default."""
    partitions = {p.get("PartitionName", "?"): p for p in show(client, "partition")}
    known = ", ".join(partitions)
    names = str(cluster.slurm.options.get("partition", cluster.slurm.partition) or "").split(",")
    if names == [""]:
        names = [name for name, partition in partitions.items() if partition.get("Default") == "YES"]
        if not names:
            raise ConfigError(f"the site has no default partition; set slurm.partition to one of {known}")
    for name in names:
        if name not in partitions:
            raise ConfigError(f"slurm.partition={name} does not exist; set slurm.partition to one of {known}")
    fits = [examine(name, partial(_check_one_partition, partitions[name], cluster, known)) for name in names]
    found = next((finding for finding in fits if finding.ok), fits[0])
    if not found.ok:
        raise ConfigError(found.text)
    return found.text


def _check_one_partition(partition: dict[str, str], cluster: Cluster, known: str) -> str:
    title, limit = partition["PartitionName"], partition.get("MaxTime", "UNLIMITED")
    if partition.get("State") != "UP":
        raise ConfigError(f"{title} is {partition.get('State')}; set slurm.partition to another one of {known}")
    if cluster.slurm.time_limit_hours > hours(limit):
        raise ConfigError(
            f"{title} allows {limit}, less than slurm.time_limit_hours={cluster.slurm.time_limit_hours:g}; lower it"
        )
    nodes = int(partition.get("TotalNodes", "0"))
    most = partition.get("MaxNodes", "UNLIMITED")
    allowed = min(nodes, int(most)) if most.isdigit() else nodes
    needed = max(cluster.nodes, *(cluster.resources(kind).nodes or 0 for kind in KINDS if kind != "test"))
    if needed + cluster.slurm.spare_nodes > allowed:
        spare = f" with slurm.spare_nodes={cluster.slurm.spare_nodes}" if cluster.slurm.spare_nodes else ""
        raise ConfigError(f"{title} allows {allowed} nodes per job, less than nodes={needed}{spare}; lower nodes")
    return f"{title}: up, {nodes} nodes, at most {limit}"


def _check_requeue(config: dict[str, str]) -> str:
    """Jobs ask for --requeue themselves, which wins over JobRequeue; preemption must not cancel them.

    Raises:
        ConfigError: SLURM requeues jobs that have failed for good.
    """
    codes = config.get("RequeueExit", "")
    for first, _, last in re.findall(r"(\d+)(-(\d+))?", codes):
        if int(first) <= FAILED <= int(last or first):
            raise ConfigError(
                f"SLURM requeues every job that ends with exit code {FAILED} (RequeueExit={codes} in slurm.conf), so a "
                f"stage that has failed would start again for ever; ask the administrators to leave {FAILED} out of it"
            )
    mode = config.get("PreemptMode", "OFF")
    if "CANCEL" in mode:
        return "jobs may be requeued, but preemption cancels them here: submit again after a preemption"
    return f"jobs may be requeued; preemption: {mode.lower()}"


def _check_arrays(config: dict[str, str]) -> str:
    return f"at most {config.get('MaxArraySize', '?')} elements per array, {config.get('MaxJobCount', '?')} jobs"


def check_test_submission(script: Path, client: SlurmClient) -> str:
    """What `sbatch --test-only` says of a batch script; ConfigError if the site would refuse it."""
    answer = client.call(("sbatch", "--test-only", str(script)))
    if answer.code:
        raise ConfigError(f"sbatch would refuse it: {answer.message}")
    return " ".join(answer.error.split()).removeprefix("sbatch: ") or "accepted"


def show(client: SlurmClient, what: str) -> list[dict[str, str]]:
    """The records of `scontrol show`, each as field -> value; ConfigError if it fails."""
    answer = client.call(("scontrol", "--oneliner", "show", what))
    if answer.code:
        raise ConfigError(f"scontrol show {what} fails ({answer.message}); try again, or ask the administrators")
    records = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in answer.out.splitlines()]
    return [record for record in records if record]


def hours(limit: str) -> float:
    """SLURM's time format (days-hours:minutes:seconds and its short forms) in hours; infinity for UNLIMITED."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts += [0] * (3 - len(parts))  # D-HH, D-HH:MM, D-HH:MM:SS
    else:
        parts = [0] * (3 - len(parts)) + parts if len(parts) != 1 else [0, parts[0], 0]  # MM:SS, HH:MM:SS, MM
    return 24 * int(days or 0) + parts[0] + parts[1] / 60 + parts[2] / 3600
