"""Starting, stopping and breaking the virtual cluster."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.slurm.lab import processes
from tests.slurm.lab.configuration import database_port, write_configuration
from tests.slurm.lab.host import add_host_names, install_packages, wait_for

NODES = ("node1", "node2", "node3", "node4")
FOLDER = Path(os.environ.get("MVD_SLURM_LAB", "/tmp/mvd-slurm-lab"))


class Lab:
    """The virtual cluster of one folder; `up` and `down` may be called any number of times."""

    def __init__(self, folder: Path, nodes: Sequence[str] = NODES) -> None:
        self.folder, self.nodes = folder, nodes

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a shell needs to talk to this cluster."""
        path = os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", "")))
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": path,
            "MVD_SLURM_LAB": str(self.folder),
            "MVD_EXPECT_GPU": "0",  # its GPUs are not real, so jobs have to train on the CPU
        }

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command; return its standard output.

        Raises:
            RuntimeError: it failed and `check` is set.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def up(self) -> None:
        """Install, configure and start what is missing, then wait until all nodes accept jobs."""
        install_packages()
        add_host_names(self.nodes)
        write_configuration(self.folder, self.nodes)
        self._start_munge()
        self._start_database()
        self.start_controller()
        for node in self.nodes:
            (self.folder / node).mkdir(exist_ok=True)
            self.restart(node)
        wait_for("the nodes", self.nodes_ready)

    def down(self) -> None:
        """End all jobs, then stop the daemons in reverse order."""
        if self._pid("slurmctld"):
            jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
            if jobs:  # otherwise their steps would outlive the daemons
                self.run("scancel", *sorted(set(jobs)), check=False)
                with contextlib.suppress(TimeoutError):
                    wait_for("the jobs' end", lambda: not self.run("squeue", "-h", check=False).strip())
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop(name)

    def start_controller(self) -> None:
        if self._daemon("slurmctld", "slurmctld"):
            wait_for("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False))

    def stop_controller(self) -> None:
        self._stop("slurmctld")

    def crash(self, node: str) -> None:
        """Kill a node's slurmd and all processes of its jobs, as a power failure would."""
        daemon = self._pid(f"slurmd.{node}")
        if daemon:  # first, since it could start another step
            processes.kill([daemon])
        wait_for(f"the end of the processes of {node}", lambda: not self._kill_steps(node))

    def _kill_steps(self, node: str) -> bool:
        """Kill the node's step daemons, then the processes of its jobs; returns whether there were any.

        A step daemon that outlives its batch script would report that the script died by a signal. SLURM would then
        end the job as FAILED instead of requeueing it after NODE_FAIL.
        """
        log = str(self.folder / "log" / f"slurmd.{node}.log")  # which the node's step daemons keep open
        daemons = [
            p for p in processes.pids() if processes.name_of(p) == "slurmstepd" and log in processes.open_files(p)
        ]
        of_jobs = {pid for pid in processes.pids() if self._environment(pid).get("SLURMD_NODENAME") == node}
        parents = {processes.parent_of(pid) for pid in of_jobs}  # a young daemon may not have opened the log yet
        daemons += [pid for pid in parents if processes.name_of(pid) == "slurmstepd" and pid not in daemons]
        started = processes.descendants(daemons)
        processes.kill([*daemons, *(started | of_jobs)])
        return bool(daemons or started or of_jobs)

    def restart(self, node: str) -> None:
        """Start a node's slurmd, unless it runs."""
        self._daemon(f"slurmd.{node}", "slurmd", "-N", node)

    def tasks(self, job: str) -> dict[int, int]:
        """Rank -> process id of a running job's tasks; `job` is the raw id."""
        found = {}
        for pid in self._processes_of(job):
            if "submitit" in processes.command_of(pid) and self._is_started_by_step_daemon(pid):
                found[int(processes.environment_of(pid)["SLURM_PROCID"])] = pid
        return found

    def launchers(self, job: str) -> list[int]:
        """Process ids of a running job's srun."""
        return [pid for pid in self._processes_of(job) if processes.name_of(pid) == "srun"]

    def batch_script(self, job: str) -> int:
        """Process id of a running job's batch script; `job` is the raw id."""
        scripts = [pid for pid in self._processes_of(job) if "slurm_script" in processes.command_of(pid)]
        (script,) = [pid for pid in scripts if self._is_started_by_step_daemon(pid)]
        return script

    def _processes_of(self, job: str) -> list[int]:
        return [pid for pid in processes.pids() if self._environment(pid).get("SLURM_JOB_ID") == job]

    def _is_started_by_step_daemon(self, pid: int) -> bool:
        return processes.name_of(processes.parent_of(pid)) == "slurmstepd"

    def _environment(self, pid: int) -> dict[str, str]:
        """A process's environment; empty if it belongs to no job of this cluster."""
        variables = processes.environment_of(pid)
        return variables if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"] else {}

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        options = ("key-file=key", "socket=socket", "seed-file=seed", "log-file=log")
        paths = [f"--{name}={folder / file}" for name, file in (option.split("=") for option in options)]
        if self._daemon("munged", "munged", "--force", f"--pid-file={self.folder}/pid/munged.pid", *paths):
            wait_for("munge", lambda: self._answers("munge", "-n", "-S", str(folder / "socket")))

    def _start_database(self) -> None:
        data, port = self.folder / "mysql", database_port(self.folder)
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
            forks=False,
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
        """True if all nodes accept jobs; resumes those that an earlier crash left down."""
        listed = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%N %T", check=False).splitlines()
        states = dict(line.split() for line in listed)
        down = [node for node, state in states.items() if state.startswith(("down", "drain"))]
        if down:
            self.run("scontrol", "update", f"nodename={','.join(down)}", "state=resume", check=False)
        return sum(state in ("idle", "mixed", "allocated") for state in states.values()) == len(self.nodes)

    def _daemon(self, name: str, *command: str, forks: bool = True) -> bool:
        """Start a daemon unless it runs; returns whether it was started. `forks`: it goes to the background itself."""
        if self._pid(name):
            return False
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | self.environment
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            process = subprocess.Popen(
                command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if forks and process.wait(30):
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
        """The process of a pid file of ours, if it is alive and has the daemon's name."""
        try:
            text = (self.folder / "pid" / f"{name}.pid").read_text().strip()
        except FileNotFoundError:  # the daemon removes it when it ends
            return None
        if not text or processes.name_of(int(text)) != name.partition(".")[0] or processes.is_zombie(int(text)):
            return None
        return int(text)

    def _answers(self, *command: str) -> bool:
        try:
            self.run(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True


@contextlib.contextmanager
def running_lab(folder: Path, nodes: Sequence[str] = NODES) -> Iterator[Lab]:
    """The cluster of `make slurm-up` if that is enough, otherwise one in this folder for the block's duration."""
    is_shared = (FOLDER / "lab.json").exists() and len(nodes) <= len(NODES)
    lab = Lab(FOLDER) if is_shared else Lab(folder, nodes)
    try:
        lab.up()
        yield lab
    finally:
        if not is_shared:
            lab.down()
