"""The tables of docs/bone-or-lora.md, made from the rows of a comparison.

python -m benchmarks.convergence.tables [--runs benchmarks/results/convergence.jsonl]     print them
python -m benchmarks.convergence.tables --write docs/bone-or-lora.md                       put them into the page
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

from benchmarks.convergence import statistics as s  # noqa: E402
from benchmarks.convergence.statistics import ARMS, Arm, Paired, Row  # noqa: E402
from benchmarks.convergence.step_size import output, scale_of  # noqa: E402
from rwkv_bone.config.pages import renewed, table  # noqa: E402
from rwkv_bone.config.rates import auto_rate  # noqa: E402
from rwkv_bone.config.sections import AdapterConfig  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "convergence.jsonl"
ENOUGH = 0.05  # p, after correction
FEWEST = 3  # pairs: with two, a chance likeness makes the smallest p of all
NONE = "–"
BONE = ARMS[0]


def tasks(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows without those of other ranks and the like) of every task and base, in the order of their coming."""
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in rows):
        name = task if model in ("bundled", "reverse") else f"{task}, {model} base"
        yield name, [row for row in rows if (row["task"], row["model"]) == (task, model)]


def best(rows: Sequence[Row]) -> str:
    """Every arm at its chosen rate: loss, forgetting, cost."""
    made = []
    for name, mine in tasks(rows):
        for arm in ARMS:
            if not (key := s.chosen(arm.of(mine))):
                continue
            runs = s.at_best(arm.of(mine))
            losses = s.tested(arm.of(mine))
            rates = s.by_rate([row for row in arm.of(mine) if row["alpha"] == key[1]])
            inside = min(rates) < key[0] < max(rates)
            exact = [s.last(row, "exact") for row in runs if row["points"][-1].get("exact") is not None]
            made.append(
                (
                    name,
                    arm.name,
                    f"{runs[0]['trainable']:,}",
                    f"{key[0]:.2g}{'' if inside else ' (at an end)'}",
                    NONE if key[1] is None else f"{key[1]:g} r",
                    str(len(losses)),
                    interval(list(losses.values()), ".4f"),
                    interval(list(s.tested(arm.of(mine), "forgetting").values()), "+.2f"),
                    f"{100 * sum(exact) / len(exact):.0f} %" if exact and any(exact) else NONE,
                    f"{median([row['step_ms'] for row in runs]):.0f}",
                    f"{median([row['peak_mb'] for row in runs]):.0f}",
                )
            )
    head = "task | method | trained | rate | alpha | seeds | held-out loss | forgetting | exact | step, ms | peak, MB"
    return table(head, made)


def comparisons(rows: Sequence[Row]) -> str:
    """Bone against every other arm, each at its chosen rate: held-out loss over the seeds nothing was chosen by."""
    found = []
    for name, mine in tasks(rows):
        ours = s.tested(BONE.of(mine))
        for arm in ARMS[1:]:
            if (result := s.paired(ours, s.tested(arm.of(mine)))) and result.pairs >= FEWEST:
                found.append((name, arm.name, result))
    made = [
        (name, arm, relative(result), *tests(result, p))
        for (name, arm, result), p in zip(found, s.holm([one.p for *_, one in found]), strict=True)
    ]
    return table(
        "task | Bone against | held-out loss, Bone's less the other's | p | p, Holm | p, signs | Bone wins", made
    )


def forgetting(rows: Sequence[Row]) -> str:
    """Bone against every other arm: forgetting where a run's held-out loss falls to a level that most reach."""
    found = []
    for name, mine in tasks(rows):
        runs = {arm: [row for row in s.at_best(arm.of(mine)) if row["seed"] not in s.SELECTION] for arm in ARMS}
        level = s.common_level(runs.values())
        ours = s.on_the_way(runs[BONE], level)
        for arm in ARMS[1:]:
            theirs = s.on_the_way(runs[arm], level)
            if (result := s.paired(ours, theirs, ratio=False)) and result.pairs >= FEWEST:
                found.append((name, level, arm.name, ours, theirs, result))
    corrected = s.holm([one[-1].p for one in found])
    made = [
        (
            name,
            f"{level:.3f}",
            arm,
            f"{mean(ours):+.2f}, {mean(theirs):+.2f}",
            f"{result.pairs} of {max(len(ours), len(theirs))}",
            f"{result.difference:+.2f} [{result.low:+.2f}, {result.high:+.2f}]",
            f"{result.p:.2g}",
            f"{p:.2g}",
        )
        for (name, level, arm, ours, theirs, result), p in zip(found, corrected, strict=True)
    ]
    head = "task | at held-out loss | Bone against | forgetting, Bone, other | pairs | difference | p | p, Holm"
    return table(head, made)


def shared_rate(rows: Sequence[Row]) -> str:
    """Bone and LoRA with alpha 2r at Bone's best rate, and each at its own, first seed."""
    made = []
    for name, mine in tasks(rows):
        bone, lora = (s.by_rate([row for row in arm.of(mine) if row["seed"] == 0]) for arm in (BONE, ARMS[2]))
        if not bone or not lora:
            continue
        rate, own = min(bone, key=lambda r: bone[r]), min(lora, key=lambda r: lora[r])
        if rate not in lora:
            continue
        made.append(
            (
                name,
                f"{rate:.2g}",
                f"{bone[rate]:.4f}, {lora[rate]:.4f}",
                f"{100 * (bone[rate] / lora[rate] - 1):+.1f} %",
                f"{own:.2g}",
                f"{lora[own]:.4f}",
                f"{100 * (bone[rate] / lora[own] - 1):+.1f} %",
            )
        )
    head = "task | Bone's best rate | Bone, LoRA there | difference | LoRA's best rate | LoRA there | difference"
    return table(head, made)


def steps(rows: Sequence[Row]) -> str:
    """Where the best rate lies, as a rate and as how far the first step moves an output."""
    made = []
    for name, mine in tasks(rows):
        points = list(best_steps(mine))
        for method, alpha, rate, moved in points:
            made.append((name, method, alpha, f"{rate:.2g}", f"{moved:.3g}"))
        if len(points) > 2:
            spreads = [factor([point[column] for point in points]) for column in (2, 3)]
            made.append((name, "all: largest / smallest", "", f"{spreads[0]:.1f}", f"{spreads[1]:.1f}"))
    return table("task | method | alpha | best rate | output's move in its first step", made)


def best_steps(rows: Sequence[Row]) -> Iterator[tuple[str, str, float, float]]:
    """(method, alpha, best rate, what a number of the output can move in a step at it), where the best is inside."""
    keys = dict.fromkeys((row["method"], row["alpha"]) for row in rows if row["method"] in ("bone", "lora", "rslora"))
    for method, alpha in sorted(keys, key=lambda key: (key[0], key[1] or 0)):
        arm = Arm("", method, alpha)
        rate = s.best_rate(s.by_rate([row for row in arm.of(rows) if row["seed"] == 0], "development"))
        if rate is None:
            continue
        some = next(iter(arm.of(rows)))
        width, rank = some["width"], some["r"] if method == "bone" else rank_of(some)
        scale = 1.0 if method == "bone" else scale_of(method, rank, alpha)
        yield method, "" if alpha is None else f"{alpha:g} r", rate, rate * output(method, width, rank, scale)


def rank_of(row: Row) -> int:
    """The rank of a LoRA, about half of Bone's block size: by the parameters of both (`training.equal_rank`).

    Of a model whose channel mix is four times as wide as it, whose att has four square projections.
    """
    return max(1, round(row["r"] * 9 / 18))


def rates(rows: Sequence[Row]) -> str:
    """The best rate of every method on every base, what --lr_init auto would be, and what the difference costs."""
    made = []
    for name, mine in tasks(rows):
        for arm in (arm for arm in ARMS if arm.alpha is not None or arm.method != "lora"):
            runs = [row for row in arm.of(mine) if row["seed"] == 0]
            losses = {rate: loss for rate, loss in s.by_rate(runs, "development").items() if math.isfinite(loss)}
            if len(losses) < 3:
                continue
            top, rule = min(losses, key=lambda rate: losses[rate]), rule_for(arm.method, runs[0])
            near = [rate for rate, loss in losses.items() if loss < 1.05 * losses[top]]
            lost, there = s.by_rate(runs, "forgetting"), s.at_rate(losses, rule)
            cost = NONE if there is None else f"{100 * (there / losses[top] - 1):+.0f} %"
            kept = s.at_rate(lost, rule, logarithm=False)
            forgot = NONE if kept is None else f"{kept:+.2f}, {lost[top]:+.2f}"
            range_ = f"{min(near):.2g} to {max(near):.2g}"
            made.append((arm.name, name, str(runs[0]["width"]), f"{top:.2g}", range_, f"{rule:.2g}", cost, forgot))
    made.sort(key=lambda one: [arm.name for arm in ARMS].index(one[0]))
    head = (
        "method | task | width | best rate | within 5 % | --lr_init auto | loss there | forgetting there, at the best"
    )
    return table(head, made)


def rule_for(method: str, row: Row) -> float:
    """What --lr_init auto would be for a row's method."""
    kinds = {"bone": "bone", "bat": "bone", "lora": "lora", "rslora": "lora", "pissa": "pissa", "full": "none"}
    rank = rank_of(row)
    adapter = AdapterConfig(
        peft=kinds[method],
        bone_r=row["r"],
        lora_r=rank,
        lora_alpha=(row["alpha"] or 0) * rank,
        lora_rs=method == "rslora",
    )
    return auto_rate(adapter, row["width"])


def by_choice_of_rate(rows: Sequence[Row]) -> str:
    """The forgetting with which every arm reaches one held-out loss at the end of a run, by choice of its rate."""
    made = []
    for name, mine in tasks(rows):
        found = {arm: ends_by_rate(arm, mine) for arm in ARMS if arm.alpha is not None or arm.method != "lora"}
        least = [points[-1]["heldout"] for points in found.values() if points]
        level = 1.03 * max(least, default=math.inf)
        for arm, points in found.items():
            lost = s.forgetting_at({"points": points}, level)
            if lost is not None:
                made.append((name, f"{level:.4g}", arm.name, f"{lost:+.2f}"))
    return table("task | held-out loss at the end | method | forgetting", made)


def ends_by_rate(arm: Arm, rows: Sequence[Row]) -> list[Row]:
    """The ends of an arm's runs, first seed, from the lowest rate to the one of least loss, as points of a way."""
    runs = sorted((row for row in arm.of(rows) if row["seed"] == 0), key=lambda row: row["rate"])
    losses = [s.last(row, "heldout") for row in runs]
    if not any(math.isfinite(loss) for loss in losses):
        return []
    best = losses.index(min(losses))
    return [
        {"step": step, "heldout": s.last(row, "heldout"), "forgetting": s.last(row, "forgetting")}
        for step, row in enumerate(runs[: best + 1])
    ]


def variants(rows: Sequence[Row]) -> str:
    """What a change of Bone, or LoRA, does to held-out loss and forgetting, against the same without it, by seed."""
    found = []
    for name, mine in tasks(rows):
        for method, label, plain_arm in (("bone", "Bone", BONE), ("lora", "LoRA", ARMS[3])):
            if not (key := s.chosen(plain_arm.of(mine))):
                continue
            plain = {row["seed"]: row for row in s.at_best(plain_arm.of(mine))}
            for variant in dict.fromkeys(row["variant"] for row in mine if row["method"] == method and row["variant"]):
                runs = [row for row in Arm("", method, key[1], variant).of(mine) if row["rate"] == key[0]]
                changed = {row["seed"]: row for row in runs}
                if result := change(plain, changed):
                    found.append((name, label, variant, *result))
            for scale in sorted({one["scale"] for row in plain.values() for one in row.get("scaled") or ()}):
                if result := change(plain, scaled(plain, scale)):
                    found.append((name, label, f"adapter x {scale:g}", *result))
    corrected = s.holm([one[5].p for one in found])
    made = [
        (
            name,
            method,
            variant,
            str(loss.pairs),
            relative(loss),
            absolute(lost),
            absolute(equal),
            f"{equal.p:.2g}",
            f"{p:.2g}",
        )
        for (name, method, variant, loss, lost, equal), p in zip(found, corrected, strict=True)
    ]
    head = (
        "task | method | change | seeds | held-out loss | forgetting at the end | forgetting, less that of the plain "
        "run on its way, at this loss | p of the latter | p, Holm"
    )
    return table(head, made)


def scaled(runs: dict[int, Row], scale: float) -> dict[int, Row]:
    """The runs' ends with the finished adapter multiplied."""
    found = {}
    for seed, row in runs.items():
        for one in row.get("scaled") or ():
            if one["scale"] == scale:
                found[seed] = row | {"points": [{"step": row["steps"], **one}]}
    return found


def change(plain: dict[int, Row], changed: dict[int, Row]) -> tuple[Paired, Paired, Paired] | None:
    """(held-out loss, forgetting, forgetting at the loss that the changed run ends with), changed against plain.

    The last compares with the plain run on its way, where its held-out loss fell to the changed one's.
    """
    pairs = {seed: (changed[seed], plain[seed]) for seed in sorted(changed.keys() & plain.keys())}
    ends = [{seed: s.last(pair[side], "heldout") for seed, pair in pairs.items()} for side in (0, 1)]
    lost = [{seed: s.last(pair[side], "forgetting") for seed, pair in pairs.items()} for side in (0, 1)]
    # A changed run that ends lower than the plain one ever comes is compared with its end, where it forgets the least
    # of what it would at that loss.
    level = {seed: max(ends[0][seed], lowest(pairs[seed][1])) for seed in pairs}
    way = {seed: s.forgetting_at(pairs[seed][1], level[seed]) for seed in pairs}
    equal = {seed: value for seed, value in way.items() if value is not None}
    results = s.paired(*ends), s.paired(*lost, ratio=False), s.paired(lost[0], equal, ratio=False)
    if results[0] is None or results[1] is None or results[2] is None or results[2].pairs < FEWEST:
        return None
    return results[0], results[1], results[2]


def lowest(row: Row) -> float:
    """The lowest held-out loss that a run was measured with."""
    return min(point["heldout"] for point in row["points"] if point["heldout"] is not None)


def interval(values: Sequence[float], form: str) -> str:
    """Mean and interval of 95 %."""
    if not values:
        return NONE
    middle, low, high = s.mean_interval(values)
    return format(middle, form) + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def relative(result: Paired) -> str:
    """A difference of logarithms in per cent."""
    middle, low, high = (100 * math.expm1(value) for value in (result.difference, result.low, result.high))
    return f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]"


def absolute(result: Paired) -> str:
    return f"{result.difference:+.2f} [{result.low:+.2f}, {result.high:+.2f}]"


def tests(result: Paired, corrected: float) -> tuple[str, str, str, str]:
    """The cells of a comparison's tests; what is left after correction is bold."""
    p = f"{corrected:.2g}"
    bold = f"**{p}**" if corrected < ENOUGH else p
    return f"{result.p:.2g}", bold, f"{result.p_flips:.2g}", f"{result.wins:g} of {result.pairs}"


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values) if values else math.nan


def factor(values: Sequence[float]) -> float:
    """The largest of positive numbers over the smallest."""
    return max(values) / min(values)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "best": best,
    "comparisons": comparisons,
    "shared rate": shared_rate,
    "steps": steps,
    "rates": rates,
    "forgetting": forgetting,
    "by choice of rate": by_choice_of_rate,
    "variants": variants,
}


def begin(name: str) -> str:
    """The mark in the page after which a table goes."""
    return f"<!-- Made by python -m benchmarks.convergence.tables --write docs/bone-or-lora.md: {name} -->"


def filled(page: str, rows: Sequence[Row]) -> str:
    """The text of the page with its tables made from these rows."""
    for name, make in TABLES.items():
        page = renewed(page, begin(name), make(rows))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="the page to renew")
    options = parser.parse_args()
    rows = s.read(options.runs)
    if options.write:
        options.write.write_text(filled(options.write.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    for name, make in TABLES.items():
        print(f"\n{name}\n\n{make(rows)}")


if __name__ == "__main__":
    main()
