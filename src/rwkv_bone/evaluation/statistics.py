"""What counts of right answers say: intervals, a paired test, pass@k, the majority's answer. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import eq
from statistics import NormalDist, fmean, stdev

FREEDOM = 1000  # more degrees of freedom count as these: the interval of a mean is then 0.12 % too wide at most


def wilson(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high): Wilson's score interval of a proportion (1927), right answers out of `total`.

    It never leaves 0 to 1 and has a width even where all answers are right. Of no answer at all it says (0, 1).
    """
    assert 0 <= right <= total
    if total == 0:
        return 0.0, 1.0
    z, share = _normal(level), right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    # Rounding would leave 1e-18 where the formula's end is 0 or 1.
    return 0.0 if right == 0 else low, 1.0 if right == total else high


def mcnemar(b: int, c: int) -> float:
    """McNemar's exact test, two-sided: p of two models being equally good, on the same items.

    b: items that only the first has right, c: items that only the second has right. Items that both have right or wrong
    say nothing. p is the probability that a fair coin thrown b + c times is at least as uneven.
    """
    assert b >= 0 and c >= 0
    tail, term = 0, 1  # term: the number of ways to choose i of b + c
    for i in range(min(b, c) + 1):
        tail += term
        term = term * (b + c - i) // (i + 1)
    return min(1.0, 2 * tail / 2 ** (b + c))


def paired_difference(only_a: int, only_b: int, total: int, level: float = 0.95) -> tuple[float, float, float]:
    """(difference, low, high) of two accuracies on the same `total` items, A's minus B's.

    only_a, only_b: items that one of the two alone has right. The interval is Bonett and Price's (2012): Wald's after
    one more item for each of the two counts, so it has a width even where the two never differ.
    """
    assert only_a >= 0 and only_b >= 0 and only_a + only_b <= total
    if total == 0:
        return 0.0, -1.0, 1.0
    a, b = (only_a + 1) / (total + 2), (only_b + 1) / (total + 2)
    half = _normal(level) * math.sqrt((a + b - (a - b) ** 2) / (total + 2))
    return (only_a - only_b) / total, max(-1.0, a - b - half), min(1.0, a - b + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers is right, when c of n are: unbiased (Chen et al. 2021, arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k): the share of all choices of k among the n answers that contain a right one.
    """
    assert 0 <= c <= n and 1 <= k <= n
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool] = eq) -> str | None:
    """The answer that most samples give (maj@k; Wang et al. 2022, arXiv 2203.11171); of several, the first given.

    same: whether two answers are one, such as `same_number`; each is compared with the first of every group so far.
    Samples without an answer (None) have no vote. None if no sample has one.
    """
    groups: list[tuple[str, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for index, (first, votes) in enumerate(groups):
            if same(first, answer):
                groups[index] = first, votes + 1
                break
        else:
            groups.append((answer, 1))
    return max(groups, key=lambda group: group[1])[0] if groups else None


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): Student's t interval of the mean of scores that are not just right or wrong.

    One value has a mean but no spread: its interval is (-inf, inf).
    """
    assert values
    mean = fmean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = _student(len(values) - 1, level) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _normal(level: float) -> float:
    """How many standard deviations about the mean hold `level` of a normal distribution: 1.96 for 0.95."""
    assert 0 < level < 1
    return NormalDist().inv_cdf((1 + level) / 2)


def _student(freedom: int, level: float) -> float:
    """The same for Student's t with `freedom` degrees of freedom: 2.571 for 5 and 0.95."""
    freedom = min(freedom, FREEDOM)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_share(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) tan(angle)), the finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    square, odd = math.cos(angle) ** 2, freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= square * (i - 1) / i
        total += term
    return 2 / math.pi * (angle + total) if odd else total
