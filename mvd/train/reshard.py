"""Loads a checkpoint that was saved by another number of processes or with another ZeRO stage.

The files of all saving processes are mapped into memory, and each running process copies from them the fragments that
it owns, straight to where they stay: it never holds more than its own state. DeepSpeed's universal checkpoints can load
such checkpoints too, but at stage 3 they give every parameter group the settings of the first group and all groups one
step counter; here groups and settings are those of the running engine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvd.train.engine import Engine
from mvd.train.safe_pickle import load_pickle

MASTER = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
Pieces = list[tuple[int, Tensor]]  # parts of a flattened parameter, in files: where each begins, and its fp32 values
Saved = dict[str, dict[str, Pieces]]  # weights or moment -> parameter's name -> its pieces


def load_resharded(engine: Engine, folder: Path, world_size: int, zero_stage: int) -> None:
    """Loads the weights, Adam's moments and step of a checkpoint into a new engine; all ranks call it together.

    world_size, zero_stage: of the checkpoint.
    """
    saved, step = _read(folder, world_size, zero_stage)
    write = {0: _write_unsharded, 1: _write_flat, 2: _write_flat, 3: _write_partitioned}
    with torch.no_grad():
        write[engine.zero_optimization_stage()](engine, saved, step)


def read_parameters(folder: Path, world_size: int, zero_stage: int) -> dict[str, Tensor]:
    """The trained weights of a checkpoint without an engine, flat and in fp32, by the names of the parameters."""
    saved, _ = _read(folder, world_size, zero_stage)
    return {name: torch.cat([values for _, values in pieces]) for name, pieces in saved[MASTER].items()}


def _read(folder: Path, world_size: int, zero_stage: int) -> tuple[Saved, Tensor | None]:
    read = {0: _read_unsharded, 1: _read_flat, 2: _read_flat, 3: _read_partitioned}[zero_stage]
    return read(folder, world_size)


def _open(folder: Path, name: str) -> Any:
    (path,) = folder.glob(name)
    content: dict[str, Any] = load_pickle(path, mmap=True)
    return content


def _optimizer_files(folder: Path, world_size: int) -> list[dict[str, Any]]:
    names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    return [_open(folder, name)["optimizer_state_dict"] for name in names]


def _read_unsharded(folder: Path, _: int) -> tuple[Saved, Tensor | None]:
    """Stage 0: the first process saved everything."""
    content = _open(folder, "mp_rank_00_model_states.pt")
    optimizer = content["optimizer"]
    names = [name for group in optimizer["param_groups"] for name in group["names"]]
    saved: Saved = {MASTER: {name: [(0, content["module"][name].flatten())] for name in names}}
    for moment in MOMENTS:
        saved[moment] = {names[i]: [(0, state[moment].flatten())] for i, state in optimizer["state"].items()}
    return saved, _step(optimizer["state"])


def _read_flat(folder: Path, world_size: int) -> tuple[Saved, Tensor | None]:
    """Stages 1 and 2: each parameter group is one flat tensor, of which every process has a contiguous part."""
    saved: Saved = {kind: {} for kind in (MASTER, *MOMENTS)}
    files = _optimizer_files(folder, world_size)
    states = [file["base_optimizer_state"]["state"] for file in files]
    for file, state in zip(files, states, strict=True):
        for group, fragments in enumerate(file["param_slice_mappings"]):
            flat = {MASTER: file["single_partition_of_fp32_groups"][group], **state.get(group, {})}
            for name, fragment in fragments.items():
                for kind in saved.keys() & flat.keys():
                    pieces = saved[kind].setdefault(name, [])
                    begin = sum(values.numel() for _, values in pieces)
                    pieces.append((begin, flat[kind].narrow(0, fragment.start, fragment.numel)))
    return saved, _step(states[0])


def _read_partitioned(folder: Path, world_size: int) -> tuple[Saved, Tensor | None]:
    """Stage 3: each parameter is split into equal parts, the last one padded."""
    saved: Saved = {kind: {} for kind in (MASTER, *MOMENTS)}
    files = _optimizer_files(folder, world_size)
    groups = _open(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    states = [file["optimizer_state_dict"]["state"] for file in files]
    for rank, (file, state) in enumerate(zip(files, states, strict=True)):
        for shapes, master, moments in zip(
            groups, file["fp32_flat_groups"], [state[i] for i in sorted(state)] or [{}] * len(groups), strict=True
        ):
            flat = {MASTER: master, **moments}
            sizes = [shape.numel() for shape in shapes.values()]
            for name, (place, begin, count) in zip(shapes, _parts(sizes, rank, world_size), strict=True):
                for kind in saved.keys() & flat.keys():
                    saved[kind].setdefault(name, []).append((begin, flat[kind].narrow(0, place, count)))
    return saved, _step(states[0])


def _parts(sizes: list[int], rank: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """Of parameters of these sizes at stage 3: where a rank's part is in its flat tensor and in the parameter; length.

    All ranks' parts take as much room; what the last ones have too much is padding, which the length leaves out.
    """
    place = 0
    for size in sizes:
        share = -(-size // world_size)
        begin = min(rank * share, size)
        yield place, begin, min(share, size - begin)
        place += share


def _copy(pieces: Pieces, begin: int, to: Tensor) -> None:
    """Copies the values of a parameter from `begin` on into a flat tensor, as many as it has."""
    for start, values in pieces:
        first, last = max(begin, start), min(begin + to.numel(), start + values.numel())
        if first < last:
            to[first - begin : last - begin].copy_(values[first - start : last - start])


def _step(states: dict[int, dict[str, Any]]) -> Tensor | None:
    """Adam's step counter, one for all parameters; None before the first update."""
    return states[0]["step"] if states else None


def _states(moments: list[dict[str, Tensor]], step: Tensor | None) -> dict[int, dict[str, Tensor]]:
    """Adam's state by parameter number, each with a step counter of its own."""
    return {} if step is None else {i: {"step": step.clone(), **named} for i, named in enumerate(moments)}


def _write_weights(engine: Engine, saved: Saved) -> None:
    for name, parameter in engine.module.named_parameters():
        if name in saved[MASTER]:
            _copy(saved[MASTER][name], 0, parameter.view(-1))


def _write_unsharded(engine: Engine, saved: Saved, step: Tensor | None) -> None:
    _write_weights(engine, saved)
    parameters = dict(engine.module.named_parameters())
    state = engine.optimizer.state_dict()
    moments = []
    for name in [name for group in state["param_groups"] for name in group["names"] if step is not None]:
        moments.append({moment: torch.zeros_like(parameters[name]) for moment in MOMENTS})
        for moment, whole in moments[-1].items():
            _copy(saved[moment][name], 0, whole.view(-1))
    engine.optimizer.load_state_dict({**state, "state": _states(moments, step)})


def _write_flat(engine: Engine, saved: Saved, step: Tensor | None) -> None:
    _write_weights(engine, saved)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    moments = []
    for master, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        own = _own_part(master, step)
        for parameter in parameters:
            place = parameter._hp_mapping
            if place is not None and names[id(parameter)] in saved[MASTER]:
                to = place.hp_fragment_address
                for kind, flat in own.items():
                    pieces = saved[kind][names[id(parameter)]]
                    _copy(pieces, place.lp_fragment_address.start, flat.narrow(0, to.start, to.numel))
        moments.append({moment: own[moment] for moment in MOMENTS if moment in own})
    state = optimizer.state_dict()
    state["single_partition_of_fp32_groups"] = optimizer.single_partition_of_fp32_groups
    state["base_optimizer_state"] = {**state["base_optimizer_state"], "state": _states(moments, step)}
    optimizer.load_state_dict([state] * dist.get_world_size(), load_from_fp32_weights=True)


def _write_partitioned(engine: Engine, saved: Saved, step: Tensor | None) -> None:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    moments = []
    for master, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        own = _own_part(master, step)
        parts = _parts([parameter.ds_numel for parameter in parameters], dist.get_rank(), dist.get_world_size())
        for parameter, (place, begin, count) in zip(parameters, parts, strict=True):
            for kind, flat in own.items():
                _copy(saved[kind].get(names[id(parameter)], []), begin, flat.narrow(0, place, count))
        moments.append({moment: own[moment] for moment in MOMENTS if moment in own})
    state = optimizer.state_dict()
    state["optimizer_state_dict"] = {**state["optimizer_state_dict"], "state": _states(moments, step)}
    optimizer.load_state_dict([state] * dist.get_world_size())
    optimizer.checkpoint_event_epilogue()


def _own_part(master: Tensor, step: Tensor | None) -> dict[str, Tensor]:
    """A flat tensor of the engine, set to 0, and moments of the same size; none before the first step."""
    moments = {} if step is None else {moment: torch.zeros_like(master) for moment in MOMENTS}
    return {MASTER: master.zero_(), **moments}
