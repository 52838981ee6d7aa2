"""The short table at the end of a run: what was learnt, what was forgotten, and what it took.

The numbers are those of the whole run, from its log and measurements, whichever processes have worked on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rwkv_bone.console import counted
from rwkv_bone.training.diagnosis import general_losses
from rwkv_bone.training.evaluation import unit_of
from rwkv_bone.training.progress import clock

NAME, CELL = 24, 11  # columns of a set's name, and of each of the five numbers: 79 in all
# Changes of the general loss, in nats a token, that are called so; e to their power is how much less likely tokens are.
NOTHING, LITTLE, MUCH = 0.01, 0.1, 0.5
# Rows of a set of preference data: what it is called, the figure, how it and its change are written, times what.
ANSWERS = (
    ("  accuracy", "reward_accuracy", "{:.1f}%", "{:+.1f}", 100),
    ("  margin", "reward_margin", "{:.4f}", "{:+.4f}", 1),
    ("  log p, chosen", "logp_chosen", "{:.4f}", "{:+.4f}", 1),
    ("  log p, rejected", "logp_rejected", "{:.4f}", "{:+.4f}", 1),
    ("  KL from the start", "divergence", "{:.4f}", "{:+.4f}", 1),
)


def table(
    records: Sequence[dict], measurements: Sequence[dict], warnings: Sequence[dict], total_steps: int
) -> Iterator[str]:
    """Lines of at most 80 columns. records: lines of the log; measurements and warnings: lines of their files."""
    if measurements:
        last = measurements[-1]["step"]
        after = f"step {last:,}" if records and records[-1]["step"] > last else "after"
        main = _of_answers(measurements[-1])
        loss = f"loss per {unit_of(main)}" if main else "loss, nats per token"
        yield "\n" + _row(loss, "before", "best", "at step", after, "change")
        for name in measurements[-1]["sets"]:
            yield from _of_set(name, [one for one in measurements if name in one["sets"]])
    yield from forgotten(measurements)
    if records:
        yield from _took(records, measurements, total_steps)
    if warnings:
        steps = ", ".join(f"{line['step']:,}" for line in warnings)
        yield f"warnings  {len(warnings)} above, at step {steps}"


def _row(name: str, *cells: str) -> str:
    short = name if len(name) < NAME else f"{name[: NAME // 2 - 2]}...{name[-(NAME // 2 - 2) :]}"
    return (f"{short:<{NAME}}" + "".join(f"{cell:>{CELL}}" for cell in cells)).rstrip()


def _of_set(name: str, measurements: Sequence[dict]) -> Iterator[str]:
    """Its losses, and the share of exact answers if they were counted. A general set has no best: none is learnt."""
    points = [(one["step"], one["sets"][name]) for one in measurements if one["sets"][name]["loss"] is not None]
    if not points:
        yield _row(name, "not finite")
        return
    answers = [one["preference"] for _, one in points if one.get("preference")]
    general = name == measurements[-1]["general"]
    trained = [] if general else [(one["loss"], step) for step, one in points if step]
    loss, step = min(trained, default=(None, None))
    best = ("", "") if loss is None else (f"{loss:.4f}", f"{step:,}")
    label = f"{name} (per token)" if general and _of_answers(measurements[-1]) else name
    yield _row(label, *_before_after([one["loss"] for _, one in points], best, "{:.4f}", "{:+.4f}"))
    for label, figure, number, change, scale in ANSWERS:
        values = [None if one[figure] is None else scale * one[figure] for one in answers]
        if any(value is not None for value in values):
            yield _row(label, *_before_after(values, ("", ""), number, change))
    exact = [one["exact_match"] for _, one in points if one["exact_match"] is not None]
    if exact:
        yield _row("  exact answers", *_before_after([100 * share for share in exact], ("", ""), "{:.1f}%", "{:+.1f}"))


def _of_answers(measurement: dict) -> dict[str, float | None] | None:
    """What it has of the main set, where that is preference data."""
    return measurement["sets"].get(measurement["main"], {}).get("preference")


def _before_after(values: Sequence[float | None], best: tuple[str, str], number: str, change: str) -> Iterator[str]:
    """The cells of a row; None: there is no such value."""
    first, last = values[0], values[-1]
    yield "" if first is None else number.format(first)
    yield from best
    if len(values) > 1:
        yield "" if last is None else number.format(last)
        yield "" if first is None or last is None else change.format(last - first)


def forgotten(measurements: Sequence[dict]) -> Iterator[str]:
    """What the general set tells, in words."""
    losses = [loss for _, loss in general_losses(measurements)]
    if len(losses) < 2:
        return
    rise = losses[-1] - losses[0]
    if rise < NOTHING:
        yield f"forgotten nothing that the general text shows: its loss changed by {rise:+.4f}"
        return
    how = "a little" if rise < LITTLE else "something" if rise < MUCH else "much"
    times = f"{math.exp(rise):.3g} times" if rise < 20 else "immensely"
    yield f"forgotten {how}: tokens of the general text are {times} less likely"
    if rise >= LITTLE:
        yield "          (a lower --lr_init, fewer steps or general rows in the data keep more)"


def _took(records: Sequence[dict], measurements: Sequence[dict], total_steps: int) -> Iterator[str]:
    seconds, tokens = (sum(record[name] for record in records) for name in ("seconds", "tokens"))
    measuring = sum(one["seconds"] for one in measurements)
    done = records[-1]["step"]
    of = f" of {total_steps:,}" if done != total_steps else ""
    also = f", {clock(measuring)} of it for measurements" if measuring else ""
    yield f"took      {clock(seconds + measuring)} for {done:,}{of} steps{also}"
    if lost := done - len(records):
        yield f"          (without {counted(lost, 'step')} that the log lacks)"
    peak = max(record.get("peak_reserved_mb") or record["peak_memory_mb"] for record in records)
    yield f"tokens    {tokens:,}; {tokens / seconds:,.0f} a second in the steps; peak memory {peak:,.0f} MiB"
