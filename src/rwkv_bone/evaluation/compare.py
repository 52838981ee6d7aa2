"""Two evaluations on the same items: sh scripts/compare.sh A B, where both folders hold answers.jsonl.

Items are the same where question and right answer are the same. Those of one evaluation alone are counted and named,
and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_bone.config import setting
from rwkv_bone.config.fields import check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.console import counted
from rwkv_bone.errors import UserError, exit_status
from rwkv_bone.evaluation.answers import ANEW, ANSWERS, CONFIG, Record, read_config, records_of
from rwkv_bone.evaluation.statistics import mcnemar, mean_interval, paired_difference

PROGRAM = "sh scripts/compare.sh"
DESCRIPTION = "Compare two evaluations on the same items: McNemar's exact test, and the difference with its interval."
EXAMPLES = (("a model with and without an adapter", "sh scripts/compare.sh --runs out/base out/adapted"),)
NAMED = 8  # items that are named


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = setting((), "the two folders of evaluations; the word --runs may be left out")

    def __post_init__(self):
        check_values(self)


class Evaluation(NamedTuple):
    """A finished or unfinished evaluation. items: {(hash, how often it came before): its records}."""

    folder: Path
    config: dict[str, Any]
    items: dict[tuple[str, int], list[Record]]

    @property
    def task(self) -> str:
        return self.config["settings"]["task"]


def read(folder: Path) -> Evaluation:
    """UserError for a folder that holds no evaluation."""
    config = read_config(folder) if folder.is_dir() else None
    if config is None or not (folder / ANSWERS).is_file():
        lacks = f"it has no {ANSWERS}" if config else f"it has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} holds no evaluation ({lacks}): expected the --output of sh scripts/evaluate.sh")
    items: dict[tuple[str, int], list[Record]] = {}
    task, samples = config["settings"]["task"], config["settings"]["samples"]
    needed = {"item", "hash", *(("nats", "bytes") if task == "perplexity" else ("right",))}
    seen: dict[str, set[int]] = {}
    for number, record in enumerate(records_of(folder / ANSWERS)[0], 1):
        if missing := sorted(needed - record.keys()):
            raise UserError(f"{folder / ANSWERS}:{number}: no {', '.join(missing)}: of another version; {ANEW}")
        of = seen.setdefault(record["hash"], set())
        of.add(record["item"])
        items.setdefault((record["hash"], len(of)), []).append(record)
    if not items:
        raise UserError(f"{folder} has no answers yet: run its sh scripts/evaluate.sh again, which goes on")
    return Evaluation(folder, config, {key: item for key, item in items.items() if len(item) == samples})


def compare(folders: Sequence[str]) -> Iterator[str]:
    """The lines of the comparison. UserError where there is nothing to compare."""
    if len(folders) != 2:
        raise UserError(f"--runs {' '.join(folders)}: evaluations are compared two at a time")
    if len({Path(folder).resolve() for folder in folders}) == 1:
        raise UserError(f"--runs {' '.join(folders)}: that is the same folder twice: expected two evaluations")
    a, b = (read(Path(folder)) for folder in folders)
    if a.task != b.task:
        raise UserError(f"{a.folder} is of --task {a.task}, {b.folder} of --task {b.task}: expected the same task")
    both = [key for key in a.items if key in b.items]
    if not both:
        raise UserError(f"{a.folder} and {b.folder} have no item in common: expected the same rows")
    for name, one in (("A", a), ("B", b)):
        yield f"{name}  {one.folder}: {one.config['model']}"
    yield ""
    yield f"{a.task}, {counted(len(both), 'item')} in both"
    for name, one, other in (("A", a, b), ("B", b, a)):
        if sum(map(len, one.items.values())) < one.config["answers"]:
            yield f"note: {name} is not finished: {len(one.items):,} of its items are answered"
        alone = [item[0]["item"] for key, item in one.items.items() if key not in other.items]
        if alone:
            rows = ", ".join(map(str, alone[:NAMED])) + ", ..." * (len(alone) > NAMED)
            yield f"left out: {counted(len(alone), 'item')} of {name} alone (rows {rows})"
    pairs = [(a.items[key], b.items[key]) for key in both]
    yield ""
    yield from _differing(a, b)
    if a.task == "perplexity":
        yield from _of_texts(pairs)
        return
    unjudged = [
        name for name, place in (("A", 0), ("B", 1)) if any(one["right"] is None for p in pairs for one in p[place])
    ]
    if unjudged:
        raise UserError(
            f"{' and '.join(unjudged)} are not judged: run sh scripts/evaluate.sh again with --execute_code 1"
        )
    if all(len(item) == 1 for pair in pairs for item in pair):
        yield from _of_items([(bool(x[0]["right"]), bool(y[0]["right"])) for x, y in pairs])
    else:
        yield from _of_samples(pairs)


def _differing(a: Evaluation, b: Evaluation) -> Iterator[str]:
    """The settings that differ, besides those that name files."""
    left_out = {"output", "overwrite", "load_model", "adapter", "batch", "execute_code"}
    one, other = a.config["settings"], b.config["settings"]
    for name in one:
        if name not in left_out and one[name] != other.get(name):
            yield f"note: --{name} differs: {one[name] or '(empty)'} and {other.get(name) or '(empty)'}"


def _of_items(right: Sequence[tuple[bool, bool]]) -> Iterator[str]:
    counts = {cell: right.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))}
    rows: list[tuple[str, ...]] = [("", "B right", "B wrong", "all")]
    for name, x in (("A right", True), ("A wrong", False)):
        cells = [counts[x, True], counts[x, False]]
        rows.append((name, *(f"{count:,}" for count in (*cells, sum(cells)))))
    of_b = [sum(y for _, y in right), sum(not y for _, y in right)]
    rows.append(("all", *(f"{count:,}" for count in (*of_b, len(right)))))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            [row[0].ljust(wide[0]), *(cell.rjust(size) for cell, size in zip(row[1:], wide[1:], strict=True))]
        )
    only_a, only_b, total = counts[True, False], counts[False, True], len(right)
    shares = [sum(pair[place] for pair in right) / total for place in (0, 1)]
    # B minus A: what the second has gained.
    difference, low, high = paired_difference(only_b, only_a, total)
    yield ""
    yield f"A           {100 * shares[0]:.1f} %"
    yield f"B           {100 * shares[1]:.1f} %"
    yield f"B - A       {100 * difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    yield f"McNemar's exact test: {only_a:,} right in A alone, {only_b:,} in B alone: p = {mcnemar(only_a, only_b):.3g}"


def _of_samples(pairs: Sequence[tuple[list[Record], list[Record]]]) -> Iterator[str]:
    """Of several answers to each question: the mean difference over items."""
    shares = [[sum(one["right"] for one in item) / len(item) for item in pair] for pair in pairs]
    mean, low, high = mean_interval([y - x for x, y in shares])
    for name, place in (("A", 0), ("B", 1)):
        yield f"{name}           {100 * sum(share[place] for share in shares) / len(shares):.1f} %, mean of samples"
    yield f"B - A       {100 * mean:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, t over items)"
    yield "McNemar's test needs one answer to each question: none is made of several samples"


def _of_texts(pairs: Sequence[tuple[list[Record], list[Record]]]) -> Iterator[str]:
    """Of perplexities: nats per byte of each text."""
    rates = [[one[0]["nats"] / one[0]["bytes"] for one in pair] for pair in pairs]
    for name, place in (("A", 0), ("B", 1)):
        size = sum(pair[place][0]["bytes"] for pair in pairs)
        yield f"{name}           {sum(pair[place][0]['nats'] for pair in pairs) / size:.4f} nats per byte"
    if len(rates) > 1:
        mean, low, high = mean_interval([y - x for x, y in rates])
        yield f"B - A       {mean:+.4f} nats per byte, mean of texts (95 % interval {low:+.4f} to {high:+.4f})"


def main(prog: str = PROGRAM) -> int:
    def body() -> None:
        argv = sys.argv[1:]
        words = ["--runs", *argv] if argv and not argv[0].startswith("-") else argv
        config = parse_section(prog, DESCRIPTION, CompareConfig, words, examples=EXAMPLES)
        print("\n".join(compare(config.runs)))

    return exit_status(body)


if __name__ == "__main__":
    sys.exit(main())
