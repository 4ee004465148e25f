"""`python -m mvd.predict` predicts what the test stage computed, with names."""

import csv

import numpy as np
import torch
from safetensors.torch import save_file

from mvd.evaluation.protocol import describe
from mvd.models import build_classifier
from mvd.models.checkpoints import to_official
from mvd.predict import main
from tests.runs import small_stage, write_stage


def test_a_run_and_its_weights_file_give_the_same_named_predictions(motion_root, tmp_path, capsys):
    torch.manual_seed(2)
    stage = small_stage("finetune", "finetune-a-0a1b2c3d", tmp_path, motion_root)
    write_stage(stage)
    model = build_classifier("tiny", num_classes=8)
    torch.nn.init.normal_(model.head.weight)
    save_file(to_official(model), stage.files.weights, describe(stage))
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    videos = [str(path) for path in sorted((motion_root / "val").glob("*.mp4"))[:2]]
    tables = []
    for source in (stage.directory, stage.files.weights):
        assert main([str(source), *videos, str(broken), "--csv", str(tmp_path / "out.csv")]) == 0
        assert f"unreadable: {broken}" in capsys.readouterr().err
        tables.append(list(csv.reader((tmp_path / "out.csv").open())))
    assert tables[0] == tables[1] and tables[0][0][3:5] == ["left", "right"]
    assert [np.isclose(sum(map(float, row[3:])), 1) for row in tables[0][1:3]] == [True, True]
    assert main([str(stage.directory), str(broken)]) == 1
    assert main([str(stage.directory), str(tmp_path / "none.mp4")]) == 2
