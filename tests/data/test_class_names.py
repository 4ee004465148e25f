"""The class names of a data set that mvd.data.prepare wrote."""

import json

import pytest

from experiments.demo import rows
from mvd.config import Dataset, DatasetPaths
from mvd.data.class_names import class_names_of


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"walk": 1, "run": 0, "jump": 2}, ["run", "walk", "jump"]),
        ({"1": 0, "10": 1, "2": 2}, ["1", "10", "2"]),  # folders, which are numbered in their alphabetical order
        ({"0": 0, "1": 1, "2": 2}, None),  # of lists with class numbers
        ({"a": 0, "b": 2, "c": 3}, None),
    ],
)
def test_the_names_of_the_manifest(numbers, expected, tmp_path, monkeypatch):
    record = Dataset(classes=3, train_samples=3)
    monkeypatch.setattr("mvd.data.class_names.dataset_of", lambda _: record)
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": numbers}))
    assert class_names_of(rows[0].finetune, DatasetPaths(root=str(tmp_path))) == expected
