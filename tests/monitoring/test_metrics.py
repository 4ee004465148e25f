"""metrics.jsonl, TensorBoard events and the progress lines."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mvd.distributed.process import Process
from mvd.monitoring import writers
from mvd.monitoring.metrics import Metrics, peak_memory_gb
from mvd.monitoring.progress import Progress, remaining
from mvd.run_directory import RunDirectory
from tests.runs import small_stage

FIRST = Process(rank=0, world_size=2, device=torch.device("cpu"))
SECOND = Process(rank=1, world_size=2, device=torch.device("cpu"))


def metrics_of(directory: Path, process: Process, resumed_at: int) -> Metrics:
    stage = small_stage("pretrain", directory.name, directory.parent, directory)
    return Metrics.of_stage(stage, process, resumed_at)


def updates(directory) -> list[int]:
    return [json.loads(line)["update"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def interrupted(tmp_path):
    """A run that came to update 4 and was cut off while it wrote a line."""
    metrics = metrics_of(tmp_path, FIRST, 0)
    for update in range(1, 5):
        metrics.write(update, 1, {"loss": 1.0 / update})
    metrics.write(4, 1, {"val_top1": 25.0})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"update": 5, "epo')
    return tmp_path


def test_a_resumed_run_drops_what_came_after_its_checkpoint(interrupted):
    metrics = metrics_of(interrupted, FIRST, 2)
    assert updates(interrupted) == [1, 2]
    metrics.write(3, 1, {"loss": 0.3})
    metrics.close()
    assert updates(interrupted) == [1, 2, 3]
    points = EventAccumulator(str(interrupted)).Reload()
    assert [(point.step, pytest.approx(point.value)) for point in points.Scalars("1_pretrain/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3),
    ]


@pytest.mark.parametrize("last", [Metrics.flush, Metrics.close])
def test_what_a_full_disk_did_not_take_is_written_once_there_is_room(tmp_path, monkeypatch, last):
    metrics = metrics_of(tmp_path, FIRST, 0)
    metrics.write(1, 1, {"loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(writers, "append_text", lambda *_: Path("/dev/full").write_text("x"))
        metrics.write(2, 1, {"loss": 0.5})
    assert updates(tmp_path) == [1]
    last(metrics)
    assert updates(tmp_path) == [1, 2]
    metrics.close()


def test_the_latest_numbers_survive_a_restart(interrupted):
    metrics = metrics_of(interrupted, FIRST, 4)
    assert metrics.latest() == {"update": 4, "epoch": 1, "loss": 0.25, "val_top1": 25.0}
    metrics.close()


def test_a_run_that_wrote_nothing_has_no_numbers(tmp_path):
    metrics = metrics_of(tmp_path, FIRST, 0)
    assert metrics.latest() == {}
    metrics.close()


def test_only_the_first_process_writes(tmp_path):
    metrics = metrics_of(tmp_path, SECOND, 0)
    metrics.write(1, 1, {"loss": 1.0})
    metrics.flush()
    metrics.close()
    assert metrics.latest() == {} and list(tmp_path.iterdir()) == []


def test_progress_in_a_log_file_is_whole_lines(caplog):
    caplog.set_level(logging.INFO, logger="mvd")
    progress = Progress("pretrain", 10, 4)
    progress.show(5, "epoch 1/2 loss 0.5000")
    progress.show(6, "too soon for another line")
    progress.show(10, "epoch 2/2 loss 0.2500")
    progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "pretrain" in lines[0] and "step 5/10, epoch 1/2 loss 0.5000" in lines[0] and "ETA" in lines[0]
    assert "100%" in lines[1] and "step 10/10" in lines[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(245, "04:05"), (3 * 3600 + 245, "3:04:05"), (47.5 * 3600, "47:30:00"), (6.15 * 86400, "6 d 03 h")],
)
def test_a_long_time_left_is_in_days(seconds, text):
    assert remaining(seconds) == text


def test_the_line_of_a_long_run_has_its_days_left():
    progress = Progress("pretrain", 1_000_000, 0)
    progress.bar.start_t -= 3600
    progress.bar.update(1000)
    assert "ETA 41 d" in str(progress.bar)
    progress.close()


def test_memory_is_in_gigabytes():
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 1000


def test_images_texts_and_settings_reach_tensorboard_beside_the_curves(tmp_path):
    metrics = metrics_of(tmp_path, FIRST, 0)
    metrics.write(1, 1, {"loss": 1.0, "speed/mfu": 0.4})
    metrics.image(1, "masks", np.full((8, 6, 3), 200, np.uint8))
    metrics.text(1, "note", "**bold**")
    metrics.hyperparameters({"seed": 3.0})
    metrics.write(2, 1, {"loss": 0.5})
    metrics.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    (image,) = found.Images("masks")
    assert (image.step, image.height, image.width) == (1, 8, 6)
    assert [point.step for point in found.Scalars("1_pretrain/loss")] == [1, 2]
    assert [point.step for point in found.Scalars("3_speed/mfu")] == [1]
    plugins = {name: list(found.PluginTagToContent(name)) for name in ("text", "hparams")}
    assert (
        plugins["text"] == ["1_recipe/text_summary", "3_execution/text_summary", "note/text_summary"]
        and plugins["hparams"]
    )


def test_tensorboard_gets_a_layout_and_settings_without_a_list_of_columns(tmp_path):
    """With such a list, TensorBoard would show the settings of one kind of stage only."""
    metrics_of(tmp_path, FIRST, 0).close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.PluginTagToContent("hparams")) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert list(found.PluginTagToContent("custom_scalars")) == ["custom_scalars__config__"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"mine": {"target": {"top1": 82.7, "source": "paper"}, "differs": "1 field differs: seed 0 -> 1"}}',
            "- **mine**: target top-1 82.7 % (paper); 1 field differs: seed 0 -> 1",
        ),
        ('{"demo": {"target": null, "differs": ""}}', "- **demo**: target none; no field differs"),
        ('{"demo": 3', None),
        (None, None),
    ],
)
def test_the_rows_and_their_differences_from_the_paper_are_a_text(tmp_path, content, expected):
    if content is not None:
        RunDirectory(tmp_path).rows.write_text(content)
    metrics_of(tmp_path, FIRST, 0).close()
    found = EventAccumulator(str(tmp_path)).Reload()
    tag = "2_rows/text_summary"
    texts = [found.Tensors(tag)[0].tensor_proto.string_val[0].decode()] if tag in found.Tags()["tensors"] else []
    assert texts == ([] if expected is None else [expected])


def test_every_chart_of_the_layout_has_a_curve():
    names = ["loss", "image_loss", "val_loss", "val_top1", "top1", "grad_norm", "samples_per_second", "unreadable"]
    names += ["speed/median_rank_seconds", "speed/mfu", "data_wait_share", "replaced", "probe/knn_top1"]
    tags = [writers.tag(name, kind) for name in names for kind in ("pretrain", "finetune", "image_teacher")]
    patterns = [pattern for charts in writers.LAYOUT.values() for found in charts.values() for pattern in found]
    assert [pattern for pattern in patterns if not any(re.search(pattern, tag) for tag in tags)] == []


def test_a_run_of_an_earlier_version_keeps_its_curves(tmp_path):
    earlier = SummaryWriter(str(tmp_path / "tensorboard"))
    earlier.add_scalar("1_pretrain/loss", 3.0, 1)
    earlier.close()
    metrics = metrics_of(tmp_path, FIRST, 1)
    metrics.write(2, 1, {"loss": 2.0})
    metrics.close()
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("1_pretrain/loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 3.0), (2, 2.0)]


class Flaky:
    """A writer that fails a few times at whatever it is asked to do, and keeps what it was given."""

    def __init__(self, failures: int) -> None:
        self.failures, self.opened, self.given = failures, 0, []

    def open(self) -> None:
        self.opened += 1

    def _take(self, *content: object) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        self.given.append(content)

    def scalars(self, update, epoch, values):
        self._take("scalars", update, dict(values))

    def image(self, update, name, pixels):
        self._take("image", update, name)

    def text(self, update, name, markdown):
        self._take("text", update, name)

    def hyperparameters(self, values):
        self._take("hyperparameters", dict(values))

    def flush(self): ...

    def close(self):
        self._take("close")


def test_a_writer_that_fails_is_reported_once_and_opened_again(tmp_path, caplog):
    failing, fine = Flaky(failures=3), Flaky(failures=0)
    metrics = Metrics(RunDirectory(tmp_path), [failing, fine])
    metrics.write(1, 1, {"loss": 1.0})
    metrics.image(1, "masks", np.zeros((8, 6, 3), np.uint8))
    metrics.text(1, "note", "a text")
    metrics.hyperparameters({"seed": 3})
    metrics.write(2, 1, {"loss": 0.5})
    metrics.close()
    assert failing.given == [("hyperparameters", {"seed": 3}), ("scalars", 2, {"loss": 0.5}), ("close",)]
    assert len(fine.given) == 6 and fine.opened == 1 and failing.opened == 4
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "Flaky cannot write the metrics of" in messages[0]


def test_a_writer_that_fails_at_the_end_does_not_stop_the_others(tmp_path):
    failing, fine = Flaky(failures=9), Flaky(failures=0)
    Metrics(RunDirectory(tmp_path), [failing, fine]).close()
    assert fine.given == [("close",)]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("loss", "pretrain", "1_pretrain/loss"),
        ("loss", "finetune", "1_finetune/loss"),
        ("top1", "test", "1_test/top1"),
        ("val_top1", "finetune", "2_validation/val_top1"),
        ("validation/logit_norm", "finetune", "2_validation/logit_norm"),
        ("probe/knn_top1", "pretrain", "probe/knn_top1"),
    ],
)
def test_sections_are_ordered_and_stages_of_another_kind_have_their_own(name, kind, expected):
    assert writers.tag(name, kind) == expected
