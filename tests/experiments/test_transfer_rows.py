"""The rows of UCF101 and HMDB51."""

import pytest

from launch.plan.graph import build_graph
from launch.plan.rows import load_rows
from mvd.config import DATASETS

LISTS = {
    "ucf101": ((9537, 3783), (9586, 3734), (9624, 3696)),
    "hmdb51": ((3570, 1530),) * 3,
}


@pytest.mark.parametrize("dataset", LISTS)
def test_three_splits_share_the_pretraining_of_a_row_on_kinetics(dataset):
    rows = load_rows([dataset], [])
    assert [row.name for row in rows] == [dataset, f"{dataset}_split2", f"{dataset}_split3"]
    assert [(DATASETS[row.name].train_samples, DATASETS[row.name].val_samples) for row in rows] == [*LISTS[dataset]]
    assert all(row.finetune.dataset == row.test.dataset == row.name and row.target is None for row in rows)
    kinds = [node.kind for node in build_graph(rows)]
    assert kinds == ["pretrain", *["finetune"] * 3, *["test"] * 3]
    (source,) = load_rows(["vitb_from_vitb_k400"], [])
    assert {node.id for node in build_graph([source])} & {node.id for node in build_graph(rows)} == {
        "pretrain-vitb_from_vitb_e400-cc3d28b5"
    }


def test_the_settings_are_those_of_videomae_on_ucf101():
    finetune = load_rows(["ucf101"], [])[0].finetune
    settings = finetune.optimization
    assert (settings.global_batch, settings.epochs, settings.base_lr, settings.min_lr) == (128, 100, 5e-4, 1e-5)
    assert (settings.layer_decay, finetune.drop_path, finetune.head_dropout) == (0.7, 0.2, 0.5)
