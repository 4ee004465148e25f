"""Files of other training programs: prefixes, containers, classifiers of other classes, odd tensors and values."""

import pytest
import torch

from mvd.models import build_classifier
from mvd.models.checkpoints import CheckpointError, load_official, to_official
from tests.models.test_checkpoints import BUILDERS, assert_equal_states, randomised

PREFIXES = ["encoder.", "backbone.", "module.", "_orig_mod.", "model."]
PREFIXES += ["module._orig_mod.", "_orig_mod.module.", "backbone.encoder.", "model.module.backbone."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixed_encoder_goes_into_a_classifier_and_the_log_says_so(prefix):
    student, classifier = randomised(BUILDERS["student"]()), BUILDERS["classifier"]()
    report = load_official(classifier, {prefix + key: value for key, value in student.state_dict().items()})
    assert torch.equal(classifier.blocks[3].mlp.fc2.weight, student.blocks[3].mlp.fc2.weight)
    assert str(report).endswith(f"; without the prefix {prefix}")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_wrapped_teacher_has_its_own_prefix_below_the_wrappers(prefix):
    teacher, loaded = randomised(BUILDERS["video_teacher"]()), BUILDERS["video_teacher"]()
    report = load_official(loaded, {prefix + key: value for key, value in teacher.state_dict().items()})
    assert_equal_states(loaded.state_dict(), teacher.state_dict())
    assert report.notes == ((f"without the prefix {prefix}encoder.",) if prefix else ())


def test_an_unknown_prefix_is_named():
    weights = {f"net.visual.{key}": value for key, value in BUILDERS["classifier"]().state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"keys start with 'net\.visual\.', which is not a known prefix: remove it"
    ):
        load_official(BUILDERS["classifier"](), weights)


def test_two_networks_that_differ_only_in_their_prefix_are_refused():
    state = BUILDERS["classifier"]().state_dict()
    weights = {f"{prefix}.{key}": value for prefix in ("backbone", "encoder") for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"has backbone\.\S+ and encoder\.\S+, which are the same key"):
        load_official(BUILDERS["classifier"](), weights)


CONTAINERS = {
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 1e-3},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "OpenMMLab": lambda state: {
        "meta": {"epoch": 3},
        "state_dict": {f"backbone.{key}": value for key, value in state.items()},
    },
    "SlowFast": lambda state: {"model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN: {}"},
    "timm": lambda state: {"state_dict": state, "state_dict_ema": {}, "args": {"model": "vit"}},
    "an average": lambda state: {"model_ema": state},
    "DeepSpeed and DDP": lambda state: {"module": {f"module.{key}": value for key, value in state.items()}},
    "nested": lambda state: {"model": {"state_dict": state}},
}
SAID = {
    "Lightning": ("taken from state_dict", "without the prefix model."),
    "OpenMMLab": ("taken from state_dict", "without the prefix backbone."),
    "SlowFast": ("taken from model_state",),
    "timm": ("taken from state_dict",),
    "an average": ("taken from model_ema",),
    "DeepSpeed and DDP": ("without the prefix module.",),
    "nested": ("taken from model.state_dict",),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_of_training_programs_are_unwrapped_and_the_log_says_so(name):
    classifier, loaded = randomised(BUILDERS["classifier"]()), BUILDERS["classifier"]()
    report = load_official(loaded, CONTAINERS[name](to_official(classifier)))
    assert_equal_states(loaded.state_dict(), classifier.state_dict())
    assert report.notes == SAID[name]


def test_of_weights_and_their_average_the_weights_are_taken():
    average, classifier, loaded = (randomised(BUILDERS["classifier"]()) for _ in range(3))
    report = load_official(loaded, {"model_ema": average.state_dict(), "model": classifier.state_dict()})
    assert_equal_states(loaded.state_dict(), classifier.state_dict())
    assert report.notes == ("taken from model, not from model_ema",)


def test_an_unknown_container_is_named():
    with pytest.raises(CheckpointError, match=r"holds no weights, .*; save the part under 'network' as a file"):
        load_official(BUILDERS["classifier"](), {"epoch": 3, "network": BUILDERS["classifier"]().state_dict()})


def test_a_container_in_itself_ends_in_a_sentence():
    content = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_official(BUILDERS["classifier"](), content)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_classifier_starts_one_of_other_classes_without_its_head(prefix):
    old, new = randomised(BUILDERS["classifier"]()), build_classifier("tiny", num_classes=5)
    weights = {prefix + key: value for key, value in to_official(old).items()}
    head = new.head.weight.detach().clone()
    report = load_official(new, weights, drop_other_head=True)
    assert torch.equal(new.head.weight, head) and torch.equal(new.fc_norm.weight, old.fc_norm.weight)
    assert torch.equal(new.blocks[3].mlp.fc2.weight, old.blocks[3].mlp.fc2.weight)
    assert report.missing == ("head.weight", "head.bias")
    assert str(report).endswith("; its head for 8 classes is replaced by a new one for 5")
    with pytest.raises(CheckpointError, match="number of classes"):
        load_official(new, weights)


def test_a_classifier_of_as_many_classes_keeps_its_head():
    old, new = randomised(BUILDERS["classifier"]()), BUILDERS["classifier"]()
    assert load_official(new, old.state_dict(), drop_other_head=True).missing == ()
    assert_equal_states(new.state_dict(), old.state_dict())


def test_a_head_of_another_width_is_not_dropped():
    weights = BUILDERS["classifier"]().state_dict()
    weights["head.weight"] = torch.ones(5, 7)
    with pytest.raises(CheckpointError, match=r"head\.weight is \(5, 7\)"):
        load_official(BUILDERS["classifier"](), weights, drop_other_head=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_named_and_nothing_is_loaded(value):
    weights = {key: tensor.double() for key, tensor in to_official(BUILDERS["classifier"]()).items()}
    weights["blocks.1.norm1.bias"][5] = value
    model = randomised(BUILDERS["classifier"]())
    before = to_official(model)
    with pytest.raises(
        CheckpointError, match=r"holds NaN or infinite values in blocks\.1\.norm1\.bias; use an earlier"
    ):
        load_official(model, weights)
    assert_equal_states(to_official(model), before)


def test_values_that_are_not_used_may_be_anything():
    weights = BUILDERS["student"]().state_dict()
    weights["mask_token_img"] = torch.full((1, 1, 96), torch.nan)
    weights["pos_embed"] = torch.eye(96).to_sparse()
    weights["step"] = torch.empty(3, device="meta")
    assert "mask_token_img" in load_official(BUILDERS["classifier"](), weights).ignored


ODD_TENSORS = {
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of odd tensors
def test_tensors_without_plain_values_are_named(kind, tmp_path):
    weights = to_official(BUILDERS["classifier"]())
    weights["head.weight"] = ODD_TENSORS[kind](weights["head.weight"])
    torch.save({"model": weights}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"head\.weight is a {kind} tensor instead of a dense one"):
        load_official(BUILDERS["classifier"](), tmp_path / "odd.pth")
