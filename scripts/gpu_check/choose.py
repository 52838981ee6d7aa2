"""The table of which WKV kernels a call on CUDA takes, from measured rows: choose.py ROWS TABLE [--write].

ROWS holds rows of benchmarks/wkv.py, TABLE is src/rwkv_bone/ops/choice.json; ops/choice.py describes its rules. Of each
operator, head size and card, the fastest form in bf16 at every measured number of tokens and heads becomes a rule
that reaches halfway, in powers of two, to the next measured number. The rules of other cards stay, after the new ones.
The table is written as choice.json beside ROWS, or, with --write, in place of TABLE.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from rwkv_bone.ops.choice import parse  # noqa: E402

LABELS = ("exact", "chunked32", "chunked64")  # the first of those that are about as fast is taken
ABOUT = 1.03
STEP = 16  # tokens at which a rule may begin


class Point(NamedTuple):
    """What was measured for one size: tokens of a sequence, heads of all sequences, seconds of each label."""

    tokens: int
    heads: int
    seconds: dict[str, float]

    @property
    def winner(self) -> str:
        least = min(self.seconds.values())
        return next(label for label in LABELS if self.seconds.get(label, math.inf) <= ABOUT * least)

    def __str__(self) -> str:
        times = ", ".join(f"{label} {1e3 * self.seconds[label]:.2f}" for label in LABELS if label in self.seconds)
        return f"{times} ms at {self.tokens} tokens and {self.heads} heads"


def points(rows: Sequence[dict]) -> dict[tuple, list[Point]]:
    """{(operator, head size, capability, card): where more than one form was measured there}"""
    found: dict[tuple, dict[tuple[int, int], dict[str, float]]] = {}
    for row in rows:
        timed = row["what"] == "wkv" and row.get("capability") and row["form"] in LABELS
        if not timed or row["dtype"] != "bfloat16" or row["rows"] == "padded":
            continue
        B, T, H, N = row["shape"]
        sequences = row["documents"] or B
        card = (row["operator"], N, row["capability"], row["hardware"])
        size = (T // row["documents"] if row["documents"] else T, sequences * H)
        found.setdefault(card, {}).setdefault(size, {})[row["form"]] = row["seconds"]
    measured = {
        card: [Point(*size, seconds) for size, seconds in sorted(sizes.items()) if len(seconds) > 1]
        for card, sizes in found.items()
    }
    return {card: these for card, these in measured.items() if these}


def ranges(numbers: Sequence[int], step: int = 1) -> list[list[int | None]]:
    """[from, below] around each of the rising numbers: from 1 on, without end, and parted at the geometric means."""
    edges = [math.ceil(math.sqrt(a * b) / step) * step for a, b in zip(numbers, numbers[1:], strict=False)]
    return [list(pair) for pair in zip([1, *edges], [*edges, None], strict=True)]


def rules(operator: str, N: int, capability: str, card: str, measured: Sequence[Point]) -> list[dict]:
    """The rules of one card. Neighbours that take the same kernels are one rule."""
    tokens = sorted({point.tokens for point in measured})
    bands: list[tuple[list, list]] = []  # tokens from and below, and [heads from and below, label, points]
    for T, wide in zip(tokens, ranges(tokens, STEP), strict=True):
        here = [point for point in measured if point.tokens == T]
        parts: list[list] = []
        for point, heads in zip(here, ranges([point.heads for point in here]), strict=True):
            if parts and parts[-1][1] == point.winner:
                parts[-1][0][1] = heads[1]
                parts[-1][2].append(point)
            else:
                parts.append([heads, point.winner, [point]])
        if bands and [part[:2] for part in bands[-1][1]] == [part[:2] for part in parts]:
            bands[-1][0][1] = wide[1]
            for before, part in zip(bands[-1][1], parts, strict=True):
                before[2].extend(part[2])
        else:
            bands.append((wide, parts))
    return [
        {
            "operator": operator,
            "N": N,
            "kernels": label,
            "tokens": wide,
            "heads": heads,
            "capability": capability,
            "origin": f"measured on {card}",
            "why": "; ".join(map(str, why)),
        }
        for wide, parts in bands
        for heads, label, why in parts
    ]


def merged(table: Sequence[dict], measured: dict[tuple, list[Point]]) -> list[dict]:
    """The new rules, then those of the table that they do not replace."""
    new = [rule for card, these in measured.items() for rule in rules(*card, these)]
    replaced = {(rule["operator"], rule["N"], rule["capability"]) for rule in new}
    kept = [rule for rule in table if (rule["operator"], rule["N"], rule.get("capability")) not in replaced]
    return [*new, *kept]


def as_text(table: Sequence[dict]) -> str:
    return "[\n" + ",\n".join(f" {json.dumps(rule)}" for rule in table) + "\n]\n"


def main(rows_path: str, table_path: str, *flags: str) -> int:
    if set(flags) - {"--write"}:
        print(f"unknown: {' '.join(flags)}; expected ROWS TABLE [--write]", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in Path(rows_path).read_text(encoding="utf-8").splitlines()]
    measured = points(rows)
    if not measured:
        print("no two forms on CUDA were timed at one size in bf16: there is nothing to choose from")
        return 0
    table = merged(json.loads(Path(table_path).read_text(encoding="utf-8")), measured)
    for rule in table:
        parse(rule)  # as a run will
    target = Path(table_path) if flags else Path(rows_path).with_name("choice.json")
    target.write_text(as_text(table), encoding="utf-8")
    for rule in table:
        if (rule["operator"], rule["N"], rule.get("capability")) in {card[:3] for card in measured}:
            spans = " and ".join(
                f"{what} {rule[what][0]} to {'any' if rule[what][1] is None else rule[what][1] - 1}"
                for what in ("tokens", "heads")
            )
            print(f"{rule['operator']} {rule['kernels']}: {spans}: {rule['why']}")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
