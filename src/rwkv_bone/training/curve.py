"""The loss curve of a run, and beside it what a run that compares answers measures of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rwkv_bone.report.run import DIVERGENCE, UNITS
from rwkv_bone.report.series import smoothed

FORGOTTEN = "(what it may forget)"
# (label of the axis, {figure: (label of its line, colour)}) of each panel of a run with --task dpo, orpo, simpo or kto.
PANELS = (
    ("accuracy (share of pairs)", {"reward_accuracy": ("", "tab:blue")}),
    (
        "reward (dotted: held-out)",
        {
            "reward_chosen": ("chosen", "tab:green"),
            "reward_rejected": ("rejected", "tab:red"),
            "reward_margin": ("margin", "tab:blue"),
        },
    ),
    (
        "log-probability per token (dotted: held-out)",
        {"logp_chosen": ("chosen", "tab:green"), "logp_rejected": ("rejected", "tab:red")},
    ),
    ("KL estimate (nats)", {"kl": ("", "tab:blue")}),
    ("divergence from the start (nats per token)", {DIVERGENCE: ("", "tab:blue")}),
)


def draw_loss(path: Path, records: list[dict], measured: Sequence[dict]) -> None:
    """Write the loss curve as a PNG to `path`: the loss of each step, its moving average, and every held-out loss.

    records: lines of the log; measured: lines of measurements.jsonl, of which the best one is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = list(panels(records, measured))
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(12, 3.4 * rows) if columns > 1 else (8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (label, lines) in enumerate(found, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for line in lines:
            steps = line.pop("steps")
            alone = {"marker": "o"} if len(steps) == 1 else {}  # which a line does not show
            axes.plot(steps, line.pop("losses"), **(alone | line))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def panels(records: Sequence[dict], measured: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    """(label of the axis, lines) of each panel: the loss, and of answers that are compared what is measured of them."""
    held, compares = heldout_lines(measured), any(UNITS in record for record in records)
    # The loss of general text is of another kind than that of a task that compares answers.
    general = [line for line in held if compares and line["label"].endswith(FORGOTTEN)]
    steps, losses = _numbers((record["step"], record["loss"]) for record in records)
    each = {"color": "tab:blue", "alpha": 0.3, "linewidth": 0.8, "label": "each step"}
    average = {"steps": steps, "losses": smoothed(losses), "color": "tab:blue", "label": "moving average"}
    lines = [{"steps": steps, "losses": losses, **each}, average, *(line for line in held if line not in general)]
    yield "loss (mean of the step's answers)" if compares else "loss (nats per trained token)", lines
    if not compares:
        return
    for label, figures in PANELS:
        lines = [line for name, look in figures.items() for line in _figure_lines(records, measured, name, *look)]
        if lines:
            yield label, lines
    if general:
        yield "loss of general text (nats per token)", general


def _figure_lines(
    records: Sequence[dict], measured: Sequence[dict], name: str, label: str, color: str
) -> Iterator[dict]:
    """The moving average of a figure of training, and its held-out points; none of either that has no number."""
    steps, values = _numbers((record["step"], record.get(name)) for record in records)
    if steps:
        yield {"steps": steps, "losses": smoothed(values), "color": color, "label": label or "training"}
    figures = ((one["step"], one["sets"].get(one["main"], {}).get("preference") or {}) for one in measured)
    steps, values = _numbers((step, known.get(name)) for step, known in figures)
    if steps:
        look = {"color": color, "marker": "o", "markersize": 4, "linestyle": ":"}
        # Where there are several, the label of the axis tells them from training.
        yield {"steps": steps, "losses": values, "label": f"_{label}" if label else "held-out", **look}


def _numbers(points: Iterable[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Steps and values of the points that have a number."""
    known = [(step, value) for step, value in points if value is not None]
    return [step for step, _ in known], [value for _, value in known]


def heldout_lines(measured: Sequence[dict]) -> list[dict]:
    """Steps, losses and look of each line of held-out losses: the main set first, and at the end its best point."""
    lines: list[dict] = []
    for name in dict.fromkeys(name for one in measured for name in one["sets"]):
        points = [(one["step"], one["sets"][name]["loss"]) for one in measured if name in one["sets"]]
        points = [(step, loss) for step, loss in points if loss is not None]
        general = any(one["general"] == name for one in measured)
        look = {"linestyle": "--", "color": "tab:gray"} if general else {}
        if any(one["main"] == name for one in measured):
            look = {"color": "tab:orange"}
        label = f"{name} {FORGOTTEN}" if general else f"held-out: {name}" if name != "heldout" else "held-out"
        steps, losses = zip(*points, strict=True) if points else ((), ())
        lines.append({"steps": steps, "losses": losses, "marker": "o", "markersize": 4, "label": label, **look})
    best = [one for one in measured if one["best"]]
    if best:
        step, loss = best[-1]["step"], best[-1]["sets"][best[-1]["main"]]["loss"]
        star = {"marker": "*", "markersize": 14, "linestyle": "", "color": "tab:red"}
        lines.append({"steps": [step], "losses": [loss], "label": f"best, step {step}", **star})
    return lines
