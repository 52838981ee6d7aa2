"""Where a search over learning rates, and over LoRA's alpha, goes on: pure functions of the losses found so far.

Rates are FINE ** n, so that neighbours always are 1.73 or 3 apart and the same rate is the same number everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FINE = math.sqrt(3)
LOWEST, HIGHEST = 1e-7, 10.0  # where a search ends, whatever it finds


def at(place: int) -> float:
    """The rate of a place: FINE ** place, to three digits."""
    return float(f"{FINE**place:.3g}")


def place_of(rate: float) -> int:
    """The place whose rate is nearest."""
    return round(math.log(rate) / math.log(FINE))


def missing_rates(losses: Mapping[float, float | None], start: float, *, fine: bool = True) -> list[float]:
    """The rates to try next, none if the search is over.

    losses: of the rates tried so far; None (or no finite number) for a run that failed or diverged. It begins with
    `start` and its neighbours at a factor of 3, goes on by 3 at whichever end is the best so far, and when the best is
    inside, tries, with `fine`, its neighbours at a factor of 1.73 too.
    """
    found = {place_of(rate): math.inf if loss is None or loss != loss else loss for rate, loss in losses.items()}
    if not found:
        middle = place_of(start)
        return [at(middle), at(middle - 2), at(middle + 2)]
    best = min(found, key=lambda place: (found[place], place))
    for step in (2, 1) if fine else (2,):
        beside = [best - step, best + step]
        # A neighbour that is nearer serves as well: the best then lies between what has been tried.
        wanted = [
            place
            for place in beside
            if LOWEST <= at(place) <= HIGHEST
            and place not in found
            and not (step == 2 and any(_sign(place - best) * (other - best) in (1, 2) for other in found))
        ]
        if wanted:
            return [at(place) for place in wanted]
    return []


def missing_alphas(losses: Mapping[float, float | None]) -> list[float]:
    """The multiples of r to try next as LoRA's alpha, by the loss of each at its own best rate: 1, 2, 4 .. and on."""
    if not losses:
        return [2.0, 1.0, 4.0, 8.0, 16.0]
    found = {alpha: math.inf if loss is None or loss != loss else loss for alpha, loss in losses.items()}
    best = min(found, key=lambda alpha: (found[alpha], alpha))
    return [alpha for alpha in (best / 2, best * 2) if alpha not in found and 2**-4 <= alpha <= 2**8]


def is_inside(losses: Mapping[float, float | None]) -> bool:
    """Whether the best has a worse neighbour on both sides."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        return False
    best = min(finite, key=lambda rate: (finite[rate], rate))
    return min(losses) < best < max(losses)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any of them is."""
    return None if None in values or not values else math.fsum(v for v in values if v is not None) / len(values)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
