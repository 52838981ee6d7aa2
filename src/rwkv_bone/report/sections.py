"""The sections of a run's page: each is made of a `Run`, and empty where the run has nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_bone.config.fields import worded
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.console import counted
from rwkv_bone.report import charts, plane, preferences
from rwkv_bone.report.html import (
    NONE,
    Html,
    change,
    duration,
    join,
    loss,
    number,
    percent,
    shortened,
    shown,
    table,
    tag,
)
from rwkv_bone.report.run import DONE, FAILED, INTERRUPTED, RUNNING, UNITS, Answer, Run
from rwkv_bone.report.series import spread

PROMPTS, MEASUREMENTS, CHARACTERS = 8, 40, 600  # most that are shown of samples: prompts, rows of a table, text
SAMPLES, PIECES = 4, 4000  # of the training data, and pieces of one
WORDS = {"none": "Every weight", "state": "Initial state", "lora": "LoRA", "pissa": "PiSSA"}
STATES = {
    DONE: "done",
    RUNNING: "running",
    INTERRUPTED: "interrupted",
    FAILED: "ended by an error",
    "": "state not known",
}


def section(name: str, title: str, *content: Any) -> Html:
    """A section with its heading; nothing without content."""
    if not any(content):
        return Html("")
    return tag("section", tag("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")


def what(run: Run) -> str:
    """What was trained, in a few words: `Bone r 64 on rwkv7-tiny.pth`, with `DPO, ` before it."""
    kind = str(run.setting("peft"))
    if not kind:
        return "A run"
    if kind == "bone":
        words = f"{str(run.setting('bone_mode', 'bone')).capitalize()} r {run.setting('bone_r', 0)}"
    else:
        words = WORDS.get(kind, kind) + (f" r {run.setting('lora_r', 0)}" if kind in ("lora", "pissa") else "")
    base = str(run.setting("load_model"))
    words = f"{preferences.TASKS.get(run.task, run.task)}, {words}" if run.compares else words
    return f"{words} on {Path(base).name}" if base else f"{words}, from scratch"


def progress(run: Run) -> str:
    """`step 752 of 752`, and whether an end before the last step was meant."""
    total = run.total_steps
    words = f"step {run.last_step:,}" + (f" of {total:,}" if total else "")
    early = run.state == DONE and total is not None and run.last_step < total
    return f"{words}, stopped early" if early else words


def head(run: Run, now: Html) -> Html:
    """The head line: what, on what, how far, and as of when."""
    files = run.setting("data_file", [])
    trained_on = ", ".join(Path(str(name)).name for name in files[:3]) + f", {len(files) - 3} more" * (len(files) > 3)
    state = STATES.get(run.state, run.state)
    lines = [
        tag("p", tag("span", state, class_=f"state {run.state or 'unknown'}"), " ", progress(run), ", as of ", now),
        tag("p", f"Trained on {trained_on}; folder {run.folder}" if files else f"Folder {run.folder}", class_="muted"),
    ]
    return join(tag("h1", what(run)), *lines)


def figures(run: Run) -> list[tuple[str, str, str]]:
    """(name, figure, what it is) of the numbers that matter."""
    first, best, last, found = run.first(), run.best(), run.last(), []
    if first:
        found.append(("before", loss(first[1]), f"held-out loss, step {first[0]:,}"))
    if best:
        part = f", on {run.share_measured():.0%} of it" if run.share_measured() < 1 else ""
        found.append(("best", loss(best[1]), f"held-out loss, step {best[0]:,}{part}"))
    if last:
        found.append(("after" if run.state == DONE else "newest", loss(last[1]), f"held-out loss, step {last[0]:,}"))
    found += preferences.figures(run)
    exact = [(one.step, one.sets[run.main].exact) for one in run.measurements if run.main in one.sets]
    exact = [(step, share) for step, share in exact if share is not None]
    if exact:
        before = f"; step {exact[0][0]:,}: {percent(exact[0][1])}" if len(exact) > 1 else ""
        found.append(("exact answers", percent(exact[-1][1]), f"step {exact[-1][0]:,}{before}"))
    if (forgotten := run.forgotten()) is not None:
        general = run.losses(run.general)
        found.append(
            ("forgetting", change(forgotten), f"general text: {loss(general[0][1])} to {loss(general[-1][1])}")
        )
    if not first and len(run.steps):
        rows = charts.rows_of(run, "loss")
        if rows:
            found.append(
                ("training loss", loss(rows[-1][2]), f"mean of steps {rows[-1][0]:,.0f} to {rows[-1][1]:,.0f}")
            )
    if len(run.steps):
        seconds, tokens = np.nansum(run.columns["seconds"]), np.nansum(run.columns["tokens"])
        found.append(("time", duration(seconds), f"{number(tokens / seconds if seconds else None)} tokens per second"))
        if run.compares:
            units = np.nansum(run.column(UNITS))
            found.append(
                (f"{run.unit}s", f"{units:,.0f}", f"{number(units / seconds if seconds else None)} per second")
            )
        found.append(("tokens", f"{tokens:,.0f}", f"{np.nansum(run.columns['trained_tokens']):,.0f} of them trained"))
        memory = run.columns["peak_reserved_mb"]
        memory = run.columns["peak_memory_mb"] if np.isnan(memory).all() else memory
        if not np.isnan(memory).all():
            found.append(("memory", f"{np.nanmax(memory):,.0f} MiB", "peak of the main process"))
    return found


def numbers(run: Run) -> Html:
    tiles = [
        tag("div", tag("dt", name), tag("dd", tag("b", figure), tag("span", words, class_="muted")))
        for name, figure, words in figures(run)
    ]
    return tag("dl", *tiles, class_="tiles") if tiles else tag("p", "No step has been taken yet.")


def lacking(problems: Sequence[str]) -> Html:
    return tag("ul", *(tag("li", line) for line in problems), class_="lacking") if problems else Html("")


def warnings(run: Run) -> Html:
    items = [
        tag("li", tag("b", f"step {one['step']:,}: "), one["warning"], " ", tag("span", one["remedy"], class_="remedy"))
        for one in run.warnings
    ]
    return section("warnings", "Warnings", tag("ul", *items)) if items else Html("")


def following(run: Run) -> Html:
    """What to type next."""
    commands = [pair for pair in run.preview.get("next", []) if isinstance(pair, list) and len(pair) == 2]
    rows = [join(tag("dt", name), tag("dd", tag("code", command))) for name, command in commands]
    return section("next", "Next", tag("dl", *rows, class_="commands")) if rows else Html("")


def curves(drawn: Sequence[dict[str, Any]], tables: Html) -> Html:
    """A place for each chart, and the same numbers as tables."""
    if not drawn:
        return Html("")
    figures = [
        tag(
            "figure",
            tag("figcaption", tag("h3", one["title"]), tag("span", one["unit"], class_="muted")),
            tag("div", id=f"chart-{one['id']}", class_="chart"),
            tag("p", one["note"], class_="muted note"),
            class_="wide" if one["id"].startswith("loss") else None,
        )
        for one in drawn
    ]
    usage = (
        "Drag across a curve to look closer, double-click to see all. With the keyboard: Tab to a curve, arrow keys, "
        "Page Up and Page Down, Home and End move along it, + and - zoom, 0 shows all."
    )
    script = tag("p", "The curves need JavaScript; the tables below hold their numbers.", class_="without-script")
    help_ = tag("p", usage, class_="muted with-script")
    return section("curves", "Curves", script, tag("div", *figures, class_="figures with-script"), help_, tables)


def curve_tables(run: Run, most: int = 20) -> Html:
    """The columns of the log in at most `most` stretches."""
    parts = []
    columns = {
        "loss": ("Training loss", "loss"),
        **(
            {name: (f"Training: {words}", "") for name, (words, _) in preferences.SHOWN.items()} if run.compares else {}
        ),
        **{name: (title, unit) for name, (title, unit) in charts.OTHERS.items()},
    }
    for column, (title, _) in columns.items():
        rows = [
            [f"{first:,.0f} to {last:,.0f}", *(number(value, 5) for value in values)]
            for first, last, *values in charts.rows_of(run, column, most)
        ]
        if rows:
            parts.append(details(title, table(["steps", "mean", "lowest", "highest"], rows, title)))
    return join(*parts)


def details(title: str, *content: Any) -> Html:
    return tag("details", tag("summary", title), *content)


def measured(run: Run) -> Html:
    """Every set at every measurement, the best marked."""
    names = run.sets
    counts = [name for name in names if any(m.sets[name].exact is not None for m in run.measurements if name in m.sets)]
    compared = {column: preferences.SHOWN[column] for column in preferences.SHOWN if run.figures(column)}
    best, total = run.best(), len(run.measurements)
    # The first, the best and the last are always among those shown.
    place = [i for i, one in enumerate(run.measurements) if best and one.step == best[0]]
    shown = spread(total, MEASUREMENTS, tuple(place))
    rows = []
    for one in (run.measurements[i] for i in shown):
        row: list[Any] = [f"{one.step:,}" + (" (best)" if best and one.step == best[0] else "")]
        row += [loss(one.sets[name].loss) if name in one.sets else NONE for name in names]
        row += [percent(one.sets[name].exact) if name in one.sets else NONE for name in counts]
        figures = one.sets[run.main].figures if run.main in one.sets else {}
        row += [as_words(figures.get(column)) for column, (_, as_words) in compared.items()]
        rows.append(row)
    if not rows:
        return Html("")
    head = ["step", *(f"{name} loss" for name in names), *(f"{name} exact" for name in counts)]
    head += [name for name, _ in compared.values()]
    caption = "Held-out measurements" + (f", {len(shown)} of {total:,}" if len(shown) < total else "")
    return table(head, rows, caption)


def path_of(run: Run, label: str = "", color: int = 0) -> plane.Path | None:
    """The way of a run between learning and forgetting; None where one of them was not measured."""
    general, best = dict(run.losses(run.general)), run.best()
    both = [(step, held) for step, held in run.losses(run.main) if step in general and run.general != run.main]
    finite = [(step, held) for step, held in both if np.isfinite(held) and np.isfinite(general[step])]
    best_place = [i for i, (step, _) in enumerate(finite) if best and step == best[0]]
    points = [
        plane.Point(step, held, general[step], "best" if best and step == best[0] else "")
        for step, held in (finite[i] for i in spread(len(finite), MEASUREMENTS, tuple(best_place)))
    ]
    return plane.Path(label, color, points) if points else None


def in_words(run: Run) -> str:
    """What was learnt and what was forgotten, in a sentence each."""
    first, best, last = run.first(), run.best(), run.last()
    if not (first and best and last):
        return ""
    words = f"Held-out loss {_went(first[1], last[1])} by step {last[0]:,}"
    if best[0] != last[0]:
        words += f"; it was lowest at step {best[0]:,}, {loss(best[1])}"
    if run.share_measured() < 1:
        words += f". While training {run.share_measured():.0%} of the held-out tokens are measured, always the same"
    general = run.losses(run.general)
    if len(general) < 2:
        return f"{words}. What was forgotten was not measured: see --eval_general."
    words += f". Loss of general text {_went(general[0][1], general[-1][1])}"
    at_best = dict(general).get(best[0])
    if at_best is not None and best[0] != general[-1][0]:
        words += f", and was {loss(at_best)} where held-out loss was lowest"
    rose = general[-1][1] - general[0][1]
    return f"{words}: this is what the model forgot." if rose > 0 else f"{words}: nothing of it was forgotten."


def _went(before: float, after: float) -> str:
    """`fell from 1.8203 to 0.0069 (-1.8134)`."""
    return f"{preferences.moved(before, after, loss)} ({change(after - before)})"


def forgetting(run: Run) -> Html:
    way = path_of(run)
    words = in_words(run)
    drawn = tag("div", plane.draw([way])) if way and len(way.points) > 1 else ""
    beside = [one for one in (drawn, measured(run)) if one]
    return section(
        "learnt",
        "Learnt and forgotten",
        tag("p", words) if words else "",
        tag("div", *beside, class_="pair") if beside else "",
    )


def samples(run: Run) -> Html:
    """Some prompts, each with its answers through time; equal answers in a row are one line."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for one in run.answers:
        groups.setdefault((one.of, one.prompt), []).append(one)
    if not groups:
        return Html("")
    names = {of for of, _ in groups}
    parts = [_sample(answers, of if len(names) > 1 else "") for (of, _), answers in list(groups.items())[:PROMPTS]]
    more = len(groups) - len(parts)
    note = tag("p", f"{counted(more, 'more prompt')} in the files of the folder.", class_="muted") if more > 0 else ""
    return section("samples", "Answers through time", *parts, note)


def _sample(answers: list[Answer], of: str) -> Html:
    answers = sorted(answers, key=lambda one: one.step)
    stretches = [list(group) for _, group in groupby(answers, key=lambda one: (one.text, one.expected))]
    shown = [stretches[i] for i in spread(len(stretches), 12)]
    rows = []
    for same in shown:
        first, last = same[0], same[-1]
        steps = f"step {first.step:,}" + (f" to {last.step:,}" if last.step != first.step else "")
        mark = tag("span", " \N{CHECK MARK} right", class_="right") if first.right else ""
        rows.append(
            tag(
                "li",
                tag("span", steps, class_="step"),
                said(first.text),
                mark,
                class_="is-right" if first.right else None,
            )
        )
    missing = len(stretches) - len(shown)
    expected = answers[-1].expected
    return tag(
        "article",
        tag("p", tag("span", f"prompt{f' ({of})' if of else ''}", class_="step"), said(answers[0].prompt)),
        tag("p", tag("span", "expected", class_="step"), said(expected)) if expected is not None else "",
        tag("ol", *rows),
        tag("p", f"{counted(missing, 'more answer')} in between.", class_="muted") if missing else "",
        class_="sample",
    )


def said(words: str) -> Html:
    """Somebody's text: in its own direction, with its line breaks."""
    return tag("bdi", shortened(words, CHARACTERS) if words else tag("i", "nothing"), class_="said", dir="auto")


def trained(run: Run) -> Html:
    """A sample of the training data, what is trained of it marked."""
    parts = []
    samples = [one for one in run.preview.get("samples", []) if isinstance(one, dict)]
    worse = ("rejected", "bad")  # answers that become less probable
    for one in samples[: SAMPLES * (2 if run.compares else 1)]:
        pieces = [piece for piece in one.get("pieces", []) if isinstance(piece, list) and len(piece) == 2][:PIECES]
        look = "worse" if one.get("answer") in worse else None
        marked = [tag("mark", words, class_=look) if is_trained else tag("span", words) for is_trained, words in pieces]
        more = f"... {one['more']:,} more tokens" if type(one.get("more")) is int and one["more"] > 0 else ""
        about = f"{one.get('origin', '')}: {one.get('tokens', 0):,} tokens, {one.get('trained', 0):,} of them trained"
        about = f"{one['answer']}, {about}" if isinstance(one.get("answer"), str) else about
        parts += [tag("h3", about), tag("pre", *marked, tag("i", more), dir="auto")]
    if not parts:
        return Html("")
    if any("answer" in one for one in samples):
        better = join(tag("mark", "Marked so"), " is to become more probable, ", tag("mark", "so", class_="worse"))
        words = join(better, " less probable; prompts are read only. <end> is the end of a document.")
    else:
        words = join(
            tag("mark", "Marked"), " is what is trained; the rest is read only. <end> is the end of a document."
        )
    lines = [str(line) for line in run.preview.get("data", [])]
    listed = tag("ul", *(tag("li", line) for line in lines)) if lines else ""
    return section("data", "What is trained", tag("p", words, class_="muted"), *parts, listed)


def settings(run: Run) -> Html:
    """The settings that differ from their defaults, then all others."""
    changed: list[list[Any]] = []
    others: list[list[Any]] = []
    for name, value, default, about in known(run):
        named = [tag("code", f"--{name}"), shown(value)]
        if value == default:
            others.append([*named, about])
        else:
            changed.append([*named, shown(default), about])
    ours = {spec.name for kind in SECTIONS.values() for spec in fields(kind)}
    for values in run.config.values():
        foreign = {name: value for name, value in values.items() if name not in ours}
        changed += [
            [tag("code", f"--{name}"), shown(value), NONE, "no setting of this version"]
            for name, value in foreign.items()
        ]
    if not changed and not others:
        return Html("")
    title = "Settings that differ from their defaults"
    first = table(["setting", "value", "default", "what it is"], changed, title, numbers=False)
    rest = table(["setting", "value", "what it is"], others, "Settings with their defaults", numbers=False)
    return section("settings", "Settings", first, details(f"{counted(len(others), 'setting')} with the default", rest))


def known(run: Run) -> list[tuple[str, Any, Any, str]]:
    """(name, value, default, help) of every setting of this version that the run's config.json has."""
    return [
        (spec.name, values[spec.name], list(default) if isinstance(default, tuple) else default, spec.metadata["help"])
        for name, kind in SECTIONS.items()
        if (values := run.config.get(name))
        for spec in fields(kind)
        for default in (worded(spec, spec.default),)
        if spec.name in values
    ]


def environment(run: Run) -> Html:
    facts = run.preview.get("environment")
    if not isinstance(facts, dict) or not facts:
        return Html("")
    rows = [[name, value] for name, value in facts.items()]
    return section("environment", "Environment", table(["what", "value"], rows, "Versions and devices", numbers=False))
