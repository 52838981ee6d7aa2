"""Draws docs/rooms.svg, the rooms of the package and who imports whom, from the imports in src/rwkv_bone.

    python docs/draw_rooms.py

An arrow that follows from others is not drawn, nor are arrows to the grey boxes at the bottom. A room stands above all
that it imports. The standard library is enough.
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "rwkv_bone"
PICTURE = REPOSITORY / "docs" / "rooms.svg"

# name -> (column, what it is for)
ROOMS = {
    "hf": (0, "Bone and Bat in transformers models"),
    "planning": (1, "what a run would take, before it"),
    "training": (1, "a run: prepared, stepped, saved, continued"),
    "conversion": (2, "adapter + base to one file; formats of others"),
    "chat": (3, "a conversation with a model; many prompts"),
    "evaluation": (4, "benchmarks: answers counted, runs compared"),
    "inference": (1, "load a model, write text, measure it"),
    "preferences": (3, "DPO, ORPO, SimPO, KTO: losses of answers"),
    "models": (2, "RWKV-5, 6, 7: blocks, time mix, channel mix"),
    "data": (0, "files to batches of token ids"),
    "adapters": (1, "Bone, Bat, LoRA, PiSSA around a projection"),
    "quantization": (2, "frozen projections in 8 or 4 bits"),
    "ops": (3, "WKV and cross-entropy: kernels and PyTorch"),
    "checkpoints": (1, "files in and out, and what they say"),
    "cluster": (2, "a run's processes find one another"),
    "doctor": (3, "is this machine fit for training"),
    "run_lock": (3, "one run to a results folder"),
    "report": (0, "a run, or several, as one page"),
}
PROGRAMS = {"train.py": "training", "merge.py": "conversion", "train_hf.py": "hf"}
GROUND = {
    "config": "every setting",
    "cards": "which GPUs",
    "devices": "the machine",
    "errors": "what a user can fix",
    "console": "output that never ends a run",
    "signals": "ends that save",
    "allocator": "freed memory, kept or not",
    "imports": "large libraries",
    "launched": "which process",
    "locks": "files in use",
}
LEFT_OUT = {"__init__", "commands"}  # they only pass on

WIDTH, HEIGHT, COLUMN, ROW, MARGIN = 285, 58, 310, 108, 16
INK, LINE, FILLS = "#1f2328", "#57606a", {"room": "#ddf4ff", "program": "#fff8c5", "ground": "#eaeef2"}


def imports() -> dict[str, set[str]]:
    """For each room, and module beside the rooms, those whose modules it imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        targets = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "rwkv_bone":
                names = [f"rwkv_bone.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            targets |= {name.split(".")[1] for name in names if name.startswith("rwkv_bone.")} - {room}
    return {room: targets & set(found) for room, targets in found.items()}


def arrows(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of the rooms above the ground, without arrows that a longer way implies."""
    kept = {room: targets - GROUND.keys() - LEFT_OUT for room, targets in graph.items() if room in ROOMS}

    def reached(room: str) -> set[str]:
        return kept[room].union(*(reached(target) for target in kept[room]))

    return {
        room: {t for t in targets if not any(t in reached(other) for other in targets - {t})}
        for room, targets in kept.items()
    }


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Each room's floor, 0 the lowest: one below the lowest room that imports it."""

    def depth(room: str) -> int:
        return 1 + max((depth(other) for other, targets in graph.items() if room in targets), default=-1)

    deepest = max(map(depth, graph))
    return {room: deepest - depth(room) for room in graph}


def box(x: float, y: float, name: str, words: str, kind: str, wide: float = WIDTH) -> str:
    middle = x + wide / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{HEIGHT}" rx="6" fill="{FILLS[kind]}" stroke="{LINE}"/>\n'
        f'<text x="{middle:g}" y="{y + 24:g}" font-size="16" font-weight="bold">{escape(name)}</text>\n'
        f'<text x="{middle:g}" y="{y + 44:g}" font-size="12">{escape(words)}</text>'
    )


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From the bottom of a box to the top of another."""
    (x1, y1), (x2, y2) = start, end
    bend = (y2 - y1) / 2
    path = f"M{x1:g},{y1:g} C{x1:g},{y1 + bend:g} {x2:g},{y2 - bend:g} {x2:g},{y2 - 7:g}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#head)"/>'


def draw() -> str:
    graph = imports()
    unknown = graph.keys() - ROOMS.keys() - GROUND.keys() - LEFT_OUT
    assert not unknown, f"{', '.join(sorted(unknown))}: give it a place in ROOMS of {Path(__file__).name}"
    graph = arrows(graph)
    floor = floors(graph)
    top = max(floor.values()) + 1

    def corner(room: str, above: int = 0) -> tuple[float, float]:
        return MARGIN + ROOMS[room][0] * COLUMN, MARGIN + (top - floor[room] - above) * ROW

    lines, boxes = [], []
    for room, (_, words) in ROOMS.items():
        x, y = corner(room)
        boxes.append(box(x, y, f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py", words, "room"))
        targets = sorted(graph[room], key=lambda target: ROOMS[target][0])
        for number, target in enumerate(targets, start=1):
            below = corner(target)
            start = (x + WIDTH * number / (len(targets) + 1), y + HEIGHT)
            # Arrows that come from the left end left of the middle.
            shift = 0.5 + 0.3 * max(-1, min(1, (start[0] - below[0] - WIDTH / 2) / COLUMN))
            lines.append(arrow(start, (below[0] + WIDTH * shift, below[1])))
    for name, room in PROGRAMS.items():
        x, y = corner(room, above=1)
        boxes.append(box(x, y, name, "parse, call, exit", "program"))
        lines.append(arrow((x + WIDTH / 2, y + HEIGHT), (x + WIDTH / 2, y + ROW)))
    y = MARGIN + (top + 1) * ROW
    column = (4 * COLUMN + WIDTH + MARGIN) / len(GROUND)
    for number, (name, words) in enumerate(GROUND.items()):
        folder = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        boxes.append(box(MARGIN + number * column, y, folder, words, "ground", column - MARGIN))
    width, height = 2 * MARGIN + 4 * COLUMN + WIDTH, y + HEIGHT + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="sans-serif" text-anchor="middle" fill="{INK}">',
            "<title>The rooms of rwkv_bone and who imports whom; made by docs/draw_rooms.py</title>",
            '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="2" refY="4" orient="auto">'
            f'<path d="M0,0 L9,4 L0,8 z" fill="{LINE}" stroke="none"/></marker></defs>',
            # A background of its own: the picture is read on light and on dark pages.
            f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
