"""What of the data is not trained, and what share of it that is: said in a line each, and beyond a limit the run stops.

A share is one of the trained tokens where those are known, else one of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rwkv_bone.errors import UserError

WARNED = 0.1  # a larger share is said in a line of its own that begins with WARNING
WARNING = "warning: "


@dataclass(frozen=True)
class Lost:
    """Something of the data that is cut, dropped, left out or skipped."""

    what: str  # with its file, such as "mine.jsonl: cut at --ctx_len 128: 3 samples"
    share: float  # 0 to 1
    unit: str = "trained tokens"  # what it is a share of
    remedy: str = ""  # what to do about it, such as "raise --ctx_len"

    def sentence(self) -> str:
        return f"{self.what}, {percent(self.share)} of the {self.unit}"

    def line(self) -> str:
        """The sentence for the user, a warning if the share is large."""
        return f"{WARNING}{self.sentence()}" if self.share > WARNED else self.sentence()


def percent(share: float) -> str:
    """A share in words that never round something to nothing, nor nearly all to all."""
    if 0 < share < 0.001:
        return "less than 0.1%"
    return "more than 99.9%" if 0.999 < share < 1 else f"{share:.1%}"


def check_lost(name: str, lost: Iterable[Lost], limit: float, flag: str = "--max_lost") -> None:
    """UserError if all of `lost` together is more than the share `limit` of a file. flag: that of the limit."""
    found = [one for one in lost if one.share]
    kept = 1.0
    for unit in {one.unit for one in found}:
        kept *= 1 - min(sum(one.share for one in found if one.unit == unit), 1)
    if 1 - kept > limit:
        sentences = "; ".join(one.sentence().removeprefix(f"{name}: ") for one in found)
        remedies = ", ".join(dict.fromkeys(one.remedy for one in found if one.remedy))
        raise UserError(
            f"{name}: {percent(1 - kept)} of the data would not be trained, more than {flag} {limit:g} allows "
            f"({sentences}): {remedies}, or give {flag} 1 to go on all the same"
        )
