"""Overrides, the cluster profile and row files: what is accepted, and what is rejected with which message."""

import dataclasses
import re
from operator import attrgetter
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from experiments import all as all_rows
from experiments.vitb_from_vitb_k400 import row
from launch.cluster import EXAMPLE, ROOT, Cluster, PretrainResources, Slurm, load_cluster
from launch.plan.rows import find, load_rows
from mvd.config import DATASETS, ConfigError, DatasetPaths, Faults
from mvd.config.typed import parse_override


@pytest.fixture
def write_profile(tmp_path):
    def write(text):
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return str(path)

    return write


def load(*words):
    return load_rows([w for w in words if "=" not in w], [parse_override(w) for w in words if "=" in w])


def test_overrides_are_typed():
    (row,) = load(
        "vith_k400",
        "pretrain.optimization.epochs=2",
        "pretrain.optimization.base_lr=1e-3",
        "finetune.augmentation.crop_scale=[0.5,1]",
        "finetune.augmentation.auto=null",
        "finetune.mixing={group: 4, mixup: 1}",
        "teachers=train",
    )
    assert (row.pretrain.optimization.epochs, row.pretrain.optimization.base_lr) == (2, 1e-3)
    assert row.finetune.augmentation.crop_scale == (0.5, 1.0) and row.finetune.augmentation.auto is None
    assert (row.finetune.mixing.group, row.finetune.mixing.mixup, row.finetune.mixing.cutmix) == (4, 1.0, 1.0)
    assert row.teachers == "train" and row.pretrain.optimization.schedule_epochs == 801


def test_an_override_reaches_every_row_that_has_the_section():
    assert {row.finetune.seed for row in load("all", "finetune.seed=7")} == {7}
    distilled, scratch, smaller = load("demo", "pretrain.seed=7")
    assert distilled.pretrain.seed == smaller.pretrain.seed == 7 and scratch.pretrain is None


@pytest.mark.parametrize(
    ("target", "setting", "message"),
    [
        (
            "vith_k400",
            "pretrain.optimization.epoch=2",
            r"no key 'epoch' \(nearest: epochs.*use one of global_batch, epochs",
        ),
        ("vith_k400", "pretain.seed=2", r"a row has no key 'pretain' \(nearest: pretrain"),
        ("vith_k400", "finetune.seed.x=2", r"finetune.seed is an integer and has no key 'x'"),
        ("vith_k400", "finetune={mixing: {grup: 2}}", r"finetune.mixing has no key 'grup' \(nearest: group"),
        ("vith_k400", "finetune.seed=abc", r"finetune.seed must be an integer, got 'abc'"),
        ("vith_k400", "finetune.seed=1.5", r"finetune.seed must be an integer, got 1.5"),
        ("vith_k400", "finetune.seed=", r"finetune.seed must be an integer, got null"),
        ("vith_k400", "finetune.drop_path=lots", r"finetune.drop_path must be a number, got 'lots'"),
        ("vith_k400", "finetune.activation_checkpointing=7.5", r"must be true or false"),
        ("vith_k400", "teachers=buy", r"teachers must be one of checkpoint, train, got 'buy'"),
        ("vith_k400", "finetune.optimization.betas=[1,2,3]", r"betas must be a list of 2 numbers"),
        (
            "vith_k400",
            "finetune.optimization=3",
            r"finetune.optimization must be a section with the keys global_batch",
        ),
        ("vith_k400", "finetune={mixing: {group: a}}", r"finetune.mixing.group must be an integer, got 'a'"),
        ("vith_k400", "finetune.mixing.group=3", r"mixing.group .*an even number"),
        ("vith_k400", "finetune.seed=[1", r"cannot be read as YAML"),
        ("vith_k400", ".seed=1", r"the key is not complete"),
        ("teachers/mae_vitb", "pretrain.optimization.epochs=2", r"mae_vitb has no pretrain; it has image_teacher"),
        ("vith_k400", "seed=1", r"no key 'seed'; did you mean .*pretrain.seed or finetune.seed\?$"),
        ("vith_k400", "epochs=1", r"did you mean .*pretrain.optimization.epochs or finetune.optimization.epochs\?$"),
        (
            "vith_k400",
            "finetune.lr=1",
            r"did you mean finetune.optimization.base_lr or finetune.optimization.min_lr\?$",
        ),
        ("vith_k400", "finetune.augmentation.auto=randaug", r"auto must be null or a RandAugment policy .* 'randaug'"),
        ("vith_k400", "finetune.augmentation.auto=rand-m7-m", r"auto must be null or a RandAugment policy"),
        ("vith_k400", "finetune.augmentation.crop_ratio=[2,1]", r"crop_ratio must be an ascending range"),
        ("vith_k400", "finetune.mixing.mixup=-1", r"mixing.mixup must be 0 or a positive number, got -1"),
        ("vith_k400", "finetune.mixing.switch=2", r"mixing.switch must be a probability"),
        ("vith_k400", "finetune.optimization.betas=[0.9,1]", r"betas must be at least 0 and below 1"),
        (
            "vith_k400",
            "finetune.optimization.weight_decay=.nan",
            r"weight_decay must be 0 or a positive number, got nan",
        ),
        ("vith_k400", "pretrain.drop_path=1", r"pretrain.drop_path must be at least 0 and below 1"),
        ("vith_k400", "finetune.stride=0", r"finetune.stride must be a positive number"),
        ("teachers/mae_vitb", "pretrain={seed: 2}", r"mae_vitb has no pretrain"),
    ],
)
def test_refused(target, setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(target, setting)
    assert "\n" not in str(caught.value)


def test_an_unknown_row_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no row or suite 'experiments/vith_k40' \(nearest: vith_k400"):
        load("experiments/vith_k40")


@pytest.mark.parametrize(
    "target",
    ["experiments/vith_k400", "experiments/vith_k400.py", "vith_k400", str(ROOT / "experiments/vith_k400.py")],
)
def test_a_row_is_found_from_any_directory(target, tmp_path, monkeypatch):
    for folder in (ROOT, ROOT / "experiments", tmp_path):
        monkeypatch.chdir(folder)
        assert find(target) == ROOT / "experiments" / "vith_k400.py"
        (row,) = load(target)
        assert row.name == "vith_k400"


def test_a_row_file_may_be_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom experiments import vith_k400\n"
        "row = dataclasses.replace(vith_k400.row, name='mine', target=None)\n"
    )
    monkeypatch.chdir(tmp_path)
    for target in ("mine", "./mine.py", str(tmp_path / "mine")):
        assert [row.name for row in load(target)] == ["mine"]


def test_a_row_file_runs_its_own_row_and_not_the_rows_that_it_imports(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import dataclasses\nfrom experiments.demo import rows\nrow = dataclasses.replace(rows[1], name='mine')\n"
    )
    assert [row.name for row in load(str(file))] == ["mine"]
    file.write_text("from experiments.demo import rows\n")
    assert [row.name for row in load(str(file))] == ["demo", "demo_from_scratch", "demo_nano"]
    file.write_text("from experiments.demo import rows as known\nrows = known[1]\n")
    assert [row.name for row in load(str(file))] == ["demo_from_scratch"]


def test_a_setting_without_its_value_is_not_taken_for_a_row():
    with pytest.raises(ConfigError, match=r"if it is a setting, write finetune.seed=VALUE"):
        load("finetune.seed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("from experiments.demo import rows\nrows = rows\nrow = rows[0]", "it declares both `row` and `rows`"),
        ("x = 1", "declares no row"),
        ("rows = [1]", "declares no row"),
        ("row = ", ", line 1: SyntaxError: invalid syntax"),
        (
            "from mvd.config import Row\nrow = Row(nam='x')",
            ", line 2: TypeError: Row.__init__.. got an unexpected keyword argument 'nam'",
        ),
        ("from mvd.config import Target, Row, Test\nrow = Row(name='x', test=Test(size='tiny'))", "TypeError"),
        (
            "from mvd.config import Row, Test\n"
            "row = Row(name='x', test=Test(size='tiny', dataset='motion', sampling='dense', clips=1))",
            "a test needs a finetune",
        ),
        (
            "from mvd.config import Dataset\n\nMINE = Dataset(classes=3)",
            r"wrong.py, line 3: TypeError: Dataset.* missing 1 required .* 'train_samples'; fix the row file",
        ),
        (
            "from mvd.config import Finetune\nx = Finetune(size='base')",
            r"line 2: TypeError: Finetune.* missing 5 required",
        ),
        (
            "from experiments.recipes import finetuning, multi_view_test\ntest = multi_view_test('base', 'mine')",
            r"line 2: unknown data set 'mine'; use one of k400, .*, and for your own data set dataset and own",
        ),
        (
            "from experiments.recipes import finetuning\n"
            "x = finetuning('base', 'mine', epochs=1, base_lr=1e-3, global_batch=8, micro_batch=8)",
            r"line 2: unknown data set 'mine'",
        ),
        (
            "import dataclasses\nfrom experiments.demo import rows as demo\n"
            "x = dataclasses.replace(demo[0].finetune, dataset='mine')",
            r"line 3: finetune.dataset: no video data set is called 'mine'; use one of .*, or declare your own",
        ),
        (
            "from mvd.config import Row, Test\nx = Test(size='gigantic', dataset='motion', sampling='dense', clips=1)",
            r"line 2: test.size: unknown model size 'gigantic'; use one of small, base",
        ),
        (
            "from mvd.config import Size\nGIANT = Size(short_name='vitg')",
            r"line 2: TypeError: Size.* missing 3 required .* 'encoder', 'decoder', and 'video_decoder'; fix",
        ),
        ("from mvd.config import Row\nrow = Row(name='x', target=70)", r"wrong.py: target: Invalid type assigned: int"),
        ("rows = 3", "declares no row"),
    ],
)
def test_a_wrong_row_file_is_named(content, message, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_two_rows_of_one_name_are_refused(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("from mvd.config import Row\nrow = Row(name='vith_k400')\n")
    with pytest.raises(ConfigError, match="another row called vith_k400"):
        load("vith_k400", str(other))
    assert len(load("all", "vith_k400", "ssv2")) == 14


def test_profile_defaults_file_and_command_line(write_profile):
    path = write_profile("gpus_per_node: 4\npretrain: {nodes: 2}\ndatasets: {k400: {root: /k}}\nruns: out\n")
    settings = [parse_override("gpus_per_node=2"), parse_override("datasets.k400.val=validate.csv")]
    cluster = load_cluster(path, settings)
    assert (cluster.gpus("pretrain", row.pretrain), cluster.gpus("finetune", row.finetune)) == (4, 8)
    assert (cluster.datasets["k400"].root, cluster.datasets["k400"].val) == ("/k", "validate.csv")
    assert Path(cluster.runs) == ROOT / "out"


def test_profile_from_the_environment(write_profile, monkeypatch):
    monkeypatch.setenv("MVD_CLUSTER", write_profile("workers: 3"))
    assert load_cluster(None, []).workers == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu_per_node: 4", r"cluster.yaml: gpu_per_node: a cluster has no key .* \(nearest: gpus_per_node"),
        ("pretrain: {node: 4}", r"pretrain has no key 'node' \(nearest: nodes"),
        ("pretrain: {nodes: four}", r"pretrain.nodes must be an integer or null, got 'four'"),
        ("pretrain: {nodes: 0}", r"nodes must be at least 1, or null, got 0"),
        (
            "pretrain: {deepspeed: zero9}",
            r"deepspeed must be a file of ds_configs/ .zero0, zero1, zero2, .*, got 'zero9'",
        ),
        ("precision: fp16", r"precision must be one of bf16, fp32 or null, got 'fp16'"),
        ("datasets: {k400: {train: x.csv}}", r"cluster.yaml: datasets: datasets.k400.root is missing; set it as well"),
        ("teachers: {mae_vitz: /x}", r"teachers has no key 'mae_vitz' \(nearest: mae_vit"),
        ("sustained_tflops: 0", r"sustained_tflops must be a positive number, got 0"),
        ("- 1", r"cluster.yaml holds no fields; write `field: value`"),
        ("runs: [", r"cannot be read"),
        ("runs: ''", r"runs must be a folder, got an empty string"),
        ("runs: ${nothing}", r"cannot be read: Interpolation key 'nothing' not found full_key: runs; fix that line"),
        (
            "datasets: {k400: /data}",
            r"datasets.k400 must be a section with the keys root, train, val, test, got '/data'",
        ),
        ("datasets: {k400: null}", r"datasets.k400 must be a section with the keys root, .*, got null"),
        ("datasets: {k400: {root: [a]}}", r"datasets.k400.root must be a string, got \['a'\]"),
        ("slurm: {environment: [A=1]}", r"slurm.environment must be a mapping, got \['A=1'\]"),
        ("slurm: {options: [a]}", r"slurm.options must be a mapping, got \['a'\]"),
        ("slurm: [a]", r"slurm must be a section with the keys .*, got \['a'\]"),
        ("datasets: [k400]", r"datasets must be a mapping, got \['k400'\]"),
        ("datasets: {1: {root: /x}}", r"the keys of datasets must be strings, got 1; quote it"),
        ("teachers: {mae_vitb: [a]}", r"teachers.mae_vitb must be a string, got \['a'\]"),
        ("slurm: {time_limit_hours: .inf}", r"slurm.time_limit_hours must be a finite number, got inf"),
        ("slurm: {options: {gres: [gpu]}}", r"slurm.options.gres must be a string, .*, got \['gpu'\]"),
    ],
)
def test_a_wrong_profile_is_refused(text, message, write_profile):
    with pytest.raises(ConfigError, match=message) as caught:
        load_cluster(write_profile(text), [])
    assert "\n" not in str(caught.value)


def test_a_missing_profile_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no cluster profile"):
        load_cluster(str(tmp_path / "none.yaml"), [])


def example_fields(settings_type: type, content: object, section: str = "") -> dict[str, object]:
    """Dotted key -> value of every field in a part of the example; fails unless it has exactly the type's fields."""
    assert isinstance(content, dict)
    hints = get_type_hints(settings_type)
    assert content.keys() == hints.keys(), f"{section or 'the example'} must have exactly the fields of {settings_type}"
    found: dict[str, object] = {}
    for key, value in content.items():
        inner = {f"{section}{key}": value}
        if dataclasses.is_dataclass(hints[key]):
            inner = example_fields(hints[key], value, f"{section}{key}.")
        found |= inner
    return found


def test_the_example_profile_has_every_field_with_its_default_and_nothing_else():
    example = ROOT / "cluster.example.yaml"
    fields = example_fields(Cluster, yaml.safe_load(example.read_text()))
    assert {
        "faults.hang_minutes",
        "pretrain.deepspeed",
        "slurm.options",
        "workers",
        "test.micro_batch",
    } <= fields.keys()
    cluster = load_cluster(str(example), [])
    for key, value in fields.items():
        if key not in ("datasets", "teachers", "runs"):
            assert attrgetter(key)(cluster) == attrgetter(key)(Cluster()) == value, key
    datasets = fields["datasets"]
    assert isinstance(datasets, dict) and datasets.keys() == {name for name in DATASETS if not DATASETS[name].generated}
    paths = {field.name for field in dataclasses.fields(DatasetPaths)}
    assert set().union(*datasets.values()) == paths and all("root" in given for given in datasets.values())
    assert fields["teachers"].keys() == {
        node for row in all_rows.rows for node in (row.image_teacher.name, row.video_teacher.name)
    }


def test_the_example_profile_explains_every_field():
    text = (ROOT / "cluster.example.yaml").read_text()
    for name in Cluster.__dataclass_fields__:
        assert re.search(rf"^{name}:", text, re.MULTILINE)
    for section in (Faults, PretrainResources, Slurm):
        for field in dataclasses.fields(section):
            assert re.search(rf"^#   {field.name}  +[^ ]", text, re.MULTILINE), field.name


def test_the_example_profile_is_in_the_launcher_s_package_too():
    assert EXAMPLE == ROOT / "cluster.example.yaml" and EXAMPLE.samefile(ROOT / "launch" / "cluster.example.yaml")


@pytest.mark.parametrize("runs", ["out/%j", "50%", "a\\\\b"])
def test_a_runs_path_that_sbatch_would_expand_is_refused(runs, write_profile):
    with pytest.raises(
        ConfigError, match=r"runs: the path must not contain [%\\\\], .*paths of logs.*; use another folder"
    ):
        load_cluster(write_profile(f"runs: '{runs}'"), [])
