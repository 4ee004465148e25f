"""What submit.py --rehearse prints: the rehearsals of a plan, what they measured, and the profile lines to change."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.cli.output import command, counted, print_next, print_table, short
from launch.cli.parser import Request
from launch.cli.plan_cost import print_totals
from launch.cluster import Cluster
from launch.local.run import CORES
from launch.plan.graph import Node
from launch.plan.rehearsals import Planned
from launch.plan.rehearsed import costs, figures_of, rehearsals_folder
from launch.plan.resolve import build_stage
from launch.plan.together import plan_together
from launch.stage_state import State, from_plan, stage_states
from mvd.batch import solve_batch
from mvd.config import Test
from mvd.memory import CONTEXT, GB, USABLE, memory_of
from mvd.stage import Rehearsal, Stage

MOST_WAITING = 0.05  # share of the time; above it, more cores are asked for
ACTIVE = ("queued", "waiting", "running", "ending")  # states of a job that SLURM has
CHANGED = 0.1  # of sustained_tflops, from which on it is worth a line
ADVICE = re.compile(r"set cluster\.(\w+)(?:\.(\w+))?=([\d.]*\d)")  # in the error of a GPU without memory
# What the weights of an input are of.
NAMES = {"image_teacher": "image teacher", "video_teacher": "video teacher"}
NAMES |= {"pretrain": "pre-trained student", "finetune": "fine-tuned classifier"}

Figures = dict[str, Any]


def again(request: Request, *options: str) -> str:
    """The command line of this rehearsal."""
    local = ["--local"] * request.options.local
    return command("submit.py", *request.plan_words, "--rehearse", *local, *options)


def print_rehearsals(request: Request, planned: Sequence[Planned]) -> None:
    """Prints what is rehearsed, for which stages, in which layout, and what stands in for data and weights."""
    states = states_of(request.cluster, planned)
    columns = ["rehearsal", "state", "nodes x GPUs", "micro-batch x accumulation", "resumed on", "for"]
    lines = []
    for whole, resumed, stands_for in planned:
        how = whole.stage.execution
        batch = f"{how.micro_batch} x {how.accumulation}" if whole.stage.kind != "test" else f"{how.micro_batch} views"
        state, place = states[whole.stage.id].word, str(resumed.layout) if resumed else "-"
        lines.append([whole.stage.id, state, str(whole.layout), batch, place, ", ".join(stands_for)])
    print_table(f"rehearsals in {short(rehearsals_folder(request.cluster))}", columns, lines)
    using: dict[str, list[str]] = {}
    for whole, _, _ in planned:
        if used := stand_ins(whole.stage):
            using.setdefault(", ".join(used), []).append(whole.stage.id)
    for text, names in using.items():
        print(f"{text}: {', '.join(names)}")
    print(end="", flush=True)


def stand_ins(stage: Stage) -> list[str]:
    """What a rehearsal uses for weights and data that are not there."""
    how = stage.execution.rehearsal or Rehearsal()
    weights = [f"random weights for the {NAMES[role]}" for role in how.random_weights]
    return weights + [f"generated samples for {stage.recipe.dataset}"] * how.generated_data


def print_report(request: Request, planned: Sequence[Planned], nodes: Sequence[Node], submitted: Sequence[str]) -> int:
    """Prints what the complete rehearsals found; returns 1 if one has failed, else 0.

    submitted: names of jobs that have just been submitted.
    """
    cluster, local = request.cluster, request.options.local
    states = states_of(cluster, planned) | dict.fromkeys(submitted, State("queued", "queued"))
    failed = {name: state.text for name, state in states.items() if state.lost or state.word in ("stopped", "damaged")}
    found = {
        whole.stage.id: figures
        for whole, _, _ in planned
        if (figures := figures_of(whole.stage.id, cluster)) is not None
    }
    if found:
        _print_speed(planned, found, states)
        _print_saves(planned, found, cluster)
    for name, text in failed.items():
        print(f"{name}: {text}")
    stages = [build_stage(node, cluster) for node in nodes]
    if found:
        print()
        print_totals(
            nodes, plan_together(nodes, cluster, []), costs(nodes, stages, cluster, local), cluster.sustained_tflops
        )
    lines = profile_changes(found, list(failed.values()), cluster, local)
    if found or lines:
        _print_changes(lines)
    _print_next(request, planned, next(iter(failed), planned[0].whole.stage.id), states)
    return 1 if failed else 0


def states_of(cluster: Cluster, planned: Sequence[Planned]) -> dict[str, State]:
    """Name -> state of each job of the rehearsals."""
    nodes = [job.node for whole, resumed, _ in planned for job in (whole, resumed) if job is not None]
    return stage_states(from_plan(nodes), rehearsals_folder(cluster))


def _print_speed(planned: Sequence[Planned], found: Mapping[str, Figures], states: Mapping[str, State]) -> None:
    columns = ["rehearsal", "result", "GPUs>", "GB per GPU>", "micro-batch>", "largest that fits>", "clips/s>"]
    columns += ["TFLOP/s per GPU>", "MFU>", "waiting for data>", "loader cores per GPU>", "needed>"]
    lines = []
    for whole, _, _ in planned:
        stage, state = whole.stage, states[whole.stage.id]
        figures = found.get(stage.id, {})
        most = largest_micro_batch(stage, figures)
        cells = [
            stage.id,
            "fits" if figures else state.word,
            str(stage.execution.world_size),
            _number(figures, "memory_gb"),
            str(stage.execution.micro_batch),
            "-" if most is None else str(most),
            _number(figures, "samples_per_second"),
            _number(figures, "speed/tflops_per_gpu", 0),
            _number(figures, "speed/mfu", 0, 100, " %"),
            _number(figures, "data_wait_share", 0, 100, " %"),
            _number(figures, "loader_workers", 0) if stage.kind != "test" else "-",
            str(cores_needed(figures)) if "data_wait_share" in figures else "-",
        ]
        lines.append(cells)
    print_table(f"{counted(len(found), 'rehearsal')} of {len(planned)}: speed", columns, lines)
    if not any(figures["gpu"] for figures in found.values()):
        print("on CPUs: GB are of RAM, and there is no TFLOP/s, MFU or largest micro-batch")
    print("clips/s are images/s of an image teacher, and videos/s of fine-tuning and tests")


def _print_saves(planned: Sequence[Planned], found: Mapping[str, Figures], cluster: Cluster) -> None:
    columns = ["rehearsal", "save s>", "training stands still s>", "GB>", "resume s>", "on fewer GPUs s>"]
    lines = []
    for whole, resumed, _ in planned:
        figures = found.get(whole.stage.id, {})
        fewer = (figures_of(resumed.stage.id, cluster) or {}) if resumed else {}
        cells = [_number(figures, name, 2) for name in ("save_seconds", "save_stall_seconds", "save_gb")]
        cells += [_number(figures, "resume_seconds"), _number(fewer, "resume_seconds")]
        lines.append([whole.stage.id, *cells, _number(figures, "all_reduce_gb_per_second", 2)])
    print()
    print_table("checkpoints and network", [*columns, "all-reduce GB/s>"], lines)


def _print_changes(lines: Sequence[str]) -> None:
    print("\nprofile lines to change:" if lines else "\nno line of the profile needs a change")
    for line in lines:
        print(f"  {line}")


def _first_active(planned: Sequence[Planned], states: Mapping[str, State]) -> list[str]:
    """The names of the first rehearsal that waits or runs, and of its resume, which may wait for it."""
    jobs = [[job.stage.id for job in (whole, resumed) if job is not None] for whole, resumed, _ in planned]
    active = ([name for name in names if states[name].word in ACTIVE] for names in jobs)
    return next(names for names in active if names)


def _print_next(request: Request, planned: Sequence[Planned], repeated: str, states: Mapping[str, State]) -> None:
    """Prints the next commands. repeated: the name of a rehearsal to repeat."""
    folder = f"cluster.runs={rehearsals_folder(request.cluster).absolute()}"
    own = ["--cluster", request.options.cluster] if request.options.cluster else []
    if any(state.word in ACTIVE for state in states.values()):
        commands = [("see how far they are", command("status.py", folder, *own))]
        commands += [("cancel one", command("cancel.py", *_first_active(planned, states), folder, *own))]
        commands += [("see what they found, once they are done", again(request))]
    else:
        local = ["--local"] * request.options.local
        commands = [("plan with the measured rates", command("submit.py", *request.plan_words, *local, "--dry-run"))]
        commands += [("rehearse one again", again(request, "--force", repeated))]
    print_next(commands)


def largest_micro_batch(stage: Stage, figures: Figures) -> int | None:
    """The largest micro-batch that fits and divides the batch: the measured peak, and the counted bytes of a sample.

    None on a CPU and for a test.
    """
    if isinstance(stage.recipe, Test) or "gpu_memory_gb" not in figures:
        return None
    how = stage.execution
    sample = memory_of(stage.recipe, how.world_size, how.deepspeed, how.precision).sample
    free = (USABLE * figures["gpu_memory_gb"] - figures["memory_gb"]) * GB - CONTEXT
    most = how.micro_batch + max(0, math.floor(free / sample))
    return solve_batch(stage.recipe, how.world_size, most).micro_batch


def cores_needed(figures: Figures) -> int:
    """Loader cores per GPU with which training would not wait for data; the present ones if it hardly does.

    Loader processes that are waited for are busy all the time. Without any, the training process itself reads.
    """
    present: int = figures["loader_workers"]
    waiting: float = min(figures["data_wait_share"], 0.99)
    if waiting <= MOST_WAITING:
        return present
    return math.ceil(round((present or waiting) / (1 - waiting), 3))


def profile_changes(found: Mapping[str, Figures], failures: Sequence[str], cluster: Cluster, local: bool) -> list[str]:
    """Lines of the cluster profile that the figures of complete rehearsals and the errors of others suggest."""
    lines = [_advice(match) for text in failures if (match := ADVICE.search(text))]
    memory = [figures["gpu_memory_gb"] for figures in found.values() if "gpu_memory_gb" in figures]
    if memory and cluster.gpu_memory_gb is None:
        lines.append(f"gpu_memory_gb: {math.floor(min(memory))}")
    trained = [figures for figures in found.values() if "data_wait_share" in figures]
    rates = [figures["speed/tflops_per_gpu"] for figures in trained if "speed/tflops_per_gpu" in figures]
    if rates and abs(statistics.median(rates) / cluster.sustained_tflops - 1) > CHANGED:
        text = f"median of {counted(len(rates), 'rehearsal')}, {min(rates):.0f} to {max(rates):.0f}"
        lines.append(f"sustained_tflops: {statistics.median(rates):.0f}  # {text}")
    needed = max((cores_needed(f) for f in trained if f["data_wait_share"] > MOST_WAITING), default=0)
    most = max(1, CORES // cluster.gpus_per_node) if local else needed
    if cluster.workers < min(needed, most):
        lines.append(f"workers: {min(needed, most)}")
    if not local and needed > (cluster.slurm.cpus_per_gpu or 0):
        lines.append(f"slurm: {{cpus_per_gpu: {needed}}}")
    return list(dict.fromkeys(lines))


def _advice(match: re.Match[str]) -> str:
    """`pretrain: {micro_batch: 8}` of `set cluster.pretrain.micro_batch=8`."""
    section, name, value = match.groups()
    return f"{section}: {{{name}: {value}}}" if name else f"{section}: {value}"


def _number(figures: Figures, name: str, digits: int = 1, scale: float = 1.0, unit: str = "") -> str:
    return f"{scale * figures[name]:,.{digits}f}{unit}" if name in figures else "-"
