"""The files that the daemons of the virtual cluster read."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.slurm.lab.host import free_ports

GPUS = 2  # per node; the devices are copies of /dev/null


def write_configuration(folder: Path, nodes: Sequence[str]) -> None:
    """Write keys, devices and configuration files into the lab's folder, unless they are there already."""
    settings = folder / "slurm.conf"
    if settings.exists():
        return
    for name in ("log", "pid", "spool", "munge", "mysql", "dev"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for number in range(GPUS):  # SLURM accepts only character devices as GPUs
        os.mknod(folder / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
    ports = free_ports(3 + len(nodes))
    values = {
        "folder": str(folder),
        "controller": str(ports[0]),
        "accounting": str(ports[1]),
        "database": str(ports[2]),
        "nodes": ",".join(nodes),
        "most": str(len(nodes)),
        "node_ports": ",".join(map(str, ports[3:])),
        "gpus": str(GPUS),
    }
    (folder / "lab.json").write_text(json.dumps(values))
    (folder / "gres.conf").write_text(f"NodeName={values['nodes']} Name=gpu File={folder}/dev/gpu[0-{GPUS - 1}]\n")
    database = folder / "slurmdbd.conf"
    database.touch(0o600)  # slurmdbd refuses a file that others can read
    database.write_text(_template("slurmdbd.conf.in").format_map(values))
    cgroups = cgroup_configuration(_version())
    if cgroups:
        (folder / "cgroup.conf").write_text(cgroups)
    settings.write_text(_template("slurm.conf.in").format_map(values))


def database_port(folder: Path) -> str:
    values: dict[str, str] = json.loads((folder / "lab.json").read_text())
    return values["database"]


def cgroup_configuration(version: str) -> str:
    """Contents of cgroup.conf for a SLURM of this version (`slurmctld -V`); empty if it needs none.

    From 23.02 on slurmd does not start without a cgroup file system unless told so; older ones reject the setting.
    """
    found = re.search(r"(\d+)\.\d+", version)
    if found is None:
        raise ValueError(f"slurmctld -V must print a version such as 'slurm-wlm 22.05.8', got {version!r}")
    return "CgroupPlugin=disabled\n" if int(found[1]) >= 23 else ""


def _version() -> str:
    return subprocess.run(["/usr/sbin/slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()


def _template(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
