"""What can be told of preference tuning that goes wrong: pure functions, of the same standard as `diagnosis.py`.

Rules on lines of the log ask Mann and Whitney's rank test, or a confidence interval where shares are counted. Held-out
data is the same each time, so that there only the model makes a difference; where some pairs decide a share, chance is
asked all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rwkv_bone.config import PreferenceConfig
from rwkv_bone.console import counted
from rwkv_bone.training.diagnosis import SURE, WINDOW, Advice, rank_z, window_of

FALL = 0.1  # of the log-probability of chosen answers, nats per token and as a share, from which it is told
GONE = 0.01  # a loss per pair at which its gradient is 2 % of what it was: that of -log sigmoid(x) is 1 - exp(-loss)
FAR = 0.5  # nats per token of divergence that the chosen answers do not explain
PUSHED = 0.1  # a reward from which answers are pushed up or down
LIKELY = 3.0  # standard errors of a confidence interval of 99.7 %


def of_steps(records: Sequence[dict], *, task: str, settings: PreferenceConfig, total_steps: int) -> list[Advice]:
    """What the lines of the log tell. settings: with numbers for auto, as `config.preferences.decided` gives them."""
    found = [
        chosen_falls(records, task),
        saturated(records, task, settings, total_steps),
        accuracy_at_chance(records, total_steps),
    ]
    if task == "kto":
        found += [one_sided(records, total_steps), estimate_explodes(records, settings.beta)]
    return [advice for advice in found if advice]


def of_measurements(measurements: Sequence[dict], records: Sequence[dict], *, task: str) -> list[Advice]:
    """What the main held-out set tells."""
    found = [chosen_falls_held_out(measurements, task), over_optimised(measurements, records), far(measurements, task)]
    return [advice for advice in found if advice]


def figures(lines: Sequence[dict], name: str) -> np.ndarray:
    """The values of a figure in the lines that have it, float64."""
    return np.array([line[name] for line in lines if line.get(name) is not None], dtype=np.float64)


def held_out(measurements: Sequence[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure of the main held-out set, of each measurement that has it."""
    mains = [(one["step"], one["sets"].get(one["main"], {}).get("preference") or {}) for one in measurements]
    return [(step, main[name]) for step, main in mains if main.get(name) is not None]


def _fell(before: float, now: float) -> bool:
    return before - now >= max(FALL, FALL * abs(before))


def _fall(task: str, before: float, now: float, where: str) -> Advice:
    keep = "--sft_weight 0.2 adds their own loss; " if task in ("dpo", "simpo") else ""
    return Advice(
        "chosen falls",
        f"the chosen answers become less likely{where}: {now:.3f} nats per token, and it was {before:.3f} at the start",
        f"{keep}a lower --lr_init or a larger --beta keeps the model nearer its start"
        if task in ("dpo", "kto")
        else f"{keep}a lower --lr_init keeps the model nearer its start",
    )


def chosen_falls(records: Sequence[dict], task: str) -> Advice | None:
    """The log-probability of chosen answers is lower in the last window than in the first: by a tenth of a nat per
    token, and by a tenth, and the rank test is sure."""
    size = window_of(len(records))
    first, last = (figures(some, "logp_chosen") for some in (records[:size], records[-size:]))
    if len(records) < 3 * size or min(len(first), len(last)) < WINDOW / 2:
        return None
    if not _fell(first.mean(), last.mean()) or rank_z(last.tolist(), first.tolist()) < SURE:
        return None
    return _fall(task, first.mean(), last.mean(), "")


def chosen_falls_held_out(measurements: Sequence[dict], task: str) -> Advice | None:
    """The same of held-out answers, in two measurements in a row."""
    values = [value for _, value in held_out(measurements, "logp_chosen")]
    if len(values) < 3 or not all(_fell(values[0], value) for value in values[-2:]):
        return None
    return _fall(task, values[0], values[-1], " on held-out data")


def saturated(records: Sequence[dict], task: str, settings: PreferenceConfig, total_steps: int) -> Advice | None:
    """A quarter of the run or more is left, and in the last window, of at least 100 pairs, every loss is about 0.

    Then 99 % of the pairs are right, or more, and the gradient is a fiftieth of what it was. Where another loss is
    added (--sft_weight), or labels are smoothed, there is a gradient all the same.
    """
    if task == "orpo" or settings.sft_weight or (task != "kto" and settings.label_smoothing):
        return None
    size = window_of(len(records))
    last = records[-size:]
    losses, right = figures(last, "loss"), figures(last, "reward_accuracy")
    # What can be lost on an answer of kto is its weight.
    most = max(settings.desirable_weight, settings.undesirable_weight) if task == "kto" else 1.0
    if len(records) < 3 * WINDOW or not len(losses) or sum(line["units"] for line in last) < 100:
        return None
    left = total_steps - records[-1]["step"]
    if left < max(total_steps / 4, WINDOW) or losses.mean() > GONE * most or (len(right) and right.mean() < 0.99):
        return None
    beta = "" if task == "simpo" else ", or a larger --beta"
    return Advice(
        "margin saturated",
        f"nothing is left to learn from these answers: the loss is {losses.mean():.4f} over the last {size} steps, and "
        f"the margin of the rewards {figures(last, 'reward_margin').mean():.2f}; {counted(left, 'step')} more only let "
        "the model drift",
        f"end the run here, and take fewer steps next time (--epoch_count, --epoch_steps); harder pairs{beta} help",
    )


def accuracy_at_chance(records: Sequence[dict], total_steps: int) -> Advice | None:
    """After half of the run, and 60 steps, no more pairs of the last quarter of the steps are right than a coin gives.

    The confidence interval ends below 55 %, where the pairs are too few for that nothing is said; and the share has not
    surely risen since the first quarter.
    """
    records = [record for record in records if record.get("reward_accuracy") is not None]
    if len(records) < max(3 * WINDOW, total_steps / 2):
        return None
    quarter = len(records) // 4
    (first, first_error), (last, error) = _share(records[1 : quarter + 1]), _share(records[-quarter:])
    if last + LIKELY * error >= 0.55 or last - first >= LIKELY * math.hypot(error, first_error):
        return None
    return Advice(
        "accuracy at chance",
        f"the run does not learn which answers are chosen: {last:.1%} of the pairs are right after "
        f"{counted(records[-1]['step'], 'step')}, and a coin gets 50%",
        "multiply --lr_init by three, then by ten; see what differs between the answers, and whether chosen and "
        "rejected are the right way round: sh scripts/preview_data.sh",
    )


def _share(records: Sequence[dict]) -> tuple[float, float]:
    """(share of right pairs, its standard error)."""
    units = np.array([record["units"] for record in records], dtype=np.float64)
    share = float(np.average([record["reward_accuracy"] for record in records], weights=units))
    return share, math.sqrt(max(share * (1 - share), 0.25 / units.sum()) / units.sum())


def over_optimised(measurements: Sequence[dict], records: Sequence[dict]) -> Advice | None:
    """Held-out accuracy or margin falls while that of training does not.

    Accuracy: in two measurements in a row it is below the highest by three standard errors, as if other pairs had been
    measured, and by 3 points. Margin: it falls twice in a row and has lost a fifth of what was gained, and the held-out
    loss is not lower than where it was highest.
    """
    return _accuracy_falls(measurements, records) or _margin_falls(measurements, records)


def _accuracy_falls(measurements: Sequence[dict], records: Sequence[dict]) -> Advice | None:
    points = held_out(measurements, "reward_accuracy")
    if len(points) < 4:
        return None
    highest, step = max((value, -step) for step, value in points[:-2])
    step, now, pairs = -step, points[-1][1], measurements[-1]["sets"][measurements[-1]["main"]]["samples"]
    nearer = max(value for _, value in points[-2:])
    mean = (highest + nearer) / 2
    if highest - nearer < max(0.03, 3 * math.sqrt(2 * mean * (1 - mean) / pairs)):
        return None
    if not _holds(records, "reward_accuracy", step, points[-1][0]):
        return None
    return _turned("accuracy", f"{now:.1%}", f"{highest:.1%}", points[-1][0], step)


def _margin_falls(measurements: Sequence[dict], records: Sequence[dict]) -> Advice | None:
    points = held_out(measurements, "reward_margin")
    if len(points) < 4:
        return None
    highest, step = max((value, -step) for step, value in points[:-2])
    step, (older, old, now) = -step, (value for _, value in points[-3:])
    losses = {one["step"]: one["sets"].get(one["main"], {}).get("loss") for one in measurements}
    before, after = losses[step], losses[points[-1][0]]
    if not (older > old > now and highest - now >= 0.2 * (highest - points[0][1])):
        return None
    if before is None or after is None or after < before:
        return None
    if not _holds(records, "reward_margin", step, points[-1][0]):
        return None
    return _turned("margin", f"{now:.3f}", f"{highest:.3f}", points[-1][0], step)


def _holds(records: Sequence[dict], name: str, step: int, last: int) -> bool:
    """Whether a figure of training is no lower in the window before step `last` than in that before `step`."""
    size = window_of(len(records))
    at, now = (figures([one for one in records if end - size < one["step"] <= end], name) for end in (step, last))
    return bool(len(at) and len(now) and now.mean() >= at.mean())


def _turned(what: str, now: str, highest: str, last: int, step: int) -> Advice:
    return Advice(
        "over-optimised",
        f"the held-out {what} falls while that of training does not: {now} after step {last}, and {highest} after "
        f"step {step}",
        "the run learns its pairs by heart: fewer steps, a lower --lr_init or more pairs help; the adapter with the "
        "lowest held-out loss is rwkv-best.pth (merge with --best)",
    )


def far(measurements: Sequence[dict], task: str) -> Advice | None:
    """The predictions have moved from the start, by half a nat per token more than the chosen answers explain.

    Who makes answers likelier by x nats per token moves by about x: that is what training is for.
    """
    moved = dict(held_out(measurements, "divergence"))
    chosen = held_out(measurements, "logp_chosen")
    if not chosen or chosen[-1][0] not in moved:
        return None
    last, now = chosen[-1]
    if moved[last] - max(0.0, now - chosen[0][1]) < FAR:
        return None
    beta = ", or raise --beta" if task in ("dpo", "kto") else ""
    return Advice(
        "far from the start",
        f"the model has moved far from the one that the run began with: a divergence of {moved[last]:.2f} nats per "
        f"token on held-out answers after step {last}, where the log-probability of the chosen ones has changed by "
        f"{now - chosen[0][1]:+.2f}",
        f"lower --lr_init{beta}, or take fewer steps; look at the answers (samples.jsonl) and at the general text",
    )


def one_sided(records: Sequence[dict], total_steps: int) -> Advice | None:
    """KTO, after a third of the run: good and bad answers have rewards of one sign, which differ by less than they
    share. Each is a tenth or more, and away from 0 by 4.5 standard errors."""
    size = window_of(len(records))
    if len(records) < max(3 * size, total_steps / 3):
        return None
    good, bad = (figures(records[-size:], name) for name in ("reward_chosen", "reward_rejected"))
    if min(len(good), len(bad)) < WINDOW / 2:
        return None
    means = good.mean(), bad.mean()
    shared = min(abs(means[0]), abs(means[1]))
    if means[0] * means[1] <= 0 or shared < PUSHED or abs(means[0] - means[1]) >= shared:
        return None
    if any(abs(one.mean()) < SURE * one.std(ddof=1) / math.sqrt(len(one)) for one in (good, bad)):
        return None
    up = means[0] > 0
    heavier, lighter = ("undesirable", "desirable") if up else ("desirable", "undesirable")
    return Advice(
        "rewards of one sign",
        f"good and bad answers are both pushed {'up' if up else 'down'}, rather than apart: their rewards are "
        f"{means[0]:+.2f} and {means[1]:+.2f} over the last {size} steps",
        f"a larger --{heavier}_weight or a smaller --{lighter}_weight balances them; a lower --lr_init",
    )


def estimate_explodes(records: Sequence[dict], beta: float) -> Advice | None:
    """KTO: in the last window beta x z0 is above 3, so that what an answer's reward changes is lost beside it."""
    size = window_of(len(records))
    values = figures(records[-size:], "kl")
    if len(records) < 3 * WINDOW or len(values) < WINDOW or beta * float(np.median(values)) < 3:
        return None
    return Advice(
        "kl explodes",
        f"answers become likelier whatever the prompt is: z0 is {values.mean():.1f} nats over the last {size} steps",
        "lower --lr_init, or raise --beta; a larger window (--micro_bsz, --accumulate_grad_batches) steadies it",
    )
