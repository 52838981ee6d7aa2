"""What a page shows of answers that were compared: --task dpo, orpo, simpo and kto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from rwkv_bone.config.acts import TRAIN
from rwkv_bone.config.preferences import BETA, GAMMA, REFERRING, SFT_WEIGHT
from rwkv_bone.config.sections import PreferenceConfig
from rwkv_bone.report import charts
from rwkv_bone.report.html import Html, loss, percent, shown, table, tag
from rwkv_bone.report.run import DIVERGENCE, Run

TASKS = {"dpo": "DPO", "orpo": "ORPO", "simpo": "SimPO", "kto": "KTO", "sft": "Preferences"}
# What of FIGURES and DIVERGENCE a page shows -> (its name, how it is written).
SHOWN: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "reward_accuracy": ("accuracy", percent),
    "reward_margin": ("margin", loss),
    "reward_chosen": ("reward, chosen", loss),
    "reward_rejected": ("reward, rejected", loss),
    "logp_chosen": ("log-probability, chosen", loss),
    "logp_rejected": ("log-probability, rejected", loss),
    "nll": ("loss of chosen", loss),
    "kl": ("KL estimate", loss),
    DIVERGENCE: ("divergence", loss),
}
TILES = {
    "reward_accuracy": "held-out pairs",
    "reward_margin": "held-out rewards, chosen minus rejected",
    DIVERGENCE: "nats per token from the start",
}


def figures(run: Run) -> list[tuple[str, str, str]]:
    """`sections.figures` of answers that were compared: held-out ones, else those at the end of training."""
    found = []
    for column, of in TILES.items():
        name, said = SHOWN[column]
        if measured := run.ends(column):
            (first, before), (step, now) = measured[0], measured[-1]
            then = f"; step {first:,}: {said(before)}" if len(measured) > 1 else ""
            found.append((name, said(now), f"{of}, step {step:,}{then}"))
        elif rows := charts.rows_of(run, column):
            found.append((name, said(rows[-1][2]), steps_of(rows[-1])))
    return found


def content(run: Run) -> list[Html]:
    """What was learnt of answers that were compared: in words, in numbers, and with which settings."""
    if not run.compares:
        return []
    trained, first, last = charts.rows_of(run, "loss"), run.first(), run.last()
    when = [point[0] for point in (first, last) if point]  # the steps of held-out columns
    rows = [[f"loss, mean of the {run.unit}s", loss(trained[-1][2] if trained else None)]]
    rows[0] += [loss(point[1]) for point in (first, last) if point]
    for column, (name, said) in SHOWN.items():
        stretch, measured = charts.rows_of(run, column), dict(run.ends(column))
        if stretch or measured:
            rows.append([name, said(stretch[-1][2] if stretch else None), *(said(measured.get(step)) for step in when)])
    head = ["", steps_of(trained[-1]) if trained else "training", *(f"held-out, step {step:,}" for step in when)]
    results = table(head, rows, "Training beside held-out data") if trained or first else Html("")
    words = in_words(run)
    parts = [tag("p", words) if words else Html(""), results, objective(run)]
    return [part for part in parts if part]


def steps_of(stretch: Sequence[float]) -> str:
    """`training, steps 229 to 240`, of a stretch of `charts.rows_of`."""
    first, last = (f"{step:,.0f}" for step in stretch[:2])
    return f"training, step {last}" if first == last else f"training, steps {first} to {last}"


def in_words(run: Run) -> str:
    """What held-out answers show, in a sentence each."""
    parts = []
    for column, begin, said in (
        ("reward_accuracy", "The share of held-out pairs with the chosen answer above", percent),
        ("reward_margin", "The margin of held-out rewards", loss),
        ("logp_chosen", "The log-probability of a token of chosen answers", loss),
        ("logp_rejected", "that of rejected ones", loss),
    ):
        measured = run.ends(column)
        if len(measured) > 1:
            (begun, before), (_, after) = measured
            since = f" since step {begun:,}" if begun else ""  # at step 0 no reward of dpo is above another
            parts.append(f"{begin} {moved(before, after, said)}{since}")
    sentences = [*parts[:-2], "; ".join(parts[-2:])] if len(parts) > 2 else parts
    if away := run.figures(DIVERGENCE):
        step, distance = away[-1]
        sentences.append(f"At step {step:,} the model is {loss(distance)} nats per token from where it began")
    return "".join(f"{sentence}. " for sentence in sentences).strip()


def objective(run: Run) -> Html:
    """The settings of the loss, with numbers for auto."""
    values = run.config.get("preference", {})
    if not values or run.task not in BETA:
        return Html("")
    auto = {"beta": BETA[run.task], "gamma": GAMMA, "sft_weight": SFT_WEIGHT.get(run.task, 0.0)}
    acting = {**run.config.get("adapter", {}), **values, "task": run.task}
    rows = []
    for spec in fields(PreferenceConfig):
        when, value = TRAIN[spec.name], values.get(spec.name)
        if value is None or any(name not in acting for name in when.names) or not when.met(acting):
            continue
        value_ = f"{auto[spec.name]:g} (auto)" if value == "auto" and spec.name in auto else shown(value)
        rows.append([tag("code", f"--{spec.name}"), value_, spec.metadata["help"].split("; auto")[0]])
    title = f"The loss: --task {run.task}"
    return table(["setting", "value", "what it is"], rows, title, numbers=False)


def moved(before: float, after: float, said: Callable[[float | None], str]) -> str:
    """`rose from 50.0% to 97.0%`, `stayed at 97.0%`."""
    if after == before:
        return f"stayed at {said(after)}"
    how = "fell" if after < before else "rose"
    return f"{how} from {said(before)} to {said(after)}"


def order(run: Run) -> str:
    """What of an answer has to be higher, that a pair counts in a run's accuracy."""
    return "the reward against a reference" if run.task in REFERRING else "the log-probability per token"


def scale(run: Run) -> str:
    """What a run's rewards, and so its margin, are measured in."""
    beta = run.config.get("preference", {}).get("beta", "auto")
    return f"--task {run.task} --beta {shown(BETA.get(run.task, beta) if beta == 'auto' else beta)}"


def differing(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """A line for each measure that is not of one kind in all of the runs."""

    def grouped(kind: Callable[[Run], str], has: Callable[[Run], object]) -> str:
        """`kind: label, label; kind: label`; nothing where there is one kind alone."""
        found: dict[str, list[str]] = {}
        for run, label in zip(runs, labels, strict=True):
            if has(run):
                found.setdefault(kind(run), []).append(label)
        return "; ".join(f"{of}: {', '.join(group)}" for of, group in found.items()) if len(found) > 1 else ""

    lines = []
    if tasks := grouped(lambda run: f"--task {run.task}", lambda run: True):
        lines.append(
            f"losses of different tasks cannot be compared ({tasks}); the gap in log-probability, the divergence, "
            "exact answers and the loss of general text can"
        )
    if orders := grouped(order, lambda run: run.ends("reward_accuracy")):
        lines.append(f"accuracy is not judged, since it counts pairs by different numbers ({orders})")
    if scales := grouped(scale, lambda run: run.ends("reward_margin")):
        lines.append(f"margins are not judged, since they have different scales ({scales})")
    return lines
