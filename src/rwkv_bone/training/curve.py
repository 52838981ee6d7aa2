"""The loss curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rwkv_bone.report.series import smoothed


def draw_loss(path: Path, records: list[dict], heldout: Sequence[tuple[int, float]]) -> None:
    """Write the loss curve as a PNG to `path`: the loss of each step, its moving average, and the held-out losses.

    records: lines of the log; heldout: (optimiser step, loss) of each measurement.
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
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o", color="tab:orange", label="held-out, before and after")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
