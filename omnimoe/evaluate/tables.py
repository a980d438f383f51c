"""An evaluation as people read it: cells of a table, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omnimoe.evaluate.base import Measure, title_of
from omnimoe.report import Report

if TYPE_CHECKING:
    from omnimoe.evaluate.run import Evaluation


def number(value: float, unit: str) -> str:
    """A value without its unit, but for percent.

    Example:
        >>> number(0.345, "share"), number(5.0668, "nats/token"), number(467.83, "bits/picture")
        ('34.5 %', '5.067', '468')
    """
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.{_digits(value, unit)}f}"


def interval(measure: Measure) -> str:
    """The 95 % interval, or nothing where none is known."""
    if measure.low is None or measure.high is None:
        return ""
    if measure.unit == "share":
        return f"({100 * measure.low:.0f}-{100 * measure.high:.0f})"
    return f"± {(measure.high - measure.low) / 2:.{_digits(measure.value, measure.unit)}f}"


def _digits(value: float, unit: str) -> int:
    size = abs(value)
    return 0 if size >= 100 or unit == "clips" else 1 if size >= 10 else 3


def cell(measure: Measure | None, *, intervals: bool = True) -> str:
    """A value with its interval; a dash where nothing was measured."""
    if measure is None:
        return "–"
    told = interval(measure) if intervals else ""
    return number(measure.value, measure.unit) + (f" {told}" if told else "")


def header(evaluation: Evaluation, metric: str) -> list[str]:
    """The first line of a metric's table."""
    shown = evaluation.rows(metric)
    has_chance = any(measure.chance is not None for _, _, held in shown for measure in held.values())
    return ["", "unit", *evaluation.columns(metric), *(["chance"] if has_chance else []), "n"]


def lines(evaluation: Evaluation, metric: str, *, detail: bool = True, intervals: bool = True) -> list[list[str]]:
    """The cells of a metric's table, under those of :func:`header`."""
    has_chance = "chance" in header(evaluation, metric)
    found = []
    for name, unit, held in evaluation.rows(metric, detail=detail):
        any_of = list(held.values())
        better = next((measure.better for measure in any_of if measure.better), None)
        told = {"share": "%"}.get(unit, unit) + {"lower": " ↓", "higher": " ↑"}.get(better or "", "")
        chance = next((measure.chance for measure in any_of if measure.chance is not None), None)
        counts = sorted({measure.count for measure in any_of if measure.count is not None})
        found.append(
            [
                name,
                told.strip(),
                *(cell(held.get(column), intervals=intervals) for column in evaluation.columns(metric)),
                *(["" if chance is None else number(chance, unit)] if has_chance else []),
                "" if not counts else f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}-{counts[-1]:,}",
            ]
        )
    return found


def legend(evaluation: Evaluation) -> str:
    """What the numbers mean, in one paragraph."""
    size = evaluation.settings["num"]
    used = "all concepts" if size is None else f"at most {size} concepts, one row of each"
    return (
        f"Split {evaluation.settings['split']!r} of corpus {evaluation.environment['corpus']}, {used}. In "
        "brackets and after ±: 95 % intervals. ↓: lower is better, ↑: higher is better. chance: what guessing gives."
    )


def write_report(evaluation: Evaluation, path: Path) -> Path:
    """The whole evaluation as one page that needs nothing else."""
    report = Report(f"omnimoe eval: {', '.join(evaluation.models)}")
    report.text(legend(evaluation))
    report.table(["model", "parameters"], [[name, f"{size:,}"] for name, size in evaluation.models.items()])
    for metric in evaluation.measures:
        report.heading(metric)
        report.text(f"{title_of(metric)}.")
        report.table(header(evaluation, metric), lines(evaluation, metric))
        for note in evaluation.notes[metric]:
            report.text(note, quiet=True)
        for file, caption in evaluation.sheets[metric]:
            report.text(caption)
            report.picture(file, caption)
        for file, caption in evaluation.sounds[metric]:
            report.sound(file, caption)
    if evaluation.not_run:
        report.heading("Not run")
        report.table(["metric", "why"], [list(pair) for pair in evaluation.not_run.items()])
    report.heading("How it was measured")
    told = {**evaluation.environment, **evaluation.settings}
    report.table(["", ""], [[name, str(value)] for name, value in told.items()])
    return report.write(path)
