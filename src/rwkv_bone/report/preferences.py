"""What a page shows of answers that were compared: --task dpo, orpo, simpo and kto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import chain

from rwkv_bone.config.acts import TRAIN
from rwkv_bone.config.preferences import BETA, GAMMA, REFERRING, SFT_WEIGHT
from rwkv_bone.config.sections import PreferenceConfig
from rwkv_bone.report import charts
from rwkv_bone.report.html import NONE, Html, loss, percent, shown, table, tag
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
            found.append((name, said(rows[-1][2]), f"training, steps {rows[-1][0]:,.0f} to {rows[-1][1]:,.0f}"))
    return found


def content(run: Run) -> list[Html]:
    """What was learnt of answers that were compared: in words, in numbers, and with which settings."""
    if not run.compares:
        return []
    trained, first, last = charts.rows_of(run, "loss"), run.first(), run.last()
    held = [(loss(first[1]), loss(last[1] if last else None))] if first else []
    rows = [[f"loss, mean of the {run.unit}s", loss(trained[-1][2] if trained else None), *chain(*held)]]
    for column, (name, said) in SHOWN.items():
        stretch, measured = charts.rows_of(run, column), run.ends(column)
        if stretch or measured:
            held = [(said(measured[0][1]), said(measured[-1][1])) if measured else (NONE, NONE)] if first else []
            rows.append([name, said(stretch[-1][2] if stretch else None), *chain(*held)])
    head = ["", f"training, steps {trained[-1][0]:,.0f} to {trained[-1][1]:,.0f}" if trained else "training"]
    if first:
        head += [f"held-out, step {first[0]:,}", f"held-out, step {last[0]:,}" if last else "held-out, later"]
    results = table(head, rows, "Training beside held-out data") if trained or first else Html("")
    words = in_words(run)
    parts = [tag("p", words) if words else Html(""), results, objective(run)]
    return [part for part in parts if part]


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
            parts.append(f"{begin} {moved(measured[0][1], measured[1][1], said)}")
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
    """`rose from 50.0% to 97.0%`."""
    how = "fell" if after < before else "rose" if after > before else "stayed"
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
