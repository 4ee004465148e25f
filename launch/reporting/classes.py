"""The parts of the report's page that are computed from a test's saved logits: classes, confusions, mistakes."""

import html
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.reporting import figures
from launch.reporting.markup import table
from launch.reporting.results import attempt
from mvd.evaluation.predictions import Predictions, read_predictions
from mvd.evaluation.statistics import class_accuracies, confused_pairs
from mvd.run_directory import RunDirectory
from mvd.stage import Stage

MOST_CELLS = 20  # classes up to which the matrix is a table with numbers and names; above, a picture
MOST_PAIRS = 15
MOST_MISTAKES = 20


def class_sections(files: RunDirectory, problems: list[str]) -> str:
    """Accuracy per class, confusion matrix, most confused pairs and surest mistakes of a finished test."""
    stage = attempt(partial(Stage.from_yaml, files.stage), problems)
    found = attempt(partial(read_predictions, stage), problems) if stage else None
    if stage is None or found is None:
        return ""
    if found.note:
        problems.append(found.note)
    root = stage.execution.data.root if stage.execution.data else ""
    return _classes(found) + _matrix(found) + _pairs(found) + _mistakes(found, root)


def _classes(found: Predictions) -> str:
    matrix, totals = found.matrix, found.matrix.sum(axis=1)
    accuracies = class_accuracies(matrix)
    errors = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    lines = []
    for number in np.argsort(np.nan_to_num(accuracies, nan=101.0), kind="stable").tolist():
        share, rival = accuracies[number], int(errors[number].argmax())
        confused = f"{found.names[rival]} ({errors[number, rival]})" if errors[number, rival] else "-"
        known = totals[number] > 0
        bar = f'<div class="bar"><div style="width: {share:.1f}%"></div></div>' if known else "no videos"
        figure = f"{share:.1f}" if known else "-"
        lines.append([html.escape(found.names[number]), bar, figure, str(totals[number]), html.escape(confused)])
    columns = ["class", "", "top-1 %>", "videos>", "most often taken for"]
    return f"<h3>Accuracy per class, lowest first</h3>{table(columns, lines, 'long')}"


def _matrix(found: Predictions) -> str:
    if len(found.names) > MOST_CELLS:
        return f"<h3>Confusion matrix</h3>{figures.confusion_picture(found.matrix)}"
    matrix, names = found.matrix, [html.escape(name) for name in found.names]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th class="n">{name}</th>' for name in names)
    body = "".join(f"<tr><th>{name}</th>{_cells(matrix[n], shares[n])}</tr>" for n, name in enumerate(names))
    return (
        "<h3>Confusion matrix</h3><p>Rows are true classes, columns predicted ones; numbers are videos.</p>"
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _cells(videos: NDArray[np.int64], shares: NDArray[np.float64]) -> str:
    return "".join(
        f'<td style="background: rgba(37, 99, 235, {share**0.5:.2f}); color: {"#fff" if share > 0.35 else "#1e293b"}">'
        f"{count or ''}</td>"
        for count, share in zip(videos.tolist(), shares.tolist(), strict=True)
    )


def _pairs(found: Predictions) -> str:
    lines = [
        [html.escape(found.names[pair.label]), html.escape(found.names[pair.predicted]), str(pair.videos)]
        for pair in confused_pairs(found.matrix, MOST_PAIRS)
    ]
    return f"<h3>Most confused classes</h3>{table(['true class', 'predicted as', 'videos>'], lines)}" if lines else ""


def _mistakes(found: Predictions, root: str) -> str:
    lines = [
        [
            html.escape(_shown(found.videos[index], root)),
            html.escape(found.names[found.labels[index]]),
            html.escape(found.names[found.predicted[index]]),
            f"{100 * found.confidence[index]:.1f}",
        ]
        for index in found.surest_mistakes(MOST_MISTAKES)
    ]
    columns = ["video#", "true class", "predicted as", "probability %>"]
    return f"<h3>Surest mistakes</h3>{table(columns, lines)}" if lines else ""


def _shown(video: str, root: str) -> str:
    """The path relative to the data set's folder, if it is in it."""
    inside = root and Path(video).is_relative_to(root)
    return os.path.relpath(video, root) if inside else video
