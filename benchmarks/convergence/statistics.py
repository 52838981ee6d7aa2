"""What the runs of a comparison say: choice of rates, paired tests over seeds, forgetting at equal loss.

Rows are those of runs.jsonl, one a run. A loss that is no finite number counts as infinite. Rate and alpha of an arm
are chosen by the development loss of the seeds of SELECTION alone; what is tested are held-out losses of the other
seeds, so that nothing is chosen by what is reported.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
SELECTION = (0, 1)
LEVEL = 0.95
MOST_FLIPPED = 2**20  # sign patterns that are tried one by one


@dataclass(frozen=True)
class Arm:
    """A method as it is compared. alpha: the only multiple of the rank it may have; None: whatever is best."""

    name: str
    method: str
    alpha: float | None = None
    variant: str = ""

    def of(self, rows: Iterable[Row]) -> list[Row]:
        return [
            row
            for row in rows
            if row["method"] == self.method
            and row.get("variant", "") == self.variant
            and self.alpha in (None, row["alpha"])
        ]


ARMS = (
    Arm("Bone", "bone"),
    Arm("Bat", "bat"),
    Arm("LoRA, alpha 2r", "lora", 2.0),
    Arm("LoRA, alpha searched", "lora"),
    Arm("rsLoRA", "rslora"),
    Arm("PiSSA", "pissa"),
    Arm("every weight", "full"),
)


@dataclass(frozen=True)
class Paired:
    """A paired comparison of `first` with `second` over seeds.

    difference: the mean of log(first / second), or of first - second, with the interval of Student's t; p: of its test;
    p_flips: of the exact permutation test of signs; wins: pairs in which the first is smaller, ties counted as half.
    """

    pairs: int
    difference: float
    low: float
    high: float
    p: float
    p_flips: float
    wins: float


def read(path: Path) -> list[Row]:
    """The rows of a file of runs; what is no whole line at its end, as one that is being written, is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last(row: Row, what: str) -> float:
    """A measurement at the end of a run, such as `heldout`; infinite if it is none, or no finite number."""
    value = row["points"][-1].get(what)
    return math.inf if value is None or not math.isfinite(value) else float(value)


def chosen(rows: Sequence[Row]) -> tuple[float, float | None] | None:
    """(rate, alpha) of the least mean development loss, of rows of one arm; None if there are none.

    Those that have all seeds of SELECTION are compared, or else those that have the first of them.
    """
    losses: dict[tuple[float, float | None], dict[int, float]] = {}
    for row in rows:
        losses.setdefault((row["rate"], row["alpha"]), {})[row["seed"]] = last(row, "development")
    for seeds in (SELECTION, SELECTION[:1]):
        means = {key: sum(of[seed] for seed in seeds) for key, of in losses.items() if set(seeds) <= set(of)}
        if means:
            return min(means, key=lambda key: (means[key], key[0]))
    return None


def at_best(rows: Sequence[Row]) -> list[Row]:
    """The rows of one arm with its chosen rate and alpha, one a seed."""
    best = chosen(rows)
    found = {row["seed"]: row for row in rows if (row["rate"], row["alpha"]) == best}
    return [found[seed] for seed in sorted(found)]


def tested(rows: Sequence[Row], what: str = "heldout") -> dict[int, float]:
    """{seed: measurement at the end} of an arm at its best, of the seeds that nothing was chosen by."""
    return {row["seed"]: last(row, what) for row in at_best(rows) if row["seed"] not in SELECTION}


def paired(first: Mapping[int, float], second: Mapping[int, float], *, ratio: bool = True) -> Paired | None:
    """Compare over the seeds that both have; None with fewer than two of them, or where a value is not finite.

    ratio: of logarithms, so that differences are relative ones.
    """
    seeds = sorted(first.keys() & second.keys())
    values = np.array([(first[seed], second[seed]) for seed in seeds], float).reshape(-1, 2)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    if ratio:
        values = np.log(values)
    differences = values[:, 0] - values[:, 1]
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1))
    if error:
        p = float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))
    else:
        p = 1.0 if mean == 0 else 0.0
    wins = float((differences < 0).sum() + (differences == 0).sum() / 2)
    return Paired(len(seeds), mean, mean - reach, mean + reach, p, sign_flips(differences), wins)


def sign_flips(differences: Sequence[float] | np.ndarray) -> float:
    """The exact two-sided p of the permutation test of signs: how often a mean is as far from 0 as the one found."""
    values = np.asarray(differences, float)
    assert 2 ** len(values) <= MOST_FLIPPED, "too many pairs to try every pattern"
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    sums = np.abs(signs @ values)
    # The pattern that was found must count itself whatever the order of rounding.
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-12)))


def holm(values: Sequence[float]) -> list[float]:
    """The p values of one family, corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979)."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, values[place] * (len(values) - rank)))
        corrected[place] = largest
    return corrected


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) with the interval of Student's t, which has no ends with one value."""
    found = np.asarray(values, float)
    mean = float(found.mean())
    if len(found) < 2:
        return mean, -math.inf, math.inf
    reach = float(found.std(ddof=1) / math.sqrt(len(found)) * stats.t.ppf((1 + LEVEL) / 2, len(found) - 1))
    return mean, mean - reach, mean + reach


def forgetting_at(row: Row, level: float) -> float | None:
    """The forgetting where a run's held-out loss first falls to `level`; None if it never does.

    Between two measurements it is interpolated, linearly in the logarithm of the held-out loss.
    """
    points = sorted(row["points"], key=lambda point: point["step"])
    before = None
    for point in points:
        loss, forgetting = point["heldout"], point["forgetting"]
        if loss is None or forgetting is None:
            return None
        if loss <= level:
            if before is None or before[0] == loss:
                return float(forgetting)
            share = math.log(before[0] / level) / math.log(before[0] / loss)
            return float(before[1] + share * (forgetting - before[1]))
        before = loss, forgetting
    return None


def common_level(arms: Iterable[Sequence[Row]]) -> float:
    """A held-out loss that most runs of every arm reach: the largest of the arms' median losses at the end, and 2 %."""
    ends = [float(np.median([last(row, "heldout") for row in rows])) for rows in arms if rows]
    return 1.02 * max((end for end in ends if math.isfinite(end)), default=math.inf)


def on_the_way(rows: Sequence[Row], level: float) -> dict[int, float]:
    """{seed: forgetting at this held-out loss} of the runs that reach it, of the seeds that nothing was chosen by."""
    found = {row["seed"]: forgetting_at(row, level) for row in rows if row["seed"] not in SELECTION}
    return {seed: value for seed, value in found.items() if value is not None}


def by_rate(rows: Sequence[Row], what: str = "heldout") -> dict[float, float]:
    """{rate: mean of a measurement at the end over the seeds of SELECTION that there are}, of rows of one arm."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["seed"] in SELECTION:
            found.setdefault(row["rate"], []).append(last(row, what))
    return {rate: sum(values) / len(values) for rate, values in sorted(found.items())}


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate at the lowest point of a parabola through the least loss and its neighbours, in logarithms.

    None where the least loss is at an end, so that nothing shows where the lowest point is.
    """
    rates = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    if len(rates) < 3:
        return None
    place = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if place in (0, len(rates) - 1):
        return None
    near = rates[place - 1 : place + 2]
    a, b, _ = np.polyfit(np.log(near), np.log([losses[rate] for rate in near]), 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else rates[place]


def at_rate(values: Mapping[float, float], rate: float, *, logarithm: bool = True) -> float | None:
    """A loss at a rate between those that were tried, by lines through them in the logarithm of the rate.

    logarithm: of the loss too. None beyond the rates with finite losses.
    """
    rates = sorted(one for one, value in values.items() if math.isfinite(value))
    if not rates or not rates[0] <= rate <= rates[-1]:
        return None
    heights = [math.log(values[one]) if logarithm else values[one] for one in rates]
    found = float(np.interp(math.log(rate), np.log(rates), heights))
    return math.exp(found) if logarithm else found


def power_law(widths: Sequence[float], rates: Sequence[float]) -> tuple[float, float]:
    """(factor, exponent) of rate = factor x width^exponent, by least squares in logarithms."""
    exponent, constant = np.polyfit(np.log(widths), np.log(rates), 1)
    return float(np.exp(constant)), float(exponent)
