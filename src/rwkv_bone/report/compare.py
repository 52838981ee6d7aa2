"""One page of several runs: sh scripts/compare.sh RUN RUN ... [--output FILE]

Curves in the same axes, results in a table with the best of each measure marked, and the settings that differ. Of a
single run it makes the page anew, as for one that was killed.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_bone.config import setting
from rwkv_bone.config.fields import check_values
from rwkv_bone.config.flags import parse_section
from rwkv_bone.console import counted
from rwkv_bone.errors import UserError, exit_status
from rwkv_bone.report import charts, page, plane, preferences, sections
from rwkv_bone.report.html import Html, change, duration, join, loss, number, percent, table, tag
from rwkv_bone.report.run import CONFIG, DIVERGENCE, GAP, LOG, RUNNING, Run, changed, holds_run, read

PROGRAM = "sh scripts/compare.sh"
DESCRIPTION = "Make one page of several runs: their curves, results, and the settings that differ."
EXAMPLES = (
    ("two runs", "sh scripts/compare.sh --runs out/bone out/lora"),
    ("every run of a folder, into a page of another name", "sh scripts/compare.sh --runs out/* --output lr.html"),
    ("the page of one run anew, such as of one that was killed", "sh scripts/compare.sh --runs out/bone"),
)
MARK = "\N{BLACK STAR}"


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = setting((), "results folders of the runs; the word --runs may be left out before the first")
    output: str = setting("", "page to write; empty = compare.html, or report.html in the folder of a single run")

    def __post_init__(self):
        check_values(self)
        if not self.runs:
            raise UserError("--runs is missing: expected the results folders of two runs or more, such as out/a out/b")


def parse(argv: list[str], prog: str = PROGRAM) -> CompareConfig:
    """The comparison that `argv` asks for; UserError for anything unknown or missing."""
    words = ["--runs", *argv] if argv and not argv[0].startswith("-") else argv
    return parse_section(prog, DESCRIPTION, CompareConfig, words, examples=EXAMPLES)


def compare(config: CompareConfig) -> list[str]:
    """Write the page, and return what to say; UserError for a folder without a run, or an output that is no page."""
    folders = [Path(name) for name in config.runs]
    for folder in folders:
        check(folder)
    output = Path(config.output or (folders[0] / page.PAGE if len(folders) == 1 else "compare.html"))
    if output.exists() and not is_page(output):
        raise UserError(f"--output {output} exists and is no page of ours: it is kept; give another name")
    runs = [read(folder) for folder in folders]
    if len(runs) == 1:
        page.save(output, page.of_run(runs[0], changed(folders[0])))
        return [*(f"note: {problem}" for problem in runs[0].problems), f"output    {output}: open it in a browser"]
    labels = named(folders)
    page.save(output, of_runs(runs, labels, time.time()))
    notes = [*preferences.differing(runs, labels), *differing_data(runs, labels), *problems(runs, labels)]
    return [*(f"note: {note}" for note in notes), f"output    {output}, {len(runs)} runs: open it in a browser"]


def check(folder: Path) -> None:
    """UserError if a folder holds no run."""
    if holds_run(folder):
        return
    found = "there is no such folder" if not folder.exists() else "it is a file" if folder.is_file() else "it has none"
    inside = [path.parent.name for path in sorted(folder.glob(f"*/{LOG}"))] if folder.is_dir() else []
    hint = f"; runs are in it: {', '.join(inside[:5])}" if inside else ""
    raise UserError(f"{folder} holds no run: expected a results folder, with {LOG} or {CONFIG}; {found}{hint}")


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours, which may be replaced."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(len(page.MARK)) == page.MARK
    except OSError:
        return False


def named(folders: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, or the whole path where that is not one of a kind."""
    count = Counter(folder.resolve().name for folder in folders)
    names = [folder.resolve().name if count[folder.resolve().name] == 1 else str(folder) for folder in folders]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


class Measure(NamedTuple):
    """A column of the table of results."""

    name: str
    value: Callable[[Run], float | None]
    shown: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None  # min or max; None: none is better
    heldout: bool = False  # means nothing between runs whose held-out data differ
    kind: Callable[[Run], object] = lambda run: None  # runs are judged only where this is the same


def _exact(run: Run) -> float | None:
    shares = [one.sets[run.main].exact for one in run.measurements if run.main in one.sets]
    return shares[-1] if shares else None


def _sum(column: str) -> Callable[[Run], float | None]:
    return lambda run: float(np.nansum(run.columns[column])) if run.columns else None


def _speed(run: Run) -> float | None:
    tokens, seconds = _sum("tokens")(run), _sum("seconds")(run)
    return tokens / seconds if tokens and seconds else None


def _memory(run: Run) -> float | None:
    for column in ("peak_reserved_mb", "peak_memory_mb"):
        values = run.columns.get(column, np.zeros(0))
        if np.isfinite(values).any():
            return float(np.nanmax(values))
    return None


def _figure(name: str) -> Callable[[Run], float | None]:
    return lambda run: ends[-1][1] if (ends := run.ends(name)) else None


def _task(run: Run) -> object:
    return run.task


MEASURES = (
    Measure("steps", lambda run: run.last_step, lambda value: f"{value:,.0f}"),
    Measure("loss before", lambda run: first[1] if (first := run.first()) else None, loss, None, True),
    Measure("best loss", lambda run: best[1] if (best := run.best()) else None, loss, min, True, _task),
    Measure("loss after", lambda run: last[1] if (last := run.last()) else None, loss, min, True, _task),
    Measure("accuracy", _figure("reward_accuracy"), percent, max, True, preferences.order),
    Measure("margin", _figure("reward_margin"), loss, max, True, preferences.scale),
    Measure("gap", _figure(GAP), loss, max, True),
    Measure("divergence", _figure(DIVERGENCE), loss, min, True),
    Measure("exact answers", _exact, percent, max, True),
    Measure("forgetting", lambda run: run.forgotten(), change, min),
    Measure("time", _sum("seconds"), duration, min),
    Measure("tokens", _sum("tokens"), lambda value: f"{value:,.0f}"),
    Measure("tokens per second", _speed, number, max),
    Measure("peak memory, MiB", _memory, lambda value: f"{value:,.0f}", min),
)


def of_runs(runs: Sequence[Run], labels: Sequence[str], now: float) -> str:
    """The page of several runs. now: seconds since 1970."""
    drawn = charts.charts_of(runs, labels)
    differing = differing_data(runs, labels)
    tasks = preferences.differing(runs, labels)
    tables = join(
        *(
            sections.details(
                f"Numbers of {label}", sections.measured(run), sections.curve_tables(run, max(20 // len(runs), 5))
            )
            for run, label in zip(runs, labels, strict=True)
        )
    )
    body = [
        sections.section(
            "numbers",
            "Results",
            results(runs, labels, comparable=not differing),
            sections.lacking([*tasks, *differing, *problems(runs, labels)]),
        ),
        sections.section("preferences", "Preferences", in_words(runs, labels, preferences.in_words)),
        sections.curves(drawn, tables),
        forgetting(runs, labels),
        settings(runs, labels),
        answers(runs, labels),
        warnings(runs, labels),
    ]
    head = join(
        tag("h1", f"{len(runs)} runs compared"),
        tag("p", "As of ", page.moment(now)),
        tag(
            "ul",
            *(
                tag(
                    "li",
                    tag("i", class_=f"swatch b{number % charts.COLORS}"),
                    tag("b", label),
                    f" {sections.what(run)}, {run.folder}",
                )
                for number, (run, label) in enumerate(zip(runs, labels, strict=True))
            ),
            class_="runs",
        ),
    )
    return page.html(f"{len(runs)} runs", head, body, drawn)


def results(runs: Sequence[Run], labels: Sequence[str], comparable: bool) -> Html:
    """A row for each run; the best of a column is marked. comparable: whether the held-out data are the same."""
    columns, heads = [], []
    for measure in MEASURES:
        values = [_finite(measure.value(run)) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        # One that is alone, or equal to all others, is not the best of anything.
        kinds = {measure.kind(run) for run, value in zip(runs, values, strict=True) if value is not None}
        judged = measure.best and len(set(known)) > 1 and len(kinds) == 1 and (comparable or not measure.heldout)
        best = measure.best(known) if judged and measure.best else None
        columns.append([_cell(measure, value, best) for value in values])
        heads.append(measure.name)
    rows = [[label, state(run), *cells] for label, run, *cells in zip(labels, runs, *columns, strict=True)]
    note = tag("p", f"{MARK} the best of its column", class_="muted")
    return join(table(["run", "state", *heads], rows, "Results"), note)


def state(run: Run) -> Html | str:
    """The state of a run; of one that never said it had ended, when it was last heard of."""
    words = sections.STATES.get(run.state, run.state)
    return join(words, " as of ", page.moment(changed(run.folder))) if run.state == RUNNING else words


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cell(measure: Measure, value: float | None, best: float | None) -> Html | str:
    words = measure.shown(value) if value is not None else "\N{EN DASH}"
    return tag("span", f"{MARK} {words}", class_="best") if value is not None and value == best else words


def differing_data(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """A line where runs were measured on different held-out data, or it is not known on which."""
    groups: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        if run.measurements:
            groups.setdefault(run.data, []).append(label)
    unknown = groups.pop("", [])
    lines = []
    if len(groups) > 1:
        parts = "; ".join(", ".join(group) for group in groups.values())
        lines.append(f"the held-out data differ ({parts}): losses and exact answers cannot be compared between these")
    if unknown and (groups or len(unknown) > 1):
        lines.append(
            f"on which held-out data these were measured is not known, compare with care: {', '.join(unknown)}"
        )
    return lines


def problems(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    return [f"{label}: {line}" for run, label in zip(runs, labels, strict=True) for line in run.problems]


def forgetting(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    """A drawing for each task, whose held-out losses are of one kind."""
    tasks: dict[str, list[plane.Path]] = {}
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        way = sections.path_of(run, label, i % charts.COLORS)
        if way and len(way.points) > 1:
            tasks.setdefault(run.task, []).append(way)
    drawn = [plane.draw(ways) for ways in tasks.values()]
    if len(drawn) > 1:
        each = zip(tasks, drawn, strict=True)
        drawn = [tag("div", *(tag("div", tag("h3", f"--task {task}"), one) for task, one in each), class_="pair")]
    return sections.section("learnt", "Learnt and forgotten", *drawn, in_words(runs, labels, sections.in_words))


def in_words(runs: Sequence[Run], labels: Sequence[str], words: Callable[[Run], str]) -> Html:
    """What `words` says of each run, after its name."""
    items = [
        tag("li", tag("b", label), ": ", said) for run, label in zip(runs, labels, strict=True) if (said := words(run))
    ]
    return tag("ul", *items) if items else Html("")


def settings(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    """The settings in which the runs differ."""
    flat = [{name: value for values in run.config.values() for name, value in values.items()} for run in runs]
    # Each run has a folder of its own.
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if name != "proj_dir"]
    values = [[sections.shown(one[name]) if name in one else "not known" for one in flat] for name in names]
    rows = [[tag("code", f"--{name}"), *words] for name, words in zip(names, values, strict=True) if len({*words}) > 1]
    same = tag("p", f"{counted(len(names) - len(rows), 'setting')} are the same in all runs.", class_="muted")
    shown = table(["setting", *labels], rows, "Settings that differ", numbers=False) if rows else ""
    return sections.section("settings", "Settings", shown, same) if names else Html("")


def answers(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    """The newest answer of each run to the prompts that all of them were asked."""
    asked = [{(one.of, one.prompt): one for one in sorted(run.answers, key=lambda one: one.step)} for run in runs]
    common = [key for key in asked[0] if all(key in one for one in asked)] if asked else []
    parts = []
    for key in common[: sections.PROMPTS]:
        expected = asked[0][key].expected
        rows = [
            tag(
                "li",
                tag("span", f"{label}, step {one[key].step:,}", class_="step"),
                sections.said(one[key].text),
                tag("span", " \N{CHECK MARK} right", class_="right") if one[key].right else "",
            )
            for one, label in zip(asked, labels, strict=True)
        ]
        parts.append(
            tag(
                "article",
                tag("p", tag("span", "prompt", class_="step"), sections.said(key[1])),
                tag("p", tag("span", "expected", class_="step"), sections.said(expected))
                if expected is not None
                else "",
                tag("ol", *rows),
                class_="sample",
            )
        )
    return sections.section("samples", "Newest answers", *parts) if parts else Html("")


def warnings(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    items = [
        tag(
            "li",
            tag("b", f"{label}, step {one['step']:,}: "),
            one["warning"],
            tag("span", one["remedy"], class_="remedy"),
        )
        for run, label in zip(runs, labels, strict=True)
        for one in run.warnings
    ]
    return sections.section("warnings", "Warnings", tag("ul", *items)) if items else Html("")


def main(prog: str = PROGRAM) -> int:
    return exit_status(lambda: print("\n".join(compare(parse(sys.argv[1:], prog)))))


if __name__ == "__main__":
    sys.exit(main())
