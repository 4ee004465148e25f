"""Compiled blocks: the losses of a run, its number of graphs, and what happens where compiling fails.

On the CPU, with a backend that runs the traced graphs as they are; only the test of the cache generates code.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from mvd.config.sizes import Transformer
from mvd.distributed.process import start_processes
from mvd.files import write_json
from mvd.models.encoder import Blocks
from mvd.run import run_stage
from mvd.stage import Stage
from mvd.train import compilation
from mvd.train.compilation import Compilation
from tests.runs import curve, small_stage, succeed, write_stage

UPDATES = 3  # one epoch of the 48 videos


def broken(*_: Any) -> NoReturn:
    raise RuntimeError("no compiler here")


def run_all(folder: Path) -> None:
    import torch._dynamo

    keep = Compilation.keep
    for path in sorted(folder.glob("*/stage.yaml")):
        stage, graphs = Stage.from_yaml(path), []
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.compiler.set_stance("default")
        Compilation.failed = False  # of the stage before, as is the stance
        compilation.BACKEND = broken if stage.id == "broken" else "aot_eager"

        def counting(made: Compilation, graphs: list[int] = graphs) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            keep(made)

        Compilation.keep = counting
        run_stage(stage)
        write_json(path.with_name("graphs.json"), graphs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, motion_root, teachers) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("compiled")
    how: dict[str, Any] = {"world_size": 1, "micro_batch": 8, "global_batch": 16, "epochs": 1, "schedule_epochs": None}
    how |= {"checkpoint_every": UPDATES, "drop_path": 0.3}
    pretrain = {**how, "inputs": teachers, "precision": "bf16", "activation_checkpointing": True}
    cases = {
        "pretrain": ("pretrain", {**pretrain, "compile": True}),
        "broken": ("pretrain", {**pretrain, "compile": True}),
        "pretrain-eager": ("pretrain", pretrain),
        "finetune": ("finetune", {**how, "deepspeed": "zero0", "compile": True}),
        "finetune-eager": ("finetune", {**how, "deepspeed": "zero0"}),
    }
    made = {name: small_stage(kind, name, folder, motion_root, **fields) for name, (kind, fields) in cases.items()}
    for stage in made.values():
        write_stage(stage)
    succeed(run_all, folder, count=1)
    return made


@pytest.mark.parametrize(("kind", "tolerance"), [("pretrain", 5e-3), ("finetune", 1e-5)])
def test_losses_and_evaluations_are_those_without(runs, kind, tolerance):
    for name in ("loss", "grad_norm", *(("val_top1",) if kind == "finetune" else ())):
        assert curve(runs[kind], name) == pytest.approx(curve(runs[f"{kind}-eager"], name), rel=tolerance)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_nothing_is_compiled_after_the_first_update(runs, kind):
    first, *later = graphs(runs[kind])
    assert 2 <= first <= 6 and set(later) == {first}
    assert set(graphs(runs[f"{kind}-eager"])) == {0}


def graphs(stage: Stage) -> list[int]:
    found: list[int] = json.loads((stage.directory / "graphs.json").read_text())
    return found


def test_a_run_goes_on_without_where_compiling_fails(runs):
    ours, eager = (load_file(runs[name].files.weights) for name in ("broken", "pretrain-eager"))
    assert all(ours[key].equal(eager[key]) for key in eager)
    output = (Path(runs["broken"].execution.runs) / "output.0").read_text()
    assert "compile: compiling failed" in output and "no compiler here" in output


class Network(torch.nn.Module):
    """A stand-in for DeepSpeed's engine."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Blocks(Transformer(width=16, depth=1, heads=1))

    def zero_optimization_stage(self) -> int:
        return 0


def compile_once(folder: Path) -> None:
    """Compiles one forward pass with the cache of the run directory only; writes how many graphs the cache had."""
    from torch._dynamo.utils import counters

    process, network = start_processes(), Network()
    compiled = Compilation(Stage.from_yaml(folder / "stage.yaml"), process, network, [])
    with torch.no_grad():
        compiled.run(lambda: network.module(torch.zeros(1, 4, 16)))
    compiled.keep()
    write_json(folder / "hits.json", counters["aot_autograd"]["autograd_cache_hit"])


@pytest.mark.fullsize  # a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_next_attempt_finds_what_was_compiled(tmp_path, monkeypatch):
    stage = small_stage("finetune", "cached", tmp_path, tmp_path, world_size=1, micro_batch=4, compile=True)
    write_stage(stage)
    hits = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache-of-node-{attempt}"))
        succeed(compile_once, stage.directory, count=1)
        hits.append(json.loads((stage.directory / "hits.json").read_text()))
    assert hits == [0, 1]
