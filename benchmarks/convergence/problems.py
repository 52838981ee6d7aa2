"""Arithmetic word problems and their equations, made by templates: names, things, numbers, one to three operations."""

from __future__ import annotations

import random

NAMES = "Ann Ben Cleo Dan Eva Finn Gus Hana Ivo Jane Kim Leo Mia Noah Olga Paul Rosa Sam Tina Vic".split()
THINGS = "pens eggs coins books cards shells stamps apples pears plums nuts beads".split()
# (sentence, what it adds to the equation, operations in it). k is 2 to 9, n is 2 to 60.
STARTS = (
    ("{who} has {n} {what}.", "{n}", 0),
    ("{who} buys {k} bags of {n} {what}.", "{k}*{n}", 1),
)
GAINS = (
    ("{other} brings {n} more.", "+{n}", 1),
    ("{who} finds {n}.", "+{n}", 1),
    ("Then {k} boxes of {n} come.", "+{k}*{n}", 2),
)
LOSSES = (
    ("{who} gives {n} to {other}.", "-{n}", 1),
    ("Then {n} are lost.", "-{n}", 1),
)


def problem(draw: random.Random) -> dict:
    """{"prompt", "response": the equation, "answer": its value, 0 or more}."""
    wanted = draw.randint(1, 3)
    who, other = draw.sample(NAMES, 2)
    what = draw.choice(THINGS)
    sentences, equation, value, operations = [], "", 0, 0
    while operations < wanted:
        choices = [one for one in (*GAINS, *LOSSES) if one[2] <= wanted - operations] if equation else STARTS
        text, term, count = draw.choice(choices)
        k, n = draw.randint(2, 9), draw.randint(2, 60)
        if term.startswith("-"):
            if value < 2:
                continue
            n = draw.randint(1, min(value - 1, 60))
        sentences.append(text.format(who=who, other=other, what=what, k=k, n=n))
        equation += term.format(k=k, n=n)
        value += (-1 if term.startswith("-") else 1) * n * (k if "{k}" in term else 1)
        operations += count
    return {"prompt": f"{' '.join(sentences)} How many? ", "response": equation, "answer": value}
