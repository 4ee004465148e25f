"""Writing files: whole or not at all, and in UTF-8 whatever the locale."""

import resource
import subprocess
import sys

import pytest

from mvd.files import append_text, read_json_lines


def test_a_line_for_which_there_is_no_room_leaves_nothing_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_text(path, '{"update": 1}\n')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a limit of the files' size stands for the disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            append_text(path, '{"update": 2}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_text(path, '{"update": 3}\n')
    assert path.read_text() == '{"update": 1}\n{"update": 3}\n'
    assert read_json_lines(path) == [{"update": 1}, {"update": 3}]


def test_text_is_utf8_in_every_locale(tmp_path):
    code = "import sys, pathlib, mvd.files; mvd.files.write_text(pathlib.Path(sys.argv[1]), '\\u00e9\\u5b66')"
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "text")]
    subprocess.run(command, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, check=True)
    assert (tmp_path / "text").read_text(encoding="utf-8") == "é学"
