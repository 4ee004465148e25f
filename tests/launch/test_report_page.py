"""The report's page, parsed; the run directories are made. docs/results.md has a picture of it in a browser."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from experiments.demo import rows as demo
from experiments.ssv2 import rows as ssv2
from experiments.vitb_from_vitb_k400 import row as k400
from launch import report
from launch.reporting import figures, page
from launch.reporting.classes import class_sections
from mvd.config import ConfigError
from mvd.evaluation.predictions import read_predictions
from tests.launch.finished_runs import finish

VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Elements, ids and texts of a page; fails on elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(self.text)


@pytest.fixture
def written(profile, tmp_path, capsys):
    """Writes the page of rows with report.py and parses it; also what the command printed, and its exit code."""

    def write(*words):
        code = report.main([*words, "--html", str(tmp_path / "report.html")])
        return Parsed((tmp_path / "report.html").read_text()), capsys.readouterr(), code

    return write


def test_a_page_has_all_parts_and_loads_nothing(written, tmp_path):
    finish(demo[0], tmp_path, videos=80)
    found, printed, code = written("demo")
    assert code == 0 and "report.html: open it in any browser" in printed.out
    assert {"accuracy", "row-demo", "curves-demo"} <= set(found.ids) and len(found.ids) == len(set(found.ids))
    for part in ("Curves", "Cost", "Accuracy per class", "Confusion matrix", "Surest mistakes", "Provenance"):
        assert part in found.words
    assert "70.0 / - (floor)" in found.words and "75.0 / 95.0" in found.words and "+5.0" in found.words
    assert "8 x NVIDIA H200" in found.words and "12.5 GPU-hours in all" in found.words and "ab" * 32 in found.words
    assert "312 TFLOP/s a GPU (MFU 32 %)" in found.words and "finetune 312 TFLOP/s a GPU" in printed.out
    assert "counterclockwise" in found.words and "val/00003.mp4" in found.words
    # The teachers' curves are shown again in the row of the smaller student.
    assert "script" not in found.tags and "link" not in found.tags
    loaded = [value for name, value in found.attributes if name in ("src", "href")]
    assert len(loaded) == 5 + 2 and all(value.startswith("data:image/svg+xml;base64,") for value in loaded)


@pytest.mark.parametrize(("row", "classes"), [(k400, 400), (ssv2[0], 174)])
def test_many_classes_become_a_picture_and_a_list_that_scrolls(written, tmp_path, row, classes):
    finish(row, tmp_path, videos=2 * classes)
    found, _, _ = written(row.name)
    assert sum(value == "bar" for name, value in found.attributes if name == "class") == classes
    assert ("alt", f"Confusion matrix of {classes} classes") in found.attributes
    assert ("class", "matrix") not in found.attributes and ("class", "long") in found.attributes


def test_classes_are_listed_lowest_first_with_what_they_were_taken_for(tmp_path):
    test = finish(demo[0], tmp_path, videos=6)["test"]  # none of the last two of eight classes
    names, listed = read_predictions(test).names, class_sections(test.files, []).partition("</table>")[0]
    lines = [re.findall(r"<td.*?>(.*?)</td>", line) for line in listed.split("<tr>")[2:]]
    assert [line[0] for line in lines] == [names[number] for number in (3, 0, 1, 2, 4, 5, 6, 7)]
    assert [line[2:] for line in lines] == [
        ["0.0", "1", f"{names[4]} (1)"],
        *[["100.0", "1", "-"]] * 5,
        *[["-", "0", "-"]] * 2,
    ]


def test_a_loss_that_is_not_finite_is_no_point_of_a_curve():
    assert figures.curves([{"update": 1, "loss": float("nan")}, {"update": 2, "loss": float("inf")}], "stage") == ""


def test_names_are_text_not_markup(written, tmp_path):
    test = finish(demo[0], tmp_path, videos=16)["test"]
    test.files.write_class_names(["<b>left</b>", "a & b", *"cdefgh"])
    found, _, _ = written("demo")
    assert "b" not in found.tags and "<b>left</b>" in found.words and "a & b" in found.words


def test_several_seeds_and_differences_are_in_the_page(written, tmp_path):
    changed = replace(demo[0], finetune=replace(demo[0].finetune, stride=2))
    for seed, top1 in enumerate((70.0, 74.0, 78.0)):
        finish(replace(changed, finetune=replace(changed.finetune, seed=seed)), tmp_path, videos=8, top1=top1)
    finish(replace(changed, test=replace(changed.test, clips=3)), tmp_path, videos=8, top1=10.0)  # no other seed
    found, printed, _ = written("demo", "finetune.stride=2")
    expected = "3 seeds (finetune.seed 0, 1, 2): top-1 74.0 +- 4.0 %"
    assert expected in printed.out and "3 (finetune.seed 0, 1, 2): 74.0 +- 4.0" in found.words
    assert "1 field differs from the row demo of experiments/: finetune.stride 1 -> 2" in found.words


def test_what_is_damaged_is_named_and_the_rest_is_shown(written, tmp_path):
    stages = finish(demo[0], tmp_path, videos=16)
    with stages["finetune"].files.metrics.open("a") as handle:
        handle.write("\x00\x00\n{}\n")
    stages["pretrain"].files.result.write_text("{")
    stages["image_teacher"].files.provenance.write_text("[]")
    stages["test"].files.logits(1).write_bytes(b"PK\x03\x04")
    found, printed, code = written("demo")
    sentences = ("metrics.jsonl: 1 line of 33", "pretrain", "provenance.json is damaged", "rank-0001.npz is damaged")
    assert code == 2
    for sentence in sentences:
        assert sentence in found.words and sentence in printed.err
    assert len(printed.err.splitlines()) == 4
    assert "75.0 / 95.0" in printed.out and "Provenance" in found.words and "Curves" in found.words


def test_a_test_without_logits_has_its_accuracy_only(written, tmp_path):
    test = finish(demo[0], tmp_path, videos=16)["test"]
    for path in test.files.path.glob("logits/*"):
        path.unlink()
    found, printed, _ = written("demo")
    assert "has no logits; details of single videos need them" in printed.err
    assert "75.0 / 95.0" in found.words and "Surest mistakes" not in found.words


def test_a_row_that_is_not_started_is_a_line(written):
    found, _, code = written("vith_k400")
    assert code == 0 and "not finished" in found.words


def test_the_logits_of_the_fixture_have_its_accuracy(tmp_path):
    found = read_predictions(finish(demo[0], tmp_path, videos=80)["test"])
    assert (found.predicted == found.labels).mean() == 0.75


def test_a_page_that_cannot_be_written_is_one_sentence(profile, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    for words, message in (
        ([], "no TARGET given"),
        (["demo", "--html", "report.pdf"], "must be a file that ends in .html"),
        (["demo", "--html", str(tmp_path / "none" / "r.html")], "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            report.main(words or ["--html", "report.html"])
    monkeypatch.setattr(page, "write_text", full)
    with pytest.raises(ConfigError, match=r"r\.html cannot be written: No space left on device"):
        report.main(["demo", "--html", str(tmp_path / "r.html")])


def test_missing_matplotlib_is_one_sentence_with_the_command(profile, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="not installed; run `.*python.* -m pip install matplotlib`"):
        report.main(["demo", "--html", str(tmp_path / "r.html")])
