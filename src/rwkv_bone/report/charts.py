"""The curves of a page, of one run or of several in the same axes, as page.js draws them.

A chart is {id, title, unit, log, note, series}; a series {name, kind, color, x, y}, with steps x in ascending order and
null for a y that is no finite number. kind: faint, line, points (joined by a line), or mark (one point).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_bone.console import counted
from rwkv_bone.report.run import DIVERGENCE, GAP, Run
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
AVERAGED = "Training is drawn as its moving average, over a twentieth of a run."


class Preference(NamedTuple):
    """A chart of what was measured of answers that are compared. columns: {column: which answers it is of}."""

    title: str
    unit: str
    columns: dict[str, str]


ANSWERS = {"chosen": (2, 2), "rejected": (4, 4)}  # colours of training and held-out data
PREFERENCES = {
    "accuracy": Preference("Accuracy", "share of pairs with the chosen answer's reward above", {"reward_accuracy": ""}),
    "margin": Preference("Margin", "reward of chosen answers minus that of rejected", {"reward_margin": ""}),
    "rewards": Preference("Rewards", "mean", {"reward_chosen": "chosen", "reward_rejected": "rejected"}),
    "logp": Preference(
        "Log-probability", "nats per token of the answers", {"logp_chosen": "chosen", "logp_rejected": "rejected"}
    ),
    GAP: Preference("Gap", "log-probability of chosen minus rejected answers, nats per token", {GAP: ""}),
    DIVERGENCE: Preference("Divergence from the start", "nats per token of held-out chosen answers", {DIVERGENCE: ""}),
    "nll": Preference("Loss of the chosen answers", "nats per token", {"nll": ""}),
    "kl": Preference("KL estimate of kto", "nats per answer, from prompts with answers of others", {"kl": ""}),
}
BESIDE = ("rewards", "logp")  # of one run alone: of several, GAP says it in a line each
Entry = tuple[Run, str, int]  # a run, its label, its colour


def charts_of(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Losses, what was measured of preferences, and the columns of OTHERS.

    labels: of the runs, as legends name them; one run needs none. Losses of different tasks are charts of their own.
    """
    most = max(POINTS // len(runs), 40)
    alone = len(runs) == 1
    entries: list[Entry] = list(zip(runs, labels, range(len(runs)), strict=True))
    tasks = list(dict.fromkeys(run.task for run in runs))
    charts = []
    for task in tasks:
        chart = _loss([one for one in entries if one[0].task == task], most, alone)
        charts.append(chart if len(tasks) == 1 else chart | {"id": f"loss-{task}", "title": f"Loss of {task}"})
    comparing = [one for one in entries if one[0].compares]
    if comparing:
        left_out = (GAP,) if alone else BESIDE
        charts += [_preference(comparing, name, most, alone) for name in PREFERENCES if name not in left_out]
        charts.append(_general(entries, most, alone))
    for column, (title, unit) in OTHERS.items():
        series = [
            _line(run, column, NAMES.get(column, title.lower()) if alone else label, number, most)
            for run, label, number in entries
        ]
        if column == "peak_memory_mb" and alone:
            series.append(_line(runs[0], "peak_reserved_mb", NAMES["peak_reserved_mb"], 1, most))
        charts.append({"id": column, "title": title, "unit": unit, "log": False, "series": series, "note": ""})
    for chart in charts:
        chart["series"] = [one for one in chart["series"] if one and one["x"]]
        chart["note"] = chart["note"] or _note(runs, most)
    return [chart for chart in charts if chart["series"]]


def unit_of(run: Run) -> str:
    """What the losses of a run are."""
    return f"mean of the {run.unit}s" if run.compares else "nats per trained token"


def _loss(entries: Sequence[Entry], most: int, alone: bool) -> dict[str, Any]:
    """The losses of runs of one task."""
    series, skipped, runs = [], 0, [run for run, _, _ in entries]
    for run, label, number in entries:
        if alone:
            series.append(_line(run, "loss", "each step", 0, most, kind="faint"))
        series.append(_average(run, "loss", "moving average" if alone else f"{label}, training", number, most, alone))
        for place, name in enumerate(run.sets, start=1):
            if (not alone and name != run.main) or (run.compares and name == run.general):
                continue  # the table has these; the loss of general text is of another kind
            color = place if alone else number
            series.append(_points(run.losses(name), name if alone else f"{label}, {name}", color, most))
        if alone and (best := run.best()):
            series.append(_series("best", "mark", 1, [best[0]], [best[1]]))
        skipped += int(np.count_nonzero(~np.isfinite(run.column("loss"))))
    note = _note(runs, most) if alone else AVERAGED
    if skipped:
        note += f" Not drawn: {counted(skipped, 'step')} with a loss that is no finite number."
    unit = unit_of(runs[0])
    return {"id": "loss", "title": "Loss", "unit": unit, "log": True, "series": series, "note": note}


def _preference(entries: Sequence[Entry], name: str, most: int, alone: bool) -> dict[str, Any]:
    """Training beside held-out data."""
    chart, series = PREFERENCES[name], []
    for run, label, number in entries:
        for column, line in chart.columns.items():
            # Of a run alone, two lines have a colour each, and a single one has those of the loss.
            of, colors = f"{line}, " if line else "", ANSWERS.get(line, (0, 1))
            if not alone:
                of, colors = f"{label}, ", (number, number)
            series.append(_average(run, column, f"{of}training", colors[0], most, alone))
            series.append(_points(run.figures(column), f"{of}held-out", colors[1], most))
    note = AVERAGED if name != DIVERGENCE else "Measured on held-out data alone."
    return {"id": name, "title": chart.title, "unit": chart.unit, "log": False, "series": series, "note": note}


def _general(entries: Sequence[Entry], most: int, alone: bool) -> dict[str, Any]:
    series = [
        _points(run.losses(run.general), run.general if alone else label, number, most)
        for run, label, number in entries
    ]
    note = "What the model may forget."
    unit = "loss in nats per token"
    return {"id": "general", "title": "General text", "unit": unit, "log": False, "series": series, "note": note}


def _line(run: Run, column: str, name: str, color: int, most: int, kind: str = "line") -> dict[str, Any] | None:
    """A column of the log; None if the log has no number there."""
    values = run.column(column)
    if not np.isfinite(values).any():
        return None
    kept = extremes(values, span(len(values), most))
    return _series(name, kind, color, run.steps[kept], values[kept])


def _average(run: Run, column: str, name: str, color: int, most: int, alone: bool) -> dict[str, Any] | None:
    values = run.column(column)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    steps, average = run.steps[finite], smoothed(values[finite].tolist())
    kept = ends(len(average), span(len(average), most))
    return _series(name, "line" if alone else "faint", color, steps[kept], [float(f"{average[i]:.6g}") for i in kept])


def _points(measured: Sequence[tuple[int, float]], name: str, color: int, most: int) -> dict[str, Any]:
    """A point for each of these (step, value)."""
    table = np.array(measured).reshape(-1, 2)
    return _series(name, "points", color, *table[extremes(table[:, 1], span(len(table), most))].T)


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
    values, steps = run.column(column), run.steps
    found = []
    for part in np.array_split(np.arange(len(values)), min(most, len(values)) or 1):
        finite = values[part][np.isfinite(values[part])]
        if len(finite):
            found.append([steps[part[0]], steps[part[-1]], finite.mean(), finite.min(), finite.max()])
    return found
