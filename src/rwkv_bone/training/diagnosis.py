"""What can be told of a run that goes wrong, from the lines of its log and its measurements: pure functions.

Each rule returns an Advice or None. A false alarm is as bad as silence, so that each asks for two things: a difference
that chance does not explain, and one that is large enough to act upon.

**Chance.** Two groups of steps are compared by the rank test of Mann and Whitney (1947), which asks nothing of the
shape of the noise, so that single steps with a huge loss do not count more than any other. The steps of a run read
shuffled samples: their noise is independent. `SURE` = 4.5 standard deviations are passed by chance once in 300,000
comparisons; a run makes some hundred, each with the lowest of up to a hundred windows, which moves the figure by two
standard deviations at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_bone.console import counted

WINDOW = 20  # steps of the shortest window; a run of fewer than three windows is too short to be judged
LONGEST = 100  # steps of the longest window
HISTORY = 2000  # steps that are looked back at, besides the first ones
SURE = 4.5  # standard deviations
MASKED = 0.1  # share of trained tokens below which most of the work is for nothing


class Advice(NamedTuple):
    """A warning and what to do. kind: each is given once in a run."""

    kind: str
    warning: str
    remedy: str


def rank_z(before: Sequence[float], after: Sequence[float]) -> float:
    """By how many standard deviations the ranks of `after` are above those of `before`: Mann and Whitney's U.

    U counts the pairs in which the one of `after` is larger, ties as half; without a difference it has mean nm/2 and
    variance nm(n + m + 1)/12, less what ties take. 0 where all values are equal.
    """
    n, m = len(before), len(after)
    values = np.concatenate([before, after])
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    u = ranks[n:].sum() - m * (m + 1) / 2
    total = n + m
    ties = (counts.astype(float) ** 3 - counts).sum() / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - ties)
    return float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0


def window_of(steps: int) -> int:
    """Steps of a window in a run that has taken `steps`: a twentieth, within bounds."""
    return min(max(WINDOW, steps // 20), LONGEST)


def of_steps(
    records: Sequence[dict],
    measurements: Sequence[dict] = (),
    *,
    total_steps: int,
    vocab_size: int,
    grad_clip: float,
    from_scratch: bool = False,
    process_began: int = 0,
    per_token: bool = True,
) -> list[Advice]:
    """What the lines of the log tell. process_began: the step after which this process began. per_token: so the loss
    is, and not of whole answers."""
    recent = records[-HISTORY:]
    found = [
        loss_rises(recent, first=records[: window_of(len(records))]),
        gradient_grows(recent, grad_clip),
        loss_of_guessing(records, vocab_size, from_scratch) if per_token else None,
        loss_unchanged(records, measurements, total_steps),
    ]
    ours = [record for record in recent if record["step"] > process_began]
    found += [slower(ours), waits_for_data(ours)]
    return [advice for advice in found if advice]


def loss_rises(records: Sequence[dict], first: Sequence[dict] = ()) -> Advice | None:
    """The mean of the last window is above that of the lowest window before: by at least a fifth of what the run had
    learnt, and by 5 % of the loss that it began with, and the rank test is sure.

    first: the first steps of the run, where `records` begins later.
    """
    records = [record for record in records if record["loss"] is not None]
    size = window_of(len(records))
    if len(records) < 3 * size:
        return None
    losses = [record["loss"] for record in records]
    start = len(losses) % size  # windows end with the last step
    windows = [losses[i : i + size] for i in range(start, len(losses), size)]
    means = [float(np.mean(window)) for window in windows]
    began = [record["loss"] for record in first if record["loss"] is not None]
    begin = float(np.mean(began)) if began else means[0]
    lowest = int(np.argmin(means[:-1]))
    rise = means[-1] - means[lowest]
    if rise < max(0.2 * (begin - means[lowest]), 0.05 * begin) or rank_z(windows[lowest], windows[-1]) < SURE:
        return None
    around = records[start + lowest * size + size // 2]["step"]
    return Advice(
        "loss rises",
        f"the loss rises: it is {means[-1]:.4f} over the last {size} steps and was {means[lowest]:.4f} around step "
        f"{around}",
        "the learning rate is probably too high: halve --lr_init, and go on from the last save with --resume_with "
        "lr_init, or begin anew",
    )


def gradient_grows(records: Sequence[dict], grad_clip: float) -> Advice | None:
    """The median norm of the last 20 steps is ten times that of all steps before, and above --grad_clip (or 1).

    A norm that is no finite number counts as infinite.
    """
    if len(records) < 3 * WINDOW:
        return None
    norms = [math.inf if record["grad_norm"] is None else record["grad_norm"] for record in records]
    before, now = float(np.median(norms[:-WINDOW])), float(np.median(norms[-WINDOW:]))
    if now <= (grad_clip or 1.0) or now < 10 * before or math.isinf(before):
        return None
    return Advice(
        "gradient grows",
        f"the gradient explodes: its norm is {now:.3g} over the last {WINDOW} steps and was {before:.3g} before",
        "halve --lr_init, with --grad_clip 1 if it is off, and go on from the last save with --resume_with lr_init; "
        "look at the rows (sh scripts/preview_data.sh) if it comes again",
    )


def loss_of_guessing(records: Sequence[dict], vocab_size: int, from_scratch: bool) -> Advice | None:
    """After 60 steps (300 of a model from scratch) the loss is still above nine tenths of ln(vocab_size), which is the
    loss of a model that knows nothing."""
    losses = [record["loss"] for record in records[-window_of(len(records)) :] if record["loss"] is not None]
    if len(records) < (300 if from_scratch else 3 * WINDOW) or not losses:
        return None
    now, guess = float(np.mean(losses)), math.log(vocab_size)
    if now < 0.9 * guess:
        return None
    return Advice(
        "loss of guessing",
        f"the loss is that of guessing: {now:.2f} after {counted(records[-1]['step'], 'step')}, and a guess among "
        f"{vocab_size:,} tokens costs {guess:.2f}",
        "check that --load_model and --tokenizer belong together (sh scripts/preview_data.sh shows the tokens), and "
        "that the base is whole",
    )


def loss_unchanged(records: Sequence[dict], measurements: Sequence[dict], total_steps: int) -> Advice | None:
    """After a third of the run, and 100 steps, the loss of the last quarter of the steps is that of the first quarter.

    Their means differ by less than 1 %, also at the ends of the 95 % confidence interval: where the noise would hide
    such a change, nothing is said. Held-out data is asked too: it is the same each time, so half a percent is a change.
    """
    if len(records) < max(100, total_steps // 3):
        return None
    losses = np.array([record["loss"] for record in records if record["loss"] is not None])
    quarter = min(len(losses) // 4, HISTORY)
    if quarter < WINDOW:
        return None
    first, last = losses[:quarter], losses[-quarter:]
    difference = float(last.mean() - first.mean())
    margin = 2 * math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / quarter)
    if abs(difference) + margin >= 0.01 * float(first.mean()):
        return None
    held_out = [loss for _, loss in main_losses(measurements)]
    if held_out and abs(held_out[-1] - held_out[0]) >= 0.005 * held_out[0]:
        return None
    return Advice(
        "loss unchanged",
        f"the loss has not changed in {counted(records[-1]['step'], 'step')}: {first.mean():.4f} at first, "
        f"{last.mean():.4f} now",
        "multiply --lr_init by three, then by ten; and see what is trained: sh scripts/preview_data.sh",
    )


def slower(records: Sequence[dict]) -> Advice | None:
    """For a minute, and 20 steps, the tokens a second are less than half of what they were for at least as long.

    Medians are compared, which saves and measurements do not move, and the rank test must be sure.
    records: of one process, since another may run elsewhere.
    """
    minute = _last_seconds(records, 60.0)
    if minute < WINDOW or len(records) < 2 * minute + 5:
        return None
    speeds = [record["tokens_per_s"] for record in records[5:]]  # the first steps warm up
    before, now = speeds[:-minute], speeds[-minute:]
    if np.median(now) >= 0.5 * np.median(before) or rank_z(now, before) < SURE:
        return None
    return Advice(
        "slower",
        f"the run has become slow: {np.median(now):,.0f} tokens/s in the last minute, {np.median(before):,.0f} before",
        "look for other programs on this machine (top, nvidia-smi), for heat, and for a disk that is full",
    )


def waits_for_data(records: Sequence[dict]) -> Advice | None:
    """For ten seconds, and 20 steps, the model has waited for its batches in more than a quarter of the time."""
    count = _last_seconds(records, 10.0)
    if count < WINDOW or len(records) < count + 5:
        return None
    last = records[-count:]
    share = sum(record["data_wait_ms"] for record in last) / 1000 / sum(record["seconds"] for record in last)
    if share < 0.25:
        return None
    return Advice(
        "waits for data",
        f"the model waits for its data, {share:.0%} of the time",
        "put --data_file and --cache_dir on a local disk, and leave a processor free for the batches",
    )


def _last_seconds(records: Sequence[dict], seconds: float) -> int:
    """How many of the last steps have taken so long together, but at least WINDOW; 0 if all have not."""
    total = 0.0
    for count, record in enumerate(reversed(records), start=1):
        total += record["seconds"]
        if total >= seconds and count >= WINDOW:
            return count
    return 0


def main_losses(measurements: Sequence[dict]) -> list[tuple[int, float]]:
    """(step, loss) of the main held-out set, of each measurement in which it is a finite number."""
    return _losses(measurements, "main")


def general_losses(measurements: Sequence[dict]) -> list[tuple[int, float]]:
    """The same, of the general text."""
    return _losses(measurements, "general")


def _losses(measurements: Sequence[dict], which: str) -> list[tuple[int, float]]:
    points = [(one["step"], one["sets"].get(one[which], {}).get("loss")) for one in measurements]
    return [(step, loss) for step, loss in points if loss is not None]


def of_measurements(measurements: Sequence[dict], records: Sequence[dict]) -> list[Advice]:
    """Overfitting: the held-out loss rises while the training loss falls.

    The held-out loss is above its lowest, and rose in the last two measurements in a row; the rise is at least 1 % of
    the lowest and 2 % of what had been learnt. That data is the same each time, so that only the model makes a
    difference. And the loss of the steps since the lowest measurement is no higher than that of as many before it.
    Of preference data, where each pair has one loss, about as large as its spread, the rise is also one standard error
    of the mean of so many.
    """
    losses = main_losses(measurements)
    if len(losses) < 3:
        return []
    step, lowest = min(losses[:-1], key=lambda one: one[1])
    (_, older), (_, old), (last, now) = losses[-3:]
    main = measurements[-1]["sets"][measurements[-1]["main"]]
    error = lowest / math.sqrt(main["samples"]) if main.get("preference") else 0.0
    if not (older < old < now and now - lowest >= max(0.01 * lowest, 0.02 * (losses[0][1] - lowest), error)):
        return []
    since = [r["loss"] for r in records if r["loss"] is not None and step < r["step"] <= last]
    before = [r["loss"] for r in records if r["loss"] is not None and r["step"] <= step][-len(since) :]
    if step and since and before and np.mean(since) > np.mean(before):
        return []  # both rise: that is no overfitting, and `loss_rises` tells of it
    if not step:
        return [
            Advice(
                "overfitting",
                f"the held-out loss rises from the start: {now:.4f} after step {last}, {lowest:.4f} before training",
                "lower --lr_init; and see whether the held-out rows are of the same kind, and written in the same "
                "template, as --data_file",
            )
        ]
    return [
        Advice(
            "overfitting",
            f"the held-out loss rises while the training loss falls: {now:.4f} after step {last}, and the lowest was "
            f"{lowest:.4f} after step {step}",
            f"rwkv-best.pth is the adapter of step {step} (merge with --best); --early_stop 3 ends such a run; fewer "
            "epochs, more data or a smaller adapter help",
        )
    ]


def of_data(trained: int, tokens: int) -> list[Advice]:
    """Before the first step: most tokens are masked. trained: targets among the `tokens` of the data."""
    share = trained / tokens if tokens else 1.0
    if share >= MASKED:
        return []
    return [
        Advice(
            "masked",
            f"only {share:.1%} of the tokens in the data are trained, and the rest is read alone",
            "see which with sh scripts/preview_data.sh; --loss_mask none trains prompts too, and a larger --ctx_len "
            "keeps responses that are cut",
        )
    ]
