"""From answers to a result, and the table of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from rwkv_bone.console import counted
from rwkv_bone.evaluation.answers import Record
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.statistics import majority, mean_interval, pass_at_k, wilson
from rwkv_bone.evaluation.tasks import EQUALITIES, Same, Task

CUT, EMPTY, NOTHING, UNJUDGED = "cut by length", "empty", "without an answer that the rule finds", "not judged"
# What --extract takes of an answer.
MARKS = {
    "auto": "whichever mark of an answer it has",
    "hashes": "the number behind ####",
    "flexible": "lm_eval's flexible match, the last number",
    "metamath": "what follows 'The answer is: '",
    "number": "the last number",
    "boxed": "the last \\boxed",
    "minerva": "Minerva's 'Final Answer'",
}
PASS_AT = (1, 5, 10, 50, 100)


def result_of(cfg: EvaluateConfig, task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """{"task", "items", "samples", "scores": {name: {"value", "low", "high", "right", "of"}}, "counts": {what: n}}.

    Scores are shares of 1 with the 95 % interval: Wilson's where each item is right or wrong, Student's t over items
    for means. Of a perplexity they are nats and bits.
    """
    items = [list(group) for _, group in groupby(records, key=lambda record: record["item"])]
    result: dict[str, Any] = {"task": task.name, "items": len(items), "samples": cfg.samples}
    if task.name == "perplexity":
        tokens = sum(record["tokens"] for record in records)
        return result | {"scores": _perplexity(records), "counts": {}, "tokens": tokens}
    counts = Counter[str]()
    for record in records:
        counts[CUT] += record.get("finish_reason") == "length"
        counts[EMPTY] += "text" in record and not record["text"].strip()
        counts[NOTHING] += bool(record.get("text", "").strip()) and record["answer"] is None
        counts[UNJUDGED] += record["right"] is None
    scores = {} if counts[UNJUDGED] else _shares(cfg, task, items)
    written = {"tokens": sum(record["tokens"] for record in records)} if task.written else {}
    return result | {"scores": scores, "counts": dict(+counts), **written}


def _shares(cfg: EvaluateConfig, task: Task, items: list[list[Record]]) -> dict[str, Any]:
    right = [sum(record["right"] for record in item) for item in items]
    k = cfg.samples
    if k == 1:
        scores = {"accuracy": _share(right)}
        if task.name == "choice":
            scores["accuracy, by length"] = _share([item[0]["right_normed"] for item in items])
        return scores
    scores = {"accuracy, mean of samples": _mean([count / k for count in right])}
    if task.rules or task.name == "exact":
        same = task.rules[cfg.extract].same if task.rules else str.__eq__
        scores[f"maj@{k}"] = _share([_majority_right(same, item) for item in items])
    for n in sorted({n for n in PASS_AT if n <= k} | {k}):
        scores[f"pass@{n}"] = _mean([pass_at_k(k, count, n) for count in right])
    return scores


def _majority_right(same: Same, item: list[Record]) -> bool:
    """Whether the answer that most samples give is right."""
    answers = [record["answer"] for record in item]
    found = majority(answers, same)
    return found is not None and bool(item[answers.index(found)]["right"])


def _share(right: Sequence[bool | int]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    return {"value": sum(right) / len(right), "low": low, "high": high, "right": int(sum(right)), "of": len(right)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(values)
    if mean in (0, 1):  # no spread is seen, which does not mean that there is none
        low, high = wilson(round(mean) * len(values), len(values))
    known = math.isfinite(low)
    return {"value": mean, "low": max(0.0, low) if known else None, "high": min(1.0, high) if known else None}


def _perplexity(records: Sequence[Record]) -> dict[str, Any]:
    """Nats and bits of all texts together; the interval is over texts, where there are several."""
    scores = {}
    for unit, factor in (("nats per byte", 1.0), ("bits per byte", 1 / math.log(2)), ("nats per token", 1.0)):
        sizes = [record["tokens" if unit == "nats per token" else "bytes"] for record in records]
        scores[unit] = _ratio([record["nats"] * factor for record in records], sizes)
    token = scores["nats per token"]
    scores["perplexity per token"] = {name: None if x is None else math.exp(min(x, 700)) for name, x in token.items()}
    return scores


def _ratio(parts: Sequence[float], sizes: Sequence[int]) -> dict[str, Any]:
    """The ratio of two sums, with the interval that the spread of single texts about it gives (Cochran 1977, 6.3)."""
    ratio, mean = sum(parts) / sum(sizes), fmean(sizes)
    if len(parts) < 2:
        return {"value": ratio, "low": None, "high": None}
    residue = [(part - ratio * size) / mean for part, size in zip(parts, sizes, strict=True)]
    _, low, high = mean_interval(residue)
    return {"value": ratio, "low": ratio + low, "high": ratio + high}


def judged_by(cfg: EvaluateConfig, task: Task) -> str:
    """How answers are judged, in words; empty for a perplexity."""
    if task.rules:
        return f"{MARKS[cfg.extract]}; {EQUALITIES[task.rules[cfg.extract].same]} (--extract {cfg.extract})"
    return {
        "exact": "the whole answer, letter by letter",
        "humaneval": "the task's tests" if cfg.execute_code else "nothing yet (--execute_code 0)",
        "choice": "the likeliest choice",
    }.get(task.name, "")


def table_of(task: Task, result: dict[str, Any]) -> list[str]:
    """The result as lines for a terminal."""
    scores, counts = result["scores"], result["counts"]
    share = task.name != "perplexity"
    rows = [("", "score", "95 % interval", "right")] if scores else []
    for name, score in scores.items():
        right = f"{score['right']:,} of {score['of']:,}" if "right" in score else ""
        low, high = score["low"], score["high"]
        interval = "-" if low is None else f"{_shown(low, share, False)} to {_shown(high, share)}"
        rows.append((name, _shown(score["value"], share), interval, right))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)).rstrip() for row in rows]
    if UNJUDGED in counts:
        code = counted(counts[UNJUDGED], "answer")
        lines.append(f"no score  {code} not judged: --execute_code 1 runs the code that the model has written, here")
    asked = result["items"] * result["samples"]
    told = [what for what in (CUT, EMPTY, NOTHING) if what in counts]
    lines += [f"          {counts[what]:,} of {asked:,} {what}" for what in told]
    if skipped := counts.get("rows skipped"):
        lines.append(f"          {counted(skipped, 'row')} skipped (--bad_rows skip)")
    return lines


def _shown(value: float, share: bool, unit: bool = True) -> str:
    return f"{100 * value:.1f}{' %' if unit else ''}" if share else f"{value:.4f}"
