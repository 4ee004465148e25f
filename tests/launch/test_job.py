"""What a process of a job says of its end."""

import errno
import json

import pytest

from launch.job.stage_job import ErrorNote, run
from mvd import run as run_module


def test_a_full_disk_is_one_sentence_and_another_attempt_is_made(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/metrics.jsonl")

    monkeypatch.setattr(run_module, "run_stage", full)
    with pytest.raises(SystemExit) as left:
        run(None, ErrorNote(tmp_path / "error.json", rank=0))
    said = "error: /runs/metrics.jsonl: No space left on device; mend that, then submit the row again"
    assert left.value.code == 2 and said in capsys.readouterr().out
    note = json.loads((tmp_path / "error.json").read_text())
    assert note["lines"] == said and not note["final"]


def test_a_note_that_cannot_be_written_is_no_further_error(tmp_path, capsys):
    ErrorNote(tmp_path / "missing" / "error.json", rank=0).write("error: no matter")
    assert "cannot be written" in capsys.readouterr().out
