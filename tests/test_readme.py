"""The README's Python example works as printed."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mvd.evaluation.views_of_file import test_views as cut_views
from mvd.models import build_classifier
from mvd.models.checkpoints import to_official

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.slow
@torch.no_grad()
def test_the_example_classifies_a_video_file(tmp_path, monkeypatch, real_videos, capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (example,) = [text for text in examples if "test_views" in text]
    model = build_classifier("small", num_classes=400).eval()
    model.head.weight.normal_()
    save_file(to_official(model), tmp_path / "vits_k400.safetensors")
    shutil.copy(real_videos["bikes"], tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    left: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), left)
    assert torch.equal(left["views"], cut_views("video.mp4", "dense", 5, 3))
    torch.testing.assert_close(left["model"](left["views"][:1]), model(left["views"][:1]))
    values, labels = left["probabilities"].topk(5)
    expected = [f"class {label}: {100 * value:.1f}%" for value, label in zip(values, labels, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected
    assert left["probabilities"].sum() == pytest.approx(1, abs=1e-5)
