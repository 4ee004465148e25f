"""The Python example of docs/own_videos.md works as printed, for other sizes and numbers of classes too."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvd.config import Dataset
from mvd.evaluation import test_views as cut_views
from mvd.export import export
from mvd.models import build_classifier
from mvd.models.checkpoints import to_official
from tests.runs import small_stage, write_stage

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_videos.md"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "classes"), [("tiny", 3), ("small", 400)])
def test_the_example_classifies_a_video(size, classes, tmp_path, monkeypatch, real_videos, capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (example,) = [text for text in examples if "read_protocol" in text]
    facts = Dataset(classes=classes, train_samples=100, test_clips=1)
    stage = small_stage("finetune", "finetune-a", tmp_path, tmp_path, size=size, dataset="mine", own_dataset=facts)
    (tmp_path / "manifest.json").write_text('{"classes": {"run": 0, "sit": 1, "jump": 2}}')
    model = build_classifier(size, num_classes=classes).eval()
    torch.nn.init.normal_(model.head.weight)
    write_stage(stage)
    save_file(to_official(model), stage.files.weights)
    export(stage.directory, "timm", tmp_path / "mine-timm")
    shutil.copy(real_videos["bikes"], tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    done: dict = {}
    exec(compile(example, str(PAGE), "exec"), done)
    printed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    names = ["run", "sit", "jump"] if classes == 3 else [f"class {number}" for number in range(classes)]
    with torch.inference_mode():
        views = cut_views("video.mp4", "dense", 1, 3, stride=1, clip=done["protocol"].clip)
        expected = model(views).softmax(dim=1).mean(dim=0).argsort(descending=True)[:5]
    assert printed == [names[number] for number in expected]
