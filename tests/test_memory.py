"""The counted memory against that of the real networks, which are built shallow, since memory is linear in depth."""

import contextlib
import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.recipes import VITB_FROM_VITB, VITH_E800, VITS_FROM_VITB, finetuning, masked_clips, masked_images
from mvd import memory
from mvd.config import SIZES, Finetune, ImageTeacher, Pretrain, TrainRecipe
from mvd.memory import CONTEXT, activation_bytes, memory_of, memory_of_group, parameters_of, peak_bytes, teacher_bytes
from mvd.stage import Execution, Stage
from mvd.train import tasks
from mvd.train.sample_seeded_dropout import SampleSeededLayers

FINETUNE = finetuning("base", "k400", epochs=5, base_lr=1e-3, global_batch=8, micro_batch=4)
KINDS = {
    "pretrain": VITB_FROM_VITB,
    "finetune": FINETUNE,
    "video_teacher": masked_clips("base", global_batch=8, micro_batch=4),
    "image_teacher": masked_images("base", micro_batch=4),
}
CPU = torch.device("cpu")


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive at the same time, of those made in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        of_arguments = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in of_arguments | self.alive.keys():
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return outputs


@contextlib.contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd saves in the block, without the weights."""
    saved: dict[int, int] = {}
    kept = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def one_block(recipe: TrainRecipe, monkeypatch, size: str) -> TrainRecipe:
    """The recipe with networks of the size's widths, but a single block in each encoder and decoder."""
    stacks = ("encoder", "decoder", "video_decoder", "image_decoder")
    shallow = {name: dataclasses.replace(getattr(SIZES[size], name), depth=1) for name in stacks}
    monkeypatch.setitem(SIZES, "shallow", dataclasses.replace(SIZES[size], **shallow))
    sizes = {"student": "shallow", "teacher": "shallow"} if isinstance(recipe, Pretrain) else {"size": "shallow"}
    return dataclasses.replace(recipe, **sizes)


def batch_of(recipe: TrainRecipe, samples: int) -> dict[str, Tensor]:
    own = SIZES["shallow"]
    image, clip = own.image_training, own.clip
    shape, positions, slices = (
        (image, image.positions, 1) if isinstance(recipe, ImageTeacher) else (clip, clip.positions, clip.slices)
    )
    mask = torch.zeros(samples, slices, positions, dtype=torch.bool)
    mask[:, :, : int(getattr(recipe, "mask_ratio", 0) * positions)] = True
    frames = () if isinstance(recipe, ImageTeacher) else (clip.frames,)
    pixels = torch.rand(samples, 3, *frames, shape.image_size, shape.image_size)
    if isinstance(recipe, Finetune):
        return {"video": pixels, "targets": torch.rand(samples, 400)}
    return {"images" if isinstance(recipe, ImageTeacher) else "video": pixels, "mask": mask.flatten(1)}


def step_of(kind: str, recipe: TrainRecipe, monkeypatch) -> tuple[set[int], Callable[[dict[str, Tensor]], Tensor]]:
    """The storages of a stage's weights, and the loss of a batch in bf16."""
    monkeypatch.setattr(tasks, "load_weights", lambda *_: None)
    inputs = {"image_teacher": "", "video_teacher": ""} if kind == "pretrain" else {}
    stage = Stage(kind=kind, id="memory", recipe=recipe, inputs=inputs, execution=Execution(precision="bf16"))
    task = tasks.build_task(stage, 400, CPU)
    layers = SampleSeededLayers(task.model, "bf16")
    networks = [task.model, *getattr(task, "teachers", ())]
    weights = {t.untyped_storage()._cdata for n in networks for t in (*n.parameters(), *n.buffers())}
    for parameter in task.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def engine(*inputs: Tensor, **settings: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return task.model(*inputs, **settings)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        layers.draw(torch.arange(len(next(iter(batch.values())))), CPU)
        return task.losses(engine, batch)["loss"]

    return weights, loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_that_autograd_keeps_of_a_sample(kind, checkpointing, monkeypatch):
    recipe = one_block(KINDS[kind], monkeypatch, "tiny")
    if kind != "image_teacher":
        recipe = dataclasses.replace(recipe, activation_checkpointing=checkpointing)
    weights, loss = step_of(kind, recipe, monkeypatch)
    totals = []
    for samples in (2, 4):
        batch = batch_of(recipe, samples)
        with saved_bytes(weights) as saved:
            loss(batch)
        totals.append(sum(saved.values()))
    assert activation_bytes(recipe, 2) == pytest.approx((totals[1] - totals[0]) / 2, rel=0.1)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_and_peak_memory_of_a_clip_at_a_real_width(kind, checkpointing, monkeypatch):
    recipe = one_block(KINDS[kind], monkeypatch, "small")
    recipe = dataclasses.replace(recipe, activation_checkpointing=checkpointing)
    weights, loss = step_of(kind, recipe, monkeypatch)
    saved_totals, peaks = [], []
    for samples in (1, 2):
        batch = batch_of(recipe, samples)
        with LiveStorages() as live, saved_bytes(weights) as saved:
            loss(batch).backward()
        saved_totals.append(sum(saved.values()))
        peaks.append(live.peak)
    assert activation_bytes(recipe, 2) == pytest.approx(saved_totals[1] - saved_totals[0], rel=0.1)
    assert peak_bytes(recipe, 2) == pytest.approx(peaks[1] - peaks[0], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_network(kind, monkeypatch):
    recipe = one_block(KINDS[kind], monkeypatch, "tiny")
    monkeypatch.setattr(tasks, "load_weights", lambda *_: None)
    inputs = {"image_teacher": "", "video_teacher": ""} if kind == "pretrain" else {}
    task = tasks.build_task(Stage(kind=kind, id="memory", recipe=recipe, inputs=inputs), 400, CPU)
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    assert parameters_of(recipe) == pytest.approx(trained, rel=0.01)
    frozen = sum(t.numel() * t.element_size() for n in getattr(task, "teachers", ()) for t in n.parameters())
    assert teacher_bytes(recipe, 2) == pytest.approx(frozen, rel=0.1)


def test_zero_divides_what_it_says_it_divides():
    fixed = [memory_of(VITH_E800, 64, f"zero{stage}", "bf16").fixed for stage in range(4)]
    assert fixed == sorted(fixed, reverse=True)
    parameters = parameters_of(VITH_E800)
    alone, many = (memory_of(VITH_E800, ranks, "zero1", "bf16").fixed for ranks in (1, 1000))
    assert alone - many == pytest.approx(16 * parameters, rel=0.01)
    assert memory_of(VITH_E800, 8, "zero0", "fp32").fixed > memory_of(VITH_E800, 8, "zero1", "fp32").fixed


def test_an_optimizer_on_the_host_takes_no_gpu_memory():
    fixed = [memory_of(VITH_E800, 8, name, "bf16").fixed for name in ("zero3", "zero3_offload")]
    assert fixed[0] - fixed[1] == pytest.approx(20 * parameters_of(VITH_E800) / 8, rel=0.01)


def test_students_that_share_their_teachers_hold_them_once_and_one_clip_at_a_time():
    one, other = (memory_of(recipe, 8, "zero1", "bf16") for recipe in (VITS_FROM_VITB, VITB_FROM_VITB))
    both = memory_of_group((VITS_FROM_VITB, VITB_FROM_VITB), 8, ("zero1", "zero1"), "bf16")
    assert both.sample == max(one.sample, other.sample)
    assert both.fixed == pytest.approx(one.fixed + other.fixed - CONTEXT - teacher_bytes(VITB_FROM_VITB, 2))


def test_a_second_bucket_is_filled_while_the_first_one_is_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "DS_CONFIGS", tmp_path)
    for overlaps in (True, False):
        zero = {"stage": 1, "overlap_comm": overlaps, "reduce_bucket_size": 25_000_000}
        (tmp_path / f"{overlaps}.json").write_text(json.dumps({"zero_optimization": zero}))
    both, one = (memory_of(VITB_FROM_VITB, 8, str(overlaps), "bf16").fixed for overlaps in (True, False))
    assert both - one == pytest.approx(4 * 25_000_000)
