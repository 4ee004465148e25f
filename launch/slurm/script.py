"""What a job asks of sbatch: submitit's parameters, and sbatch's errors explained."""

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.cluster import Cluster, Layout, Slurm
from launch.plan.arrays import Array

# A word of sbatch's message -> the field of the profile to change, most telling word first.
FIELDS = {
    "maxwall": "slurm.time_limit_hours (or slurm.qos)",
    "maxnode": "nodes (or slurm.qos)",
    "maxgres": "nodes or gpus_per_node (or slurm.qos)",
    "maxcpu": "nodes or slurm.cpus_per_gpu (or slurm.qos)",
    "maxmem": "slurm.memory_gb (or slurm.qos)",
    "job array": "test_shards",
    "qos": "slurm.qos",
    "account": "slurm.account (or slurm.partition)",
    "partition": "slurm.partition",
    "time limit": "slurm.time_limit_hours",
    "memory": "slurm.memory_gb",
    "feature": "slurm.constraint",
    "gres": "gpus_per_node",
    "node count": "nodes",
    "node configuration": "nodes, gpus_per_node, slurm.cpus_per_gpu or slurm.memory_gb",
    "node name": "slurm.exclude",
    "reservation": "slurm.options",
    "option": "slurm.options",
}
# Where not even Python starts, another start, after a pause and up to a limit, may come to another node. The code 3 is
# launch.job.attempts.REFUSED.
AGAIN = """again() {
  [ "$1" != 3 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && sleep 60 && scontrol requeue "$SLURM_JOB_ID"
  exit 1
}"""
SRUN = 'srun() { command srun $start "$@"; }'  # $start: what `launch.job.attempts begin` has printed
GUARD = (  # on every node but the script's own, without taking anything from the stage's processes
    "command srun --job-name=guard --overlap --no-kill --gpus=0 --output=/dev/null --ntasks-per-node=1 "
    '--nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$SLURMD_NODENAME"'
)
TOO_MANY_JOBS = ("maxsubmit", "maxjob", "grpsubmit", "grpjobs")  # in the names of limits, as QOSMaxSubmitJobPerUser


def parameters(
    array: Array, cluster: Cluster, code: Path, folder: Path, dependency: str, exclude: str
) -> dict[str, Any]:
    """submitit's parameters of an array of stages. dependency, exclude: sbatch's values, or empty."""
    options = {name: value for name, value in cluster.slurm.options.items() if name != "exclude"}
    how = dataclasses.replace(cluster.slurm, exclude=exclude or None, options=options)
    kind = array.stages[0].kind
    # -u: a line that a full disk has refused must not stay in a buffer, whose flush at the end would fail.
    python, where = f"{shlex.quote(sys.executable)} -u -m", shlex.quote(str(folder))
    spares = spare_nodes(array, how)
    asked = {
        "job_name": array.stages[0].id if len(array.stages) == 1 else f"{kind}-{len(array.stages)}-stages",
        "gpus_per_node": array.layout.gpus,
        "cpus_per_task": how.cpus_per_gpu,
        "mem": f"{how.memory_gb * 1000:.0f}M" if how.memory_gb else None,
        "dependency": dependency or None,
        "no_kill": outlasts_nodes(array, how),  # launch.job.guard sees to the loss of the first node
    }
    settings = profile_parameters(how, code, asked, Layout(array.layout.nodes + spares, array.layout.gpus))
    guard = f'{GUARD} {python} launch.job.guard {where} "$SLURMD_NODENAME" &'
    return {
        **settings,
        "array_parallelism": how.array_parallelism or array.size,
        "setup": [
            AGAIN,
            *settings["setup"],
            SRUN,
            *([guard] if outlasts_nodes(array, how) else []),
            "export MVD_START=-1",
            "while MVD_START=$((MVD_START + 1)); do",
            f"start=$({python} launch.job.attempts begin {where}) || again $?",
        ],
        # The requeue at the end makes SLURM send SIGTERM, before the nodes to avoid are set.
        "teardown": [
            "code=$?",
            "trap '' TERM",
            f"next=$({python} launch.job.attempts end {where} $code)",
            "code=$?",
            '[ "$next" = again ] || exit $code',  # else the processes start again in this allocation
            "trap - TERM",
            "done",
        ],
    }


def spare_nodes(array: Array, how: Slurm) -> int:
    """How many nodes a job asks for beyond those it uses: none for a test, which is short."""
    return 0 if array.stages[0].kind == "test" else how.spare_nodes


def outlasts_nodes(array: Array, how: Slurm) -> bool:
    """Whether a job keeps its allocation if a node is lost: it has spare ones, or can go on with fewer."""
    shrinks = how.shrink and array.stages[0].kind != "test" and array.layout.nodes > 1
    return spare_nodes(array, how) > 0 or shrinks


def profile_parameters(how: Slurm, code: Path, asked: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """submitit's parameters of any job, one process per GPU of the layout: what it asks of sbatch, and the profile's.

    code: the snapshot that it runs in.
    """
    options: dict[str, Any] = {
        "partition": how.partition,
        "account": how.account,
        "qos": how.qos,
        "constraint": how.constraint,
        "exclude": how.exclude,
        "kill_on_invalid_dep": "yes",
        "requeue": True,
        **asked,
    }
    options |= {name.replace("-", "_"): value for name, value in how.options.items()}
    cpus = options["cpus_per_task"]
    return {
        "nodes": layout.nodes,
        "ntasks_per_node": layout.gpus,
        "time": max(1, round(how.time_limit_hours * 60)),
        "signal_delay_s": how.warning_seconds,
        "wckey": None,
        "stderr_to_stdout": True,
        # A rank that dies ends the job; srun does not take the number of CPUs from sbatch; --export overrides a NONE.
        "srun_args": ["--kill-on-bad-exit=1", "--export=ALL", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        "setup": _setup(how, code),
        "additional_parameters": {k: v for k, v in options.items() if v is not None and v is not False},
    }


def _setup(how: Slurm, code: Path) -> list[str]:
    """Lines of the script that prepare its shell: the profile's, then the code of the job."""
    gone = f"error: {code}, the code of this job, is gone; submit it again"
    sbatch = shutil.which("sbatch")
    clients = [f'export PATH="$PATH:"{shlex.quote(str(Path(sbatch).parent))}'] if sbatch else []
    return [
        'cd "$SLURM_SUBMIT_DIR"',
        *how.setup,
        "set +eu; trap - ERR",  # the end of an attempt is handled whatever the profile's lines have set
        *clients,  # whatever they have unloaded
        *(f"export {name}={shlex.quote(value)}" for name, value in how.environment.items()),
        f"cd {shlex.quote(str(code))} || {{ echo {shlex.quote(gone)}; exit 1; }}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
    ]


def explain(what: str, message: str) -> str:
    """sbatch's error in one sentence, with the profile's field that it is about."""
    lines = [line.removeprefix("sbatch: error: ") for line in message.splitlines() if "error:" in line]
    said = "; ".join(dict.fromkeys(line.removeprefix("Batch job submission failed: ") for line in lines))
    said = said or " ".join(message.split())
    words = said.lower()
    if any(word in words for word in TOO_MANY_JOBS):
        advice = "submit fewer rows at once, or change slurm.qos or slurm.account"
    else:
        advice = f"change {next((field for word, field in FIELDS.items() if word in words), 'the slurm section')}"
    return f"sbatch refuses the {what} jobs ({said}); {advice} in the cluster profile"
