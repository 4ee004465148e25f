"""The pictures of the report's page, as SVG. Text that users choose, such as class names, is in the page's own tables.

Imports matplotlib, without its global state (pyplot), when a picture is drawn.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mvd.config import ConfigError
from mvd.host import python_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 500  # of a curve; the means of equal spans of updates, if there are more
PANELS: dict[str, tuple[str, ...]] = {  # title -> names of metrics, as far as a run has them
    "training loss": ("loss", "image_loss", "video_loss"),
    "accuracy, %": ("val_top1", "probe/knn_top1"),
    "learning rate": ("lr",),
}
STYLE: dict[Any, Any] = {"svg.hashsalt": "mvd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = ("#2563eb", "#ea580c", "#059669")


def check_installed() -> None:
    """Raises ConfigError, which says what to type, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--html draws with matplotlib, which is not installed; run `{python_command()} -m pip install matplotlib`"
        ) from error


def curves(records: Sequence[Mapping[str, Any]], title: str) -> str:
    """The losses, accuracies and learning rate of a training stage over its updates; "" without any."""
    found = {panel: _series(records, names) for panel, names in PANELS.items()}
    found = {panel: series for panel, series in found.items() if series}
    if not found:
        return ""
    figure = _figure(3.4 * len(found), 2.4)
    for number, (panel, series) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), number)
        for colour, (name, (x, y)) in zip(COLOURS, series.items(), strict=False):
            axes.plot(x, y, color=colour, linewidth=1.3, marker="o" if len(x) < 12 else "", markersize=3, label=name)
        axes.set_title(panel, loc="left", fontsize=9)
        axes.set_xlabel("update")
        axes.grid(alpha=0.25)
        if list(series) not in (["loss"], ["lr"]):
            axes.legend(frameon=False, fontsize=8)
    return _svg(figure, f"Curves of {title}: {', '.join(found)}")


def targets(rows: Sequence[tuple[str, float, float, Sequence[float] | None]]) -> str:
    """Target and reached top-1 of rows: (name, target, reached, 95 % interval or None) each; "" without rows."""
    if not rows:
        return ""
    figure = _figure(7.2, 0.9 + 0.32 * len(rows))
    axes = figure.add_subplot()
    for place, (_, target, reached, interval) in enumerate(rows):
        axes.plot([target, reached], [place, place], color="#cbd5e1", zorder=1)
        if interval:
            axes.plot(interval, [place, place], color=COLOURS[0], linewidth=5, alpha=0.3, solid_capstyle="butt")
    places = range(len(rows))
    axes.scatter([row[1] for row in rows], places, color="#64748b", marker="D", s=22, label="target", zorder=2)
    axes.scatter([row[2] for row in rows], places, color=COLOURS[0], s=28, label="reached, 95 % interval", zorder=3)
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("top-1, %")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _svg(figure, "Target and reached top-1 of each row")


def confusion_picture(matrix: NDArray[np.int64]) -> str:
    """The confusion matrix (classes, classes) of many classes: each row's shares in percent, by class number."""
    from matplotlib.colors import PowerNorm

    totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = _figure(6.4, 5.6)
    axes = figure.add_subplot()
    # The square root shows single confusions beside the diagonal.
    shown = axes.imshow(100 * matrix / totals, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="none")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.spines[["top", "right"]].set_visible(True)
    figure.colorbar(shown, label="% of the class's videos", shrink=0.85)
    return _svg(figure, f"Confusion matrix of {len(matrix)} classes")


def _series(
    records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    found = {}
    for name in names:
        points = [(record["update"], record[name]) for record in records if _is_point(record, name)]
        if points:
            parts = np.array_split(np.array(points, dtype=float), min(len(points), POINTS))
            means = np.array([part.mean(axis=0) for part in parts])
            found[name] = (means[:, 0], means[:, 1])
    return found


def _is_point(record: Mapping[str, Any], name: str) -> bool:
    values = (record.get("update"), record.get(name))
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure", description: str) -> str:
    """An <img> element that contains the figure, and so has ids and styles of its own."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{content}" alt="{html.escape(description)}">'
