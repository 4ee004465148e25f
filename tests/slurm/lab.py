"""A real SLURM on this one machine, for the tests and for anybody who wants to try the launcher without a cluster.

    make slurm-up      (python -m tests.slurm.lab up)      four virtual nodes with 2 claimed GPUs each, and accounting
    make slurm-down    (python -m tests.slurm.lab down)

Needs root on Debian or Ubuntu, whose packages it installs where they are missing. Everything lies in one folder, with
ports of its own; only processes that it started are stopped.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmdbd", "mariadb-server", "munge")
NODES = ("node1", "node2", "node3", "node4")
GPUS = 2  # of each node; the devices are /dev/null by another name
FOLDER = Path(os.environ.get("MVD_SLURM_LAB", "/tmp/mvd-slurm-lab"))
HOSTS = Path("/etc/hosts")
CONFIGURATION = Path(__file__).with_name("slurm.conf.in")
DATABASE_CONFIGURATION = Path(__file__).with_name("slurmdbd.conf.in")


def can_run() -> bool:
    """Whether this machine lets us: root on Debian or Ubuntu."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


class Lab:
    """The virtual cluster in a folder; `up` and `down` may be called any number of times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to talk to this cluster."""
        path = os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", "")))
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path, "MVD_SLURM_LAB": str(self.folder)}

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a client command; returns what it prints."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def up(self) -> None:
        """Installs, configures and starts what is not there yet, and waits until all nodes take jobs."""
        install()
        name_nodes()
        self._configure()
        self._start_munge()
        self._start_database()
        if self._daemon("slurmctld", "slurmctld"):
            wait_for("slurmctld", lambda: self._answers("scontrol", "ping"))
        for node in NODES:
            (self.folder / node).mkdir(exist_ok=True)
            self._daemon(f"slurmd.{node}", "slurmd", "-N", node)
        wait_for("the nodes", self.nodes_ready)

    def down(self) -> None:
        """Ends all jobs, then what `up` started, the last one first."""
        if self._pid("slurmctld"):
            jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:  # else their steps would outlive the daemons
                self.run("scancel", *sorted(set(jobs)), check=False)
                with contextlib.suppress(TimeoutError):
                    wait_for("the jobs' end", lambda: not self.run("squeue", "-h", check=False).strip())
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop(name)

    def crash(self, node: str) -> None:
        """Kills a node's daemon with all processes of its jobs, as if the power had failed."""
        daemon = self._pid(f"slurmd.{node}")
        doomed = [daemon] if daemon else []
        for pid in _processes():
            if self._environment(pid).get("SLURMD_NODENAME") == node:
                doomed.append(pid)
                parent = _parent(pid)
                if _name(parent) == "slurmstepd":
                    doomed.append(parent)
        for pid in set(doomed):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart(self, node: str) -> None:
        """Brings a crashed node back."""
        self._daemon(f"slurmd.{node}", "slurmd", "-N", node)

    def tasks(self, job: str) -> dict[int, int]:
        """Rank -> process id of a running job's tasks; `job` is the raw id."""
        found = {}
        for pid in _processes():
            environment = self._environment(pid)
            if environment.get("SLURM_JOB_ID") == job and _is_python(pid) and _name(_parent(pid)) == "slurmstepd":
                found[int(environment["SLURM_PROCID"])] = pid
        return found

    def launchers(self, job: str) -> list[int]:
        """Process ids of a running job's srun."""
        return [p for p in _processes() if _name(p) == "srun" and self._environment(p).get("SLURM_JOB_ID") == job]

    def _environment(self, pid: int) -> dict[str, str]:
        """A process's environment; empty where it belongs to no job of this cluster."""
        pairs = dict(pair.split("=", 1) for pair in _read(pid, "environ").split("\0") if "=" in pair)
        return pairs if pairs.get("SLURM_CONF") == self.environment["SLURM_CONF"] else {}

    def _configure(self) -> None:
        settings = self.folder / "slurm.conf"
        if settings.exists():
            return
        for name in ("log", "pid", "spool", "munge", "mysql", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for number in range(GPUS):  # SLURM takes nothing but character devices for GPUs
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        ports = free_ports(3 + len(NODES))
        values = {
            "folder": str(self.folder),
            "controller": str(ports[0]),
            "accounting": str(ports[1]),
            "database": str(ports[2]),
            "nodes": ",".join(NODES),
            "node_ports": ",".join(map(str, ports[3:])),
            "gpus": str(GPUS),
        }
        (self.folder / "lab.json").write_text(json.dumps(values))
        devices = f"{self.folder}/dev/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={values['nodes']} Name=gpu File={devices}\n")
        database = self.folder / "slurmdbd.conf"
        database.touch(0o600)  # slurmdbd takes no file that others can read
        database.write_text(DATABASE_CONFIGURATION.read_text().format_map(values))
        settings.write_text(CONFIGURATION.read_text().format_map(values))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        options = ("key-file=key", "socket=socket", "seed-file=seed", "log-file=log")
        paths = [f"--{name}={folder / file}" for name, file in (option.split("=") for option in options)]
        if self._daemon("munged", "munged", "--force", f"--pid-file={self.folder}/pid/munged.pid", *paths):
            wait_for("munge", lambda: self._answers("munge", "-n", "-S", str(folder / "socket")))

    def _start_database(self) -> None:
        data, port = self.folder / "mysql", json.loads((self.folder / "lab.json").read_text())["database"]
        connect = ["mariadb", "--no-defaults", "-uroot", f"--socket={data}/socket"]
        if not (data / "mysql").exists():
            options = ("--user=root", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db")
            self.run("mariadb-install-db", "--no-defaults", *options)
        small = ("--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M", "--innodb-flush-log-at-trx-commit=0")
        started = self._daemon(
            "mariadbd",
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={data}/socket"),
            *("--bind-address=127.0.0.1", f"--port={port}", f"--pid-file={self.folder}/pid/mariadbd.pid", *small),
            *("--innodb-lock-wait-timeout=900",),
            stays=True,
        )
        if started:
            wait_for("the database", lambda: self._answers(*connect, "-e", "select 1"))
            grant = "grant all on slurm_acct_db.* to slurm@'127.0.0.1' identified by 'slurm'"
            self.run(*connect, "-e", f"create database if not exists slurm_acct_db; {grant}")
        if self._daemon("slurmdbd", "slurmdbd"):
            wait_for("slurmdbd", lambda: self._answers("sacctmgr", "-n", "show", "cluster"))
            if "lab" not in self.run("sacctmgr", "-n", "show", "cluster"):
                self.run("sacctmgr", "-i", "add", "cluster", "lab")

    def nodes_ready(self) -> bool:
        """Whether all nodes take jobs; those that were down are told to."""
        listed = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%N %T", check=False).splitlines()
        states = dict(line.split() for line in listed)
        down = [node for node, state in states.items() if state.startswith(("down", "drain"))]
        if down:  # by an earlier crash
            self.run("scontrol", "update", f"nodename={','.join(down)}", "state=resume", check=False)
        return sum(state in ("idle", "mixed", "allocated") for state in states.values()) == len(NODES)

    def _daemon(self, name: str, *command: str, stays: bool = False) -> bool:
        """Starts a daemon unless it runs; returns whether it was started. `stays`: it does not fork by itself."""
        if self._pid(name):
            return False
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | self.environment
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        if not stays and process.wait(30):
            raise RuntimeError(f"{name} did not start:\n{(self.folder / 'log' / f'{name}.out').read_text()[-2000:]}")
        wait_for(name, lambda: self._pid(name) is not None)
        return True

    def _stop(self, name: str) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        try:
            wait_for(f"the end of {name}", lambda: self._pid(name) is None, seconds=20)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)

    def _pid(self, name: str) -> int | None:
        """The process that a pid file of ours names, if it is alive and what it should be."""
        try:
            text = (self.folder / "pid" / f"{name}.pid").read_text().strip()
        except FileNotFoundError:  # a daemon removes it when it ends
            return None
        if not text or _name(int(text)) != name.partition(".")[0] or _state(int(text)) == "Z":
            return None
        return int(text)

    def _answers(self, *command: str) -> bool:
        try:
            self.run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True


@contextlib.contextmanager
def running_lab(folder: Path) -> Iterator[Lab]:
    """The cluster of `make slurm-up` where it is up, or one in this folder while it is entered."""
    theirs = (FOLDER / "lab.json").exists()
    lab = Lab(FOLDER if theirs else folder)
    try:
        lab.up()
        yield lab
    finally:
        if not theirs:
            lab.down()


def install() -> None:
    """Installs the missing packages, without their starting daemons of their own."""
    command = ["dpkg-query", "-W", "-f=${Package} ${Status}\n", *PACKAGES]
    present = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    missing = [name for name in PACKAGES if f"{name} install ok installed" not in present]
    if not missing:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL, "check": True}
    try:
        subprocess.run(["apt-get", "update", "-qq"], **quiet)  # type: ignore[call-overload]
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], **quiet)  # type: ignore[call-overload]
    finally:
        if ours:
            policy.unlink()


def name_nodes() -> None:
    """Makes the nodes' names known, since ranks find each other by them; the lines stay, and hurt nobody."""
    known = HOSTS.read_text()
    lines = [f"127.0.0.1 {node}  # mvd tests\n" for node in NODES if f" {node}  # mvd tests\n" not in known]
    if lines:
        with open(HOSTS, "a") as handle:
            handle.writelines(lines)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    """Polls until the condition holds; TimeoutError names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.1)


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def _name(pid: int) -> str:
    return _read(pid, "comm").strip()


def _state(pid: int) -> str:
    return _read(pid, "stat").rpartition(")")[2].strip()[:1]


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _is_python(pid: int) -> bool:
    return "submitit" in _read(pid, "cmdline")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down"))
    verb = parser.parse_args().verb
    if not can_run():
        print("error: this needs root on Debian or Ubuntu", file=sys.stderr)
        return 2
    lab = Lab(FOLDER)
    if verb == "down":
        lab.down()
        shutil.rmtree(FOLDER, ignore_errors=True)
        return 0
    FOLDER.mkdir(exist_ok=True)
    lab.up()
    print(lab.run("sinfo"), end="")
    print("\nnow, in your shell:")
    print("\n".join(f"  export {name}={lab.environment[name]}" for name in ("SLURM_CONF", "MVD_SLURM_LAB")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
