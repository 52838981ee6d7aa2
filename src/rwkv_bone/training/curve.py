"""The loss curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rwkv_bone.report.series import smoothed


def draw_loss(path: Path, records: list[dict], measured: Sequence[dict]) -> None:
    """Write the loss curve as a PNG to `path`: the loss of each step, its moving average, and every held-out loss.

    records: lines of the log; measured: lines of measurements.jsonl, of which the best one is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    records = [record for record in records if record["loss"] is not None]
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="moving average")
    for line in heldout_lines(measured):
        axes.plot(line.pop("steps"), line.pop("losses"), **line)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


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
        label = f"{name} (what it may forget)" if general else f"held-out: {name}" if name != "heldout" else "held-out"
        steps, losses = zip(*points, strict=True) if points else ((), ())
        lines.append({"steps": steps, "losses": losses, "marker": "o", "markersize": 4, "label": label, **look})
    best = [one for one in measured if one["best"]]
    if best:
        step, loss = best[-1]["step"], best[-1]["sets"][best[-1]["main"]]["loss"]
        star = {"marker": "*", "markersize": 14, "linestyle": "", "color": "tab:red"}
        lines.append({"steps": [step], "losses": [loss], "label": f"best, step {step}", **star})
    return lines
