"""What was learnt against what was forgotten: a drawing in which each measurement is a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv_bone.report.html import Html, join, loss, tag

WIDTH, HEIGHT = 480, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 56  # margins around the axes


class Point(NamedTuple):
    step: int
    learnt: float  # loss of the held-out data
    forgotten: float  # loss of general text
    note: str = ""  # best


class Path(NamedTuple):
    """The points of one run in the order of steps."""

    label: str
    color: int
    points: list[Point]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie within low and high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds these values, with some room beside them."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or max(abs(high) * 0.1, 1e-3)
    return low - room, high + room


def draw(paths: Sequence[Path]) -> Html:
    """An SVG of at least one point."""
    x_low, x_high = bounds([point.learnt for path in paths for point in path.points])
    y_low, y_high = bounds([point.forgotten for path in paths for point in path.points])

    def x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts: list[Html] = []
    for value in ticks(x_low, x_high):
        parts += [
            tag("line", x1=x(value), x2=x(value), y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"),
            _words(x(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle"),
        ]
    for value in ticks(y_low, y_high):
        parts += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid"),
            _words(LEFT - 7, y(value) + 5, f"{value:g}", "end"),
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        _words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "\N{LEFTWARDS ARROW} learnt: held-out loss", "middle"),
        tag(
            "text",
            "forgotten: loss of general text \N{RIGHTWARDS ARROW}",
            transform=f"translate(15 {middle:g}) rotate(-90)",
            text_anchor="middle",
        ),
    ]
    for path in paths:
        parts.append(_path(path, x, y, alone=len(paths) == 1))
    label = "Held-out loss against the loss of general text, a point for each measurement; the numbers are in the table"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="plane")


def _path(path: Path, x: Any, y: Any, alone: bool) -> Html:
    points = path.points
    line = " ".join(f"{'L' if i else 'M'}{x(p.learnt):g} {y(p.forgotten):g}" for i, p in enumerate(points))
    parts = [tag("path", d=line, class_=f"way s{path.color}")]
    for i, point in enumerate(points):
        where = f"{path.label} " if path.label else ""
        says = f"{where}step {point.step:,}: held-out {loss(point.learnt)}, general {loss(point.forgotten)}"
        kind = "best" if point.note else "begin" if i == 0 else "dot"
        circle = tag("title", f"{says}, {point.note}" if point.note else says)
        parts.append(
            tag(
                "circle",
                circle,
                cx=x(point.learnt),
                cy=y(point.forgotten),
                r=6 if point.note else 4.5,
                class_=f"{kind} s{path.color}",
            )
        )
        named = [f"step {point.step:,}"] * (alone and (i in (0, len(points) - 1) or bool(point.note)))
        named += [point.note] * bool(point.note and alone)
        if named:
            right = x(point.learnt) < WIDTH * 0.7
            at = x(point.learnt) + (10 if right else -10)
            parts.append(_words(at, y(point.forgotten) - 8, ", ".join(named), "start" if right else "end"))
    return join(*parts)


def _words(x: float, y: float, words: str, anchor: str) -> Html:
    return tag("text", words, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor)
