"""The curves of a page, of one run or of several in the same axes, as page.js draws them.

A chart is {id, title, unit, log, note, series}; a series {name, kind, color, x, y}, with steps x in ascending order and
null for a y that is no finite number. kind: faint, line, points (joined by a line), or mark (one point).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rwkv_bone.console import counted
from rwkv_bone.report.run import Run
from rwkv_bone.report.series import POINTS, ends, extremes, smoothed, span

COLORS = 7  # --c0 to --c6 in page.css
# Column of the log -> (title, unit) of its chart.
OTHERS = {
    "lr": ("Learning rate", "before a parameter's own multiple"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Speed", "tokens per second, of all devices"),
    "peak_memory_mb": ("Peak memory", "MiB, so far, of the main process"),
}
NAMES = {"peak_memory_mb": "in use", "peak_reserved_mb": "reserved by PyTorch"}


def charts_of(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The loss and the columns of OTHERS. labels: of the runs, as legends name them; one run needs none."""
    most = max(POINTS // len(runs), 40)
    alone = len(runs) == 1
    charts = [_loss(runs, labels, most)]
    for column, (title, unit) in OTHERS.items():
        series = []
        for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
            series.append(_line(run, column, NAMES.get(column, title.lower()) if alone else label, number, most))
        if column == "peak_memory_mb" and alone:
            series.append(_line(runs[0], "peak_reserved_mb", NAMES["peak_reserved_mb"], 1, most))
        charts.append({"id": column, "title": title, "unit": unit, "log": False, "series": series, "note": ""})
    for chart in charts:
        chart["series"] = [one for one in chart["series"] if one and one["x"]]
        chart["note"] = chart["note"] or _note(runs, most)
    return [chart for chart in charts if chart["series"]]


def _loss(runs: Sequence[Run], labels: Sequence[str], most: int) -> dict[str, Any]:
    alone, series, skipped = len(runs) == 1, [], 0
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if alone:
            series.append(_line(run, "loss", "each step", 0, most, kind="faint"))
        series.append(_average(run, "moving average" if alone else f"{label}, training", number, most, alone))
        for place, name in enumerate(dict.fromkeys(name for one in run.measurements for name in one.sets), start=1):
            if not alone and name != run.main:
                continue  # the table has these
            losses = np.array(run.losses(name)).reshape(-1, 2)
            kept = extremes(losses[:, 1], span(len(losses), most))
            color = place if alone else number
            series.append(_series(name if alone else f"{label}, {name}", "points", color, *losses[kept].T))
        if alone and (best := run.best()):
            series.append(_series("best", "mark", 1, [best[0]], [best[1]]))
        skipped += int(np.count_nonzero(~np.isfinite(run.columns.get("loss", np.zeros(0)))))
    note = _note(runs, most) if alone else "Training loss is drawn as its moving average, over a twentieth of a run."
    if skipped:
        note += f" Not drawn: {counted(skipped, 'step')} with a loss that is no finite number."
    return {
        "id": "loss",
        "title": "Loss",
        "unit": "nats per trained token",
        "log": True,
        "series": series,
        "note": note,
    }


def _line(run: Run, column: str, name: str, color: int, most: int, kind: str = "line") -> dict[str, Any] | None:
    """A column of the log; None if the log has no number there."""
    values = run.columns.get(column, np.zeros(0))
    if not np.isfinite(values).any():
        return None
    kept = extremes(values, span(len(values), most))
    return _series(name, kind, color, run.steps[kept], values[kept])


def _average(run: Run, name: str, color: int, most: int, alone: bool) -> dict[str, Any] | None:
    values = run.columns.get("loss", np.zeros(0))
    finite = np.isfinite(values)
    if not finite.any():
        return None
    steps, average = run.steps[finite], smoothed(values[finite].tolist())
    kept = ends(len(average), span(len(average), most))
    return _series(name, "line" if alone else "faint", color, steps[kept], [float(f"{average[i]:.6g}") for i in kept])


def _series(name: str, kind: str, color: int, x: Iterable[float], y: Iterable[float]) -> dict[str, Any]:
    values = [float(value) if math.isfinite(value) else None for value in y]
    return {"name": name, "kind": kind, "color": color % COLORS, "x": [int(step) for step in x], "y": values}


def _note(runs: Iterable[Run], most: int) -> str:
    """How many steps a point stands for, in words."""
    width = max(span(len(run.steps), most) for run in runs)
    if width == 1:
        return "Each point is one step."
    return (
        f"Of every {width:,} steps the lowest and the highest are drawn: no outlier is lost. "
        "A moving average is that of the last of them."
    )


def rows_of(run: Run, column: str, most: int = 20) -> list[list[float]]:
    """[first step, last step, mean, lowest, highest] of at most `most` stretches of the log, equally long."""
    values, steps = run.columns.get(column, np.zeros(0)), run.steps
    found = []
    for part in np.array_split(np.arange(len(values)), min(most, len(values)) or 1):
        finite = values[part][np.isfinite(values[part])]
        if len(finite):
            found.append([steps[part[0]], steps[part[-1]], finite.mean(), finite.min(), finite.max()])
    return found
