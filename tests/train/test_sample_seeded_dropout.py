"""Drop path and dropout by sample: the right distribution, which depends on the sample only."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from mvd.models import build_classifier, build_student
from mvd.train.sample_seeded_dropout import SampleDropout, SampleDropPath, SampleSeededLayers

CPU = torch.device("cpu")
SEEDS = torch.arange(1000, 1006)


def network() -> tuple[nn.Module, SampleSeededLayers]:
    torch.manual_seed(0)
    model = build_classifier("tiny", num_classes=8, drop_path=0.5, head_dropout=0.5)
    nn.init.normal_(model.head.weight)
    return model, SampleSeededLayers(model)


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    shape = build_classifier("tiny", num_classes=8).patch_embed.clip
    return torch.randn(6, 3, shape.frames, shape.image_size, shape.image_size)


def forward(clips: torch.Tensor, seeds: torch.Tensor, at_once: int) -> torch.Tensor:
    model, noise = network()
    parts = []
    for part, own in zip(clips.split(at_once), seeds.split(at_once), strict=True):
        noise.draw(own, CPU)
        parts.append(model(part))
    return torch.cat(parts)


def test_another_split_into_micro_batches_draws_the_same(clips):
    torch.manual_seed(1)
    whole = forward(clips, SEEDS, 6)
    torch.manual_seed(2)  # the global state has no effect
    torch.testing.assert_close(forward(clips, SEEDS, 2), whole, rtol=0, atol=1e-5)


def test_another_sample_draws_something_else(clips):
    whole, other = forward(clips, SEEDS, 6), forward(clips, SEEDS + 1, 6)
    assert (whole - other).abs().max() > 0.01
    model, _ = network()
    assert torch.equal(model.eval()(clips), model(clips))


def test_paths_and_units_are_dropped_as_often_as_the_rate_says():
    model = nn.Sequential(DropPath(0.25), nn.Dropout(0.25))
    noise = SampleSeededLayers(model)
    noise.draw(torch.arange(4000), CPU)
    ones = torch.ones(4000, 16)
    paths, units = model[0](ones), model[1](ones)
    assert paths.unique().tolist() == units.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (paths == paths[:, :1]).all() and not (units == units[:, :1]).all()
    assert float(paths.mean()) == pytest.approx(1, abs=0.04) and float(units.mean()) == pytest.approx(1, abs=0.02)


def test_every_layer_with_a_rate_is_replaced_and_draws_for_itself():
    noise = SampleSeededLayers(build_student("tiny", teacher="tiny", drop_path=0.5))
    noise.draw(torch.arange(64), CPU)
    draws = torch.stack([path.factors == 0 for path in noise.paths])
    assert len(noise.paths) > 2 and len({tuple(layer.tolist()) for layer in draws}) == len(noise.paths)


def test_two_dropout_layers_drop_other_units():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    SampleSeededLayers(model).draw(SEEDS, CPU)
    first, second = (layer(torch.ones(6, 64)) for layer in model)
    assert not first.equal(second)


def test_the_state_dict_is_that_of_the_networks_own_layers():
    plain = build_classifier("tiny", num_classes=8, drop_path=0.5, head_dropout=0.5)
    model, _ = network()
    assert plain.state_dict().keys() == model.state_dict().keys()
    kinds = {type(layer) for layer in model.modules()}
    assert {SampleDropPath, SampleDropout} < kinds and DropPath not in kinds
