"""The report as one HTML page, which contains its pictures and styles and loads nothing."""

import html
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from launch.plan.differences import target_text
from launch.reporting import figures
from launch.reporting.classes import class_sections
from launch.reporting.goodput import COLUMNS as GOODPUT
from launch.reporting.goodput import goodput_lines
from launch.reporting.markup import table
from launch.reporting.results import RowResult, StageResult, attempt, metrics_of, seeds_text, spread
from launch.stage_state import duration
from mvd.config import ConfigError
from mvd.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { margin-top: 3rem; border-bottom: 2px solid #e2e8f0 } h3 { margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e2e8f0; vertical-align: top }
th { font-weight: 600; background: #f8fafc } td.n, th.n { text-align: right } td.n { white-space: nowrap }
td.id { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
img { max-width: 100%; height: auto; display: block } .note { background: #fef3c7; padding: .4rem .8rem }
.wide { overflow-x: auto } .long { max-height: 32rem; overflow-y: auto; border: 1px solid #e2e8f0 }
.long th { position: sticky; top: 0 } .bar { background: #e2e8f0; width: 14rem; height: .8rem; margin-top: .35rem }
.bar div { background: #2563eb; height: 100% }
.matrix td { text-align: right; min-width: 2.2rem; border: 1px solid #fff }
pre { background: #f8fafc; padding: .8rem; overflow-x: auto; font-size: 13px } figure { margin: 1rem 0 }
"""


def write_page(path: Path, results: Sequence[RowResult]) -> None:
    """Writes the page.

    Files that cannot be read are named in the page, and added to the problems of their row.

    Raises:
        ConfigError: matplotlib is missing, or the page cannot be written.
    """
    figures.check_installed()
    page = build_page(results)
    try:
        write_text(path, page)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; choose another file") from error


def build_page(results: Sequence[RowResult]) -> str:
    """The page's HTML."""
    title = "Results of " + ", ".join(result.row.name for result in results[:3]) + (", ..." if len(results) > 3 else "")
    body = "".join(_row(result) for result in results)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(title)}</h1><p>Made on {made} from the run directories.</p>{_accuracies(results)}{body}"
        "</body></html>\n"
    )


def _accuracies(results: Sequence[RowResult]) -> str:
    columns = ["row", "target top-1 / top-5 %>", "reached top-1 / top-5 %>", "95 % interval of top-1>", "difference>"]
    columns += ["test videos>", "seeds", "GPU-hours>"]
    lines, pictured = [], []
    for result in results:
        found, target = result.result, result.row.target
        interval = found.get("top1_interval") if found else None
        lines.append(
            [
                html.escape(result.row.name),
                html.escape(target_text(result.row)),
                f"{found['top1']:.1f} / {found['top5']:.1f}" if found else "not finished",
                f"{interval[0]:.1f} - {interval[1]:.1f}" if interval else "-",
                f"{found['top1'] - target.top1:+.1f}" if found and target else "-",
                f"{found['videos']:,}" if found and "videos" in found else "-",
                _seeds(result),
                "-" if result.gpu_hours is None else f"{result.gpu_hours:,.1f}",
            ]
        )
        if found and target:
            pictured.append((result.row.name, target.top1, found["top1"], interval))
    return f'<section id="accuracy"><h2>Accuracy</h2>{table(columns, lines)}{figures.targets(pictured)}</section>\n'


def _seeds(result: RowResult) -> str:
    if len(result.seeds) < 2:
        return "one"
    top1, top5 = spread(result.seeds, "top1"), spread(result.seeds, "top5")
    return f"{len(result.seeds)} ({html.escape(seeds_text(result.seeds))}): {top1} / {top5}"


def _row(result: RowResult) -> str:
    problems = result.problems
    parts = [_curves(result, problems), _cost(result)]
    if result.test is not None and result.result is not None:
        parts.append(class_sections(result.test.files, problems))
    parts.append(_provenance(result, problems))
    notes = [text for text in (result.differs, *problems) if text]
    said = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    name = html.escape(result.row.name)
    return f'<section id="row-{name}"><h2>{name}</h2>{said}{"".join(parts)}</section>\n'


def _curves(result: RowResult, problems: list[str]) -> str:
    drawn = []
    for stage in result.stages:
        if stage.epochs is not None and stage.started:
            picture = figures.curves(metrics_of(stage.files, problems), stage.node.id)
            text = f"{stage.node.id}: {stage.epochs_done} of {stage.epochs} epochs"
            drawn.append(f"<figure><figcaption>{html.escape(text)}</figcaption>{picture}</figure>")
    return f'<div id="curves-{html.escape(result.row.name)}"><h3>Curves</h3>{"".join(drawn) or "<p>none yet</p>"}</div>'


def _cost(result: RowResult) -> str:
    columns = ["stage#", "wall time>", "ran on", "speed", "GPU-hours>", "finished"]
    lines = []
    for stage in result.stages:
        facts = stage.facts
        wall = duration(round(stage.result["wall_seconds"])) if stage.result and "wall_seconds" in stage.result else "-"
        hours = "-" if stage.gpu_hours is None else f"{stage.gpu_hours:,.2f}"
        date = facts.get("date") or ("yes" if stage.result else "no")
        lines.append([stage.node.id, wall, html.escape(_devices(stage)), stage.speed or "-", hours, date])
    total = (
        ""
        if result.gpu_hours is None
        else f"<p>{result.gpu_hours:,.1f} GPU-hours in all; stages on CPUs count none.</p>"
    )
    return f"<h3>Cost</h3>{table(columns, lines)}{total}{_goodput(result)}"


def _goodput(result: RowResult) -> str:
    lines = goodput_lines([result])
    said = "what part of the time of the jobs went into updates that are in the result, and what took the rest"
    return f"<p>Goodput: {said}.</p>{table(GOODPUT, lines)}" if lines else ""


def _devices(stage: StageResult) -> str:
    facts = stage.facts
    return f"{facts['processes']} x {facts['gpu'] or 'CPU process'}" if "processes" in facts else "-"


def _provenance(result: RowResult, problems: list[str]) -> str:
    columns = ["stage#", "commit#", "seed>", "SHA-256 of the weights#", "SHA-256 of the lists#"]
    lines = []
    for stage in result.stages:
        facts = stage.facts
        commit = (facts.get("commit") or "-")[:12] + (", modified" if facts.get("modified") else "")
        seed = str(getattr(stage.node.recipe, "seed", "-"))
        lists = "<br>".join(html.escape(f"{name}: {entry['sha256']}") for name, entry in facts.get("lists", {}).items())
        lines.append([stage.node.id, commit, seed, facts.get("weights_sha256") or "-", lists or "-"])
    details = "".join(_details(stage, problems) for stage in result.stages if stage.started)
    return f"<h3>Provenance</h3>{table(columns, lines)}{details}"


def _details(stage: StageResult, problems: list[str]) -> str:
    """Every setting of a stage, and the packages of its last attempt."""
    readers: dict[Path, Callable[[Path], str]] = {stage.files.provenance: _packages, stage.files.stage: _text}
    read = [attempt(partial(reader, path), problems) for path, reader in readers.items() if path.exists()]
    text = "\n".join(filter(None, read))
    return f"<details><summary>{stage.node.id}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _packages(path: Path) -> str:
    try:
        last = json.loads(path.read_text())[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last["packages"].items())
        return f"# {len(json.loads(path.read_text()))} attempts; Python {last['python']}, {versions}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged, so the packages are not shown") from error
