"""The pictures of docs/bone-or-lora.md, from the rows of a comparison.

python -m benchmarks.convergence.pictures [--runs benchmarks/results/convergence.jsonl] [--output docs]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.convergence import statistics as s  # noqa: E402
from benchmarks.convergence.statistics import ARMS, Arm, Row  # noqa: E402
from benchmarks.convergence.step_size import output, scale_of  # noqa: E402
from benchmarks.convergence.tables import RESULTS, change, rank_of, scaled, tasks  # noqa: E402
from rwkv_bone.config.rates import auto_rate  # noqa: E402
from rwkv_bone.config.sections import AdapterConfig  # noqa: E402

# Okabe and Ito's colours, which are told apart by colour-blind eyes too; marks tell the arms apart without any colour.
STYLES: dict[str, dict[str, str]] = {
    "Bone": {"color": "#0072B2", "marker": "o"},
    "Bat": {"color": "#56B4E9", "marker": "s"},
    "LoRA, alpha 2r": {"color": "#E69F00", "marker": "^"},
    "LoRA, alpha searched": {"color": "#E69F00", "marker": "*"},
    "rsLoRA": {"color": "#D55E00", "marker": "v"},
    "PiSSA": {"color": "#009E73", "marker": "D"},
    "every weight": {"color": "#000000", "marker": "x"},
}
DRAWN = tuple(arm for arm in ARMS if arm.name != "LoRA, alpha searched")
# Learning rates that others chose for Bone (MiSS): (width, rate). Whether a better one was near is not known.
PUBLISHED = {
    "the paper": (4096, 2e-5),
    "PEFT's benchmark": (3072, 1e-4),
    "RWKV-PEFT": (2560, 2e-5),
}


def first_seed(arm: Arm, rows: Sequence[Row]) -> list[Row]:
    """The rows of an arm's search, by rate."""
    return sorted((row for row in arm.of(rows) if row["seed"] == 0), key=lambda row: row["rate"])


def figure(columns: int, height: float = 3.6) -> tuple[Figure, Sequence[Any]]:
    made = Figure(figsize=(4.2 * columns, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.25, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def legend(made: Figure, axes: Sequence[Any]) -> None:
    """One for all, under them, of what any of them has."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    made.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(6, len(entries)), frameon=False)


def loss_by_rate(rows: Sequence[Row]) -> Figure:
    """Held-out loss at the end of a run against its learning rate, and against the output's move in the first step."""
    names = dict(tasks(rows))
    made = Figure(figsize=(4.0 * len(names), 6.6), layout="constrained")
    FigureCanvasAgg(made)
    grid = made.subplots(2, len(names), squeeze=False)
    for column, (name, mine) in enumerate(names.items()):
        upper, lower = grid[0][column], grid[1][column]
        least_of: list[float] = []
        for arm in DRAWN:
            runs = [row for row in first_seed(arm, mine) if math.isfinite(s.last(row, "heldout"))]
            if not runs:
                continue
            losses = [s.last(row, "heldout") for row in runs]
            least_of.append(min(losses))
            style = STYLES[arm.name] | {"label": arm.name, "markersize": 4.5, "linewidth": 1.4}
            upper.plot([row["rate"] for row in runs], losses, **style)
            least = min(range(len(runs)), key=lambda index: losses[index])
            upper.plot(
                runs[least]["rate"], losses[least], marker="o", markersize=11, fillstyle="none", color=style["color"]
            )
            if arm.method in ("bone", "lora", "rslora"):
                lower.plot([row["rate"] * moved(row) for row in runs], losses, **style)
        for alpha in sorted({row["alpha"] for row in mine if row["method"] == "lora"} - {2.0, None}):
            runs = [row for row in first_seed(Arm("", "lora", alpha), mine) if math.isfinite(s.last(row, "heldout"))]
            points = [row["rate"] * moved(row) for row in runs], [s.last(row, "heldout") for row in runs]
            lower.plot(*points, color="#E69F00", alpha=0.45, linewidth=1, marker=".", label="LoRA, other alpha")
        for one in (upper, lower):
            one.set(xscale="log", yscale="log")
            if least_of:
                limits(one, 0.93 * min(least_of), 1.5 * max(least_of))
            one.grid(alpha=0.25, linewidth=0.6, which="both")
            one.spines[["top", "right"]].set_visible(False)
        upper.set(title=name, xlabel="learning rate")
        lower.set(xlabel="move of an output in the first step (derived)")
        if not column:
            upper.set_ylabel("held-out loss at the end")
            lower.set_ylabel("held-out loss at the end")
    legend(made, [*grid[0], *grid[1]])
    return made


def limits(axes: Any, low: float, high: float) -> None:
    """The ends of a logarithmic axis of losses, and plain numbers along it."""
    axes.set_ylim(low, high)
    axes.minorticks_off()
    places = [low * (high / low) ** share for share in (0.07, 0.35, 0.65, 0.93)]
    axes.set_yticks(places, [f"{place:.3g}" for place in places])


def moved(row: Row) -> float:
    """How far a number of the output can move in a first step at rate 1, of the model's own width."""
    if row["method"] == "bone":
        return output("bone", row["width"], row["r"], 1.0)
    rank = rank_of(row)
    return output("lora", row["width"], rank, scale_of(row["method"], rank, row["alpha"]))


def forgetting_by_loss(rows: Sequence[Row]) -> Figure:
    """Forgetting against held-out loss: the ends of runs at all rates; and, thin, on the way at the chosen rate."""
    names = dict(tasks(rows))
    made, axes = figure(len(names), 4.2)
    for one, (name, mine) in zip(axes, names.items(), strict=True):
        losses, lost, least_of = [], [], []
        for arm in DRAWN:
            runs = [row for row in first_seed(arm, mine) if math.isfinite(s.last(row, "heldout"))]
            ends = [(s.last(row, "heldout"), s.last(row, "forgetting")) for row in runs]
            if not ends:
                continue
            least_of.append(min(end[0] for end in ends))
            losses += [end[0] for end in ends]
            lost += [end[1] for end in ends if end[0] < 1.6 * least_of[-1]]
            style = STYLES[arm.name]
            one.plot(*zip(*ends, strict=True), **style, label=arm.name, markersize=4.5, linewidth=1.2)
            if best := s.at_best(arm.of(mine)):
                way = [(point["heldout"], point["forgetting"]) for point in best[0]["points"]]
                way = [point for point in way if None not in point]
                one.plot(*zip(*way, strict=True), color=style["color"], linewidth=0.8, linestyle=":", alpha=0.9)
        if losses:
            one.set_xlim(1.6 * max(least_of), 0.95 * min(losses))
            one.set_ylim(min(0.0, *lost), 1.08 * max(lost))
        one.set(title=name, xscale="log", xlabel="held-out loss (better to the right)")
        one.minorticks_off()
        if losses:
            low, high = min(losses), 1.5 * max(least_of)
            places = [low * (high / low) ** (step / 3) for step in range(4)]
            one.set_xticks(places, [f"{place:.3g}" for place in places])
    axes[0].set_ylabel("forgetting: rise of the loss\non the base's kind of text")
    legend(made, axes)
    return made


def rates_by_width(rows: Sequence[Row]) -> Figure:
    """The rates that are within 5 % of the best, by width, with published ones and --lr_init auto."""
    made, axes = figure(3, 3.9)
    shown = (("Bone", ARMS[0]), ("LoRA, alpha 2r", ARMS[2]), ("every weight", ARMS[6]))
    for one, (title, arm) in zip(axes, shown, strict=True):
        for index, (_, mine) in enumerate(tasks(rows)):
            losses = s.by_rate(first_seed(arm, mine), "development")
            losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
            if len(losses) < 3:
                continue
            top = min(losses, key=lambda rate: losses[rate])
            near = [rate for rate, loss in losses.items() if loss < 1.05 * losses[top]]
            width = mine[0]["width"] * (1 + 0.06 * (index % 4))  # side by side
            one.plot(
                [width, width], [min(near), max(near)], color="#0072B2", linewidth=4, alpha=0.35, solid_capstyle="round"
            )
            one.plot(
                width, top, color="#0072B2", marker="o", markersize=5, linestyle="", label="best here (bar: within 5 %)"
            )
        widths = [32 * 2 ** (step / 4) for step in range(29)]
        one.plot(
            widths,
            [rule(arm, width) for width in widths],
            color="#D55E00",
            linewidth=1.5,
            label="--lr_init auto, r 32 (LoRA 16)",
        )
        if title == "Bone":
            for name, (width, rate) in PUBLISHED.items():
                one.plot(width, rate, color="#000000", marker="x", linestyle="", label="published, not searched")
                below = name == "the paper"
                place: dict[str, Any] = {"xytext": (4, -11) if below else (-6, 5), "ha": "right"}
                one.annotate(name, (width, rate), textcoords="offset points", fontsize=7, **place)
            wide = [width for width in widths if width > 256]
            doubled = [rule(arm, width, r=64) for width in wide]
            one.plot(wide, doubled, color="#D55E00", linewidth=1, linestyle=":", label="--lr_init auto, r 64")
        if title != "Bone":
            factor = 10 if arm.method == "lora" else 1
            law = [5e-5 * factor * (2000 / width) ** 0.781 for width in widths]
            one.plot(
                widths,
                law,
                color="#000000",
                linestyle="--",
                linewidth=1,
                label="Schulman et al. 2025",
            )
        one.set(
            title=title, xscale="log", yscale="log", xlabel="width of the model", xlim=(24, 5500), ylim=(1e-5, 4e-2)
        )
        one.set_xticks([32, 128, 512, 2048, 4096], ["32", "128", "512", "2048", "4096"])
        one.minorticks_off()
    axes[0].set_ylabel("learning rate")
    legend(made, axes)
    return made


def rule(arm: Arm, width: float, r: int = 32) -> float:
    """--lr_init auto with the sizes of this comparison: Bone r 32, LoRA r 16 and alpha 32."""
    kind = {"bone": "bone", "lora": "lora", "full": "none"}[arm.method]
    return auto_rate(AdapterConfig(peft=kind, bone_r=r, lora_r=16, lora_alpha=32.0), round(width))


def changes(rows: Sequence[Row]) -> Figure:
    """What a change does to held-out loss and forgetting, with the plain run's way between the two."""
    names = {
        name: mine
        for name, mine in tasks(rows)
        if any(row["variant"] or row.get("scaled") for row in mine if row["method"] == "bone")
    }
    made, axes = figure(max(1, len(names)), 4.4)
    for one, (name, mine) in zip(axes, names.items(), strict=False):
        key = s.chosen(ARMS[0].of(mine))
        plain = {row["seed"]: row for row in s.at_best(ARMS[0].of(mine))}
        shown: list[tuple[str, float, float]] = []
        for variant in dict.fromkeys(row["variant"] for row in mine if row["method"] == "bone" and row["variant"]):
            runs = [row for row in Arm("", "bone", None, variant).of(mine) if (row["rate"], row["alpha"]) == key]
            if (found := change(plain, {row["seed"]: row for row in runs})) is not None:
                shown.append((variant, found[0].difference, found[1].difference))
        for scale in sorted({item["scale"] for row in plain.values() for item in row.get("scaled") or ()}):
            if (found := change(plain, scaled(plain, scale))) is not None:
                shown.append((f"x {scale:g}", found[0].difference, found[1].difference))
        seeds = sorted(seed for seed, row in plain.items() if row.get("scaled"))
        for number, seed in enumerate(seeds):
            end = plain[seed]["points"][-1]
            way = [
                (math.log(point["heldout"] / end["heldout"]), point["forgetting"] - end["forgetting"])
                for point in plain[seed]["points"]
            ]
            x, y = zip(*way, strict=True)
            one.plot(
                [100 * math.expm1(v) for v in x],
                y,
                color="#999999",
                linewidth=1,
                label="" if number else "plain Bone, on its way",
            )
        lower = [row for row in first_seed(ARMS[0], mine) if key and row["rate"] <= key[0]]
        if lower and math.isfinite(s.last(lower[-1], "heldout")):
            end = lower[-1]
            x = [100 * (s.last(row, "heldout") / s.last(end, "heldout") - 1) for row in lower]
            y = [s.last(row, "forgetting") - s.last(end, "forgetting") for row in lower]
            one.plot(
                x, y, color="#000000", marker="x", linestyle="--", linewidth=1, label="plain Bone, lower rates (seed 0)"
            )
        one.plot(0, 0, marker="o", color="#0072B2", markersize=8, linestyle="", label="plain Bone, at its end")
        for variant, loss, lost in shown:
            family = variant.split()[0]
            color = {"mix": "#009E73", "decay": "#D55E00", "ema": "#CC79A7", "r": "#0072B2", "x": "#E69F00"}.get(
                family, "k"
            )
            one.plot(100 * math.expm1(loss), lost, marker="D", markersize=5, color=color, linestyle="")
            one.annotate(
                variant, (100 * math.expm1(loss), lost), textcoords="offset points", xytext=(5, 4), fontsize=7.5
            )
        if shown:
            right = max(100 * math.expm1(loss) for _, loss, _ in shown)
            one.set_xlim(
                min(-15.0, *(100 * math.expm1(loss) - 8 for _, loss, _ in shown)), min(max(right, 20) * 1.2, 150)
            )
            one.set_ylim(min(lost for *_, lost in shown) - 0.5, max(0.5, *(lost + 0.4 for *_, lost in shown)))
        one.set(title=name, xlabel="change of held-out loss, %")
    axes[0].set_ylabel("change of forgetting")
    legend(made, axes)
    return made


PICTURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "bone-or-lora-rates.png": loss_by_rate,
    "bone-or-lora-forgetting.png": forgetting_by_loss,
    "bone-or-lora-width.png": rates_by_width,
    "bone-or-lora-changes.png": changes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs")
    options = parser.parse_args()
    rows = s.read(options.runs)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(rows).savefig(options.output / name, dpi=80)


if __name__ == "__main__":
    main()
