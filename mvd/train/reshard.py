"""Loads a checkpoint that was saved by another number of processes or with another ZeRO stage.

The shards of all saving processes are merged into whole parameters and split again for the running ones. DeepSpeed's
universal checkpoints can do that too, but at stage 3 they give every parameter group the settings of the first group
and all groups one step counter; here groups and settings are those of the running engine.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvd.train.engine import Engine
from mvd.train.safe_pickle import load_pickle

MASTER = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
Whole = dict[str, dict[str, Tensor]]  # weights or moment -> parameter's name -> its fp32 values, flat


def load_resharded(engine: Engine, folder: Path, world_size: int, zero_stage: int) -> None:
    """Loads the weights, Adam's moments and step of a checkpoint into a new engine; all ranks call it together.

    world_size, zero_stage: of the checkpoint, all of whose files every process reads.
    """
    whole, step = _read(folder, world_size, zero_stage)
    write = {0: _write_unsharded, 1: _write_flat, 2: _write_flat, 3: _write_partitioned}
    with torch.no_grad():
        write[engine.zero_optimization_stage()](engine, whole, step)


def read_parameters(folder: Path, world_size: int, zero_stage: int) -> dict[str, Tensor]:
    """The trained weights of a checkpoint without an engine, flat and in fp32, by the names of the parameters."""
    whole, _ = _read(folder, world_size, zero_stage)
    return whole[MASTER]


def _read(folder: Path, world_size: int, zero_stage: int) -> tuple[Whole, Tensor | None]:
    read = {0: _read_unsharded, 1: _read_flat, 2: _read_flat, 3: _read_partitioned}[zero_stage]
    return read(folder, world_size)


def _open(folder: Path, name: str) -> Any:
    (path,) = folder.glob(name)
    content: dict[str, Any] = load_pickle(path, mmap=True)
    return content


def _optimizer_files(folder: Path, world_size: int) -> list[dict[str, Any]]:
    names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    return [_open(folder, name)["optimizer_state_dict"] for name in names]


def _read_unsharded(folder: Path, _: int) -> tuple[Whole, Tensor | None]:
    """Stage 0: the first process saved everything."""
    saved = _open(folder, "mp_rank_00_model_states.pt")
    optimizer = saved["optimizer"]
    names = [name for group in optimizer["param_groups"] for name in group["names"]]
    whole: Whole = {MASTER: {name: saved["module"][name].flatten() for name in names}}
    for moment in MOMENTS:
        whole[moment] = {names[i]: state[moment].flatten() for i, state in optimizer["state"].items()}
    return whole, _step(optimizer["state"])


def _read_flat(folder: Path, world_size: int) -> tuple[Whole, Tensor | None]:
    """Stages 1 and 2: each parameter group is one flat tensor, of which every process has a contiguous part."""
    parts: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in (MASTER, *MOMENTS)}
    files = _optimizer_files(folder, world_size)
    states = [file["base_optimizer_state"]["state"] for file in files]
    for file, state in zip(files, states, strict=True):
        for group, fragments in enumerate(file["param_slice_mappings"]):
            flat = {MASTER: file["single_partition_of_fp32_groups"][group], **state.get(group, {})}
            for name, fragment in fragments.items():
                for kind in parts.keys() & flat.keys():
                    piece = flat[kind].narrow(0, fragment.start, fragment.numel)
                    parts[kind].setdefault(name, []).append(piece)
    return {kind: {name: torch.cat(of) for name, of in named.items()} for kind, named in parts.items()}, _step(
        states[0]
    )


def _read_partitioned(folder: Path, world_size: int) -> tuple[Whole, Tensor | None]:
    """Stage 3: each parameter is split into equal parts, the last one padded."""
    files = _optimizer_files(folder, world_size)
    groups = _open(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    states = [file["optimizer_state_dict"]["state"] for file in files]
    flats = {MASTER: [torch.cat(file["fp32_flat_groups"]) for file in files]}
    if states[0]:
        for moment in MOMENTS:
            flats[moment] = [torch.cat([state[i][moment] for i in sorted(state)]) for state in states]
    whole: Whole = {kind: {} for kind in (MASTER, *MOMENTS)}
    offset = 0
    for name, shape in shapes.items():
        share = -(-shape.numel() // world_size)
        for kind, of_ranks in flats.items():
            whole[kind][name] = torch.cat([flat.narrow(0, offset, share) for flat in of_ranks])[: shape.numel()]
        offset += share
    return whole, _step(states[0])


def _step(states: dict[int, dict[str, Any]]) -> Tensor | None:
    """Adam's step counter, one for all parameters; None before the first update."""
    return states[0]["step"] if states else None


def _states(flats: dict[str, list[Tensor]], step: Tensor | None) -> dict[int, dict[str, Tensor]]:
    """Adam's state by parameter number, each with a step counter of its own."""
    if step is None:
        return {}
    pairs = zip(*(flats[moment] for moment in MOMENTS), strict=True)
    return {i: {"step": step.clone(), **dict(zip(MOMENTS, moments, strict=True))} for i, moments in enumerate(pairs)}


def _write_weights(engine: Engine, whole: Whole) -> None:
    for name, parameter in engine.module.named_parameters():
        if name in whole[MASTER]:
            parameter.copy_(whole[MASTER][name].view_as(parameter))


def _write_unsharded(engine: Engine, whole: Whole, step: Tensor | None) -> None:
    _write_weights(engine, whole)
    shapes = dict(engine.module.named_parameters())
    state = engine.optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["names"]]
    flats = {
        moment: [whole[moment][name].view_as(shapes[name]) for name in names] for moment in MOMENTS if step is not None
    }
    engine.optimizer.load_state_dict({**state, "state": _states(flats, step)})


def _write_flat(engine: Engine, whole: Whole, step: Tensor | None) -> None:
    _write_weights(engine, whole)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    flats: dict[str, list[Tensor]] = {kind: [] for kind in whole}
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for kind, values in whole.items():
            own = torch.zeros_like(flat)
            for parameter in parameters:
                place = parameter._hp_mapping
                if place is not None and names[id(parameter)] in values:
                    from_, to = place.lp_fragment_address, place.hp_fragment_address
                    piece = values[names[id(parameter)]].narrow(0, from_.start, from_.numel)
                    own.narrow(0, to.start, to.numel).copy_(piece)
            flats[kind].append(own)
    state = optimizer.state_dict()
    state["single_partition_of_fp32_groups"] = flats[MASTER]
    state["base_optimizer_state"] = {**state["base_optimizer_state"], "state": _states(flats, step)}
    optimizer.load_state_dict([state] * dist.get_world_size(), load_from_fp32_weights=True)


def _write_partitioned(engine: Engine, whole: Whole, step: Tensor | None) -> None:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    flats: dict[str, list[Tensor]] = {kind: [] for kind in whole}
    for parameters in optimizer.fp16_groups:
        for kind, values in whole.items():
            own = []
            for parameter in parameters:
                share = parameter.ds_tensor.ds_numel
                padded = torch.zeros(share * dist.get_world_size())
                name = names[id(parameter)]
                if name in values:
                    padded[: values[name].numel()] = values[name]
                own.append(padded.narrow(0, share * dist.get_rank(), share))
            flats[kind].append(torch.cat(own))
    state = optimizer.state_dict()
    state["fp32_flat_groups"] = flats[MASTER]
    state["optimizer_state_dict"] = {**state["optimizer_state_dict"], "state": _states(flats, step)}
    optimizer.load_state_dict([state] * dist.get_world_size())
    optimizer.checkpoint_event_epilogue()
