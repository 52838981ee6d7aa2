r"""Whether two answers are the same: as strings by the benchmarks' published rules, as numbers, and as mathematics.

`same_math` reads LaTeX with a parser of its own (formula.py) and compares values, so a verdict does not depend on which
libraries are installed, needs no `eval`, and takes milliseconds whatever a model wrote. Tests hold it to sympy.
"""

from __future__ import annotations

import cmath
import re
from fractions import Fraction
from typing import Any, NamedTuple

from rwkv_bone.evaluation.formula import Unreadable, tokens_of, value_at

LONGEST = 2000  # characters; longer answers are equal only letter by letter
POINTS = 4  # where formulas with variables are compared
TOLERANCE = 1e-12  # relative, between floats; rational numbers are compared exactly


def same_string(a: str | None, b: str | None) -> bool:
    """GSM8K's comparison in lm_eval (version 3): equal as strings without commas, `$` and a final dot, in lower case.

    What precedes `#### ` does not count, so a gold solution may stand for its answer. `18` and `18.0` differ by it.
    """
    if a is None or b is None:
        return False
    a, b = (text.replace(",", "").replace("$", "").rpartition("#### ")[2].removesuffix(".").lower() for text in (a, b))
    return a == b


def same_number(a: str | None, b: str | None) -> bool:
    """Whether both are numbers and equal, exactly: `1,200`, `$1200.00`, `1.2e3`, `2400/2`. A percent sign is a unit."""
    x, y = _number(a), _number(b)
    return x is not None and x == y


def _number(text: str | None) -> Fraction | None:
    if text is None or len(text) > LONGEST:
        return None
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{2,3}(?![0-9]))|\\?[$%€£¥￥₹]|(?<=[0-9])\.\Z", "", text.strip()).strip()
    decimal = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
    pattern = rf"([-+]?)(?:([0-9]+) )?({decimal})(?:[eE]([-+]?[0-9]{{1,3}}))?(?:/({decimal}))?"
    if not (found := re.fullmatch(pattern, text)):
        return None
    sign, whole, number, power, below = found.groups()
    if whole and not below:
        return None
    value = Fraction(number) * Fraction(10) ** int(power or 0)
    if below:
        if not Fraction(below):
            return None
        value = value / Fraction(below) + int(whole or 0)
    return -value if sign == "-" else value


# ---- MATH's published rule

_LEFT_OUT = ("\n", r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")


def same_hendrycks(a: str | None, b: str | None) -> bool:
    r"""MATH's comparison as published (Hendrycks et al. 2021, math_equivalence.py): equal as strings, once tidied.

    Left out are line ends, `\!`, `\left`, `\right`, degrees, `\$`, `%`, spaces, and units as `\text{ cm}`; `\dfrac` is
    `\frac`, `\frac12` is `\frac{1}{2}`, `\sqrt2` is `\sqrt{2}`, `.5` is `0.5`, `0.5` is `\frac{1}{2}`, `3/4` of
    integers is `\frac{3}{4}`; one or two characters before a single `=` go. What it cannot tidy it compares as written.
    MetaMath and Bone report MATH by it.
    """
    if a is None or b is None:
        return False
    x, y = _hendrycks(a), _hendrycks(b)
    return a == b if x is None or y is None else x == y


def _hendrycks(text: str) -> str | None:
    for left_out in _LEFT_OUT[:2]:
        text = text.replace(left_out, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for left_out in _LEFT_OUT[2:]:
        text = text.replace(left_out, "")
    text, _, unit = text.partition(r"\text{ ")
    if r"\text{ " in unit:
        return None
    text = text.replace(r"\%", "").replace("%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    for command, arguments in ((r"\sqrt", 1), (r"\frac", 2)):
        if (braced := _braced(text, command, arguments)) is None:
            return None
        text = braced.replace(" ", "")
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"\A(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z", r"\\frac{\1}{\2}", text)


def _braced(text: str, command: str, arguments: int) -> str | None:
    r"""\frac12 as \frac{1}{2}: braces around lone characters behind a command. None where it ends the text."""
    first, *pieces = text.split(command)
    for at, piece in enumerate(pieces):
        if not piece:
            return None
        if piece.startswith("{"):
            continue
        if len(piece) < arguments:
            return text
        lone = [letter if letter == "{" else f"{{{letter}}}" for letter in piece[:arguments]]
        pieces[at] = "".join(lone) + piece[arguments:]
    return command.join([first, *pieces])


# ---- mathematics


def same_math(a: str | None, b: str | None) -> bool:
    r"""Whether two answers in LaTeX mean the same: more than `same_hendrycks`, never less.

    Formulas are compared by their values: exactly where they are rational, to 1e-12 elsewhere, at four points where
    they have variables. Tuples, intervals and matrices are compared part by part, lists and sets in any order,
    equations by the difference of their sides, inequalities read from either side, words as words. Of `x = 5` against
    `5` the left side is left out, as are units, degrees, `%` and `$`. What it cannot read it compares as text.
    """
    if a is None or b is None or not a.strip() or not b.strip():
        return False
    if a.strip() == b.strip():
        return True
    if max(len(a), len(b)) > LONGEST:
        return False
    return same_hendrycks(a, b) or _same(_read(_tidy(a)), _read(_tidy(b)))


class _Node(NamedTuple):
    """A part of an answer. kind: "value" (at each point), "text", "set", "∪", "matrix", a relation or brackets: (].

    parts: the values, the text, or the parts within.
    """

    kind: str
    parts: Any


_SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
}
_SYMBOLS |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "±": r"\pm ", "∈": r"\in ", "°": "", "，": ","}
_SYMBOLS |= {
    "**": "^",
    "$": "",
    "%": "",
    "\n": " ",
    "~": " ",
    "（": "(",
    "）": ")",
    r"\{": r"\lbrace ",
    r"\}": r"\rbrace ",
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}"
_UNITS = (
    "ways integers dollars? mph inch(?:es)? ft hours? km units? points? feet foot minutes? digits? cents? degrees? cm "
    "mm kg grams? pounds? met(?:er|re)s? meals edges students miles? seconds? days? weeks? months? years? percent "
    "lit(?:er|re)s?"
).replace(" ", "|")
_UNIT = rf"(?:(?:square|cubic|sq\.?) )?(?:{_UNITS})\.?"
_NAMES = {
    r"\\(?:dfrac|tfrac|cfrac)(?![a-z])": r"\\frac",
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|limits)[lr]?(?![A-Za-z])\.?": "",
    r"\\(?:leq|leqslant)(?![a-z])": r"\\le ",
    r"\\(?:geq|geqslant)(?![a-z])": r"\\ge ",
    r"\\neq(?![a-z])": r"\\ne ",
    r"\\lt(?![a-z])": "<",
    r"\\gt(?![a-z])": ">",
    r"<=": r"\\le ",
    r">=": r"\\ge ",
    r"\\[lr]vert(?![a-z])": "|",
    r"\\langle(?![a-z])": "(",
    r"\\rangle(?![a-z])": ")",
    r"\\(?:mathbb|mathcal)\s?\{([A-Z])\}": r"\1",
    r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![a-z]))|\\degree(?![a-z])": "",
    r"\\(?:quad|qquad)(?![a-z])|(?<!\\)\\[,;: ]|\{\}": " ",
    r"\{,\}": ",",
}


def _tidy(text: str) -> str:
    """One spelling for what LaTeX and Unicode spell in several; units and what only places or dresses a formula go."""
    text = re.sub(r"\A\s*\\(?:boxed|fbox)\s?\{(.*)\}\s*\Z", r"\1", text, flags=re.DOTALL)
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda raised: "^{" + raised[0].translate(_RAISED) + "}", text)
    text = re.sub(r"\\([(\[])(.*)\\[)\]]", r"\2", text, flags=re.DOTALL)
    text = text.replace(r"\!", "").replace(r"\$", "").replace(r"\%", "")
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    for pattern, plain in _NAMES.items():
        text = re.sub(pattern, plain, text)
    text = text.strip().removesuffix(".").strip()
    text = re.sub(_WORDS.replace("([^{}]*)", r"\s*,?\s*(?:and|or)\s*"), ",", text)
    text = re.sub(r"(?<=[\s0-9)}])(?:and|or)(?=[\s0-9(\\-])", ",", text)
    # A unit stands behind a number or formula, in \text{} or as one of the words.
    power = r"(?:\s?\^\s?\{?[23]\}?)?"
    text = re.sub(
        rf"(?<=[0-9)}}a-z])\s*{_WORDS}{power}\Z", lambda unit: "" if re.search("[a-z]", unit[1]) else unit[0], text
    )
    text = re.sub(rf"(?<=[0-9)}} ])\s*{_UNIT}(?:\s?(?:/|per)\s?(?:{_UNITS}))?{power}\Z", "", text)
    text = re.sub(_WORDS, r"\1", text).strip()
    if not re.search(r"[(\[]|\\lbrace", text):
        text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda found: found[0].replace(",", ""), text)
    return re.sub(r"([0-9]*)\.([0-9]*)\\overline\s?\{([0-9]{1,30})\}", _repeating, text)


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} is (16 - 1) / 90."""
    before, digits, again = found.groups()
    start = int(before + digits or 0)
    return rf"\frac{{{int(before + digits + again) - start}}}{{{(10 ** len(again) - 1) * 10 ** len(digits)}}}"


_OPENING, _CLOSING = ("(", "[", "{", r"\lbrace"), (")", "]", "}", r"\rbrace")
_RELATIONS = {"=": "=", r"\in": "=", "<": "<", ">": ">", r"\le": "≤", r"\ge": "≥", r"\ne": "≠"}


def _read(text: str) -> _Node:
    if re.search(r"(?<![\\A-Za-z])(?!(?:arc)?(?:sin|cos|tan)|sqrt|cot|sec|csc|log|exp|infin)[A-Za-z]{3,}", text):
        if r"\begin" not in text:  # words
            return _Node("text", " ".join(text.lower().split()))
    try:
        return _structure(tokens_of(text))
    except (Unreadable, ArithmeticError, ValueError, RecursionError):
        return _Node("text", re.sub(r"\s|(?<=[_^])\{(?=.\})|(?<=[_^]\{.)\}", "", text))


def _split(tokens: list[str], *at: str) -> list[list[str]]:
    """The tokens between those of `at` that stand outside all brackets, each of them leading the part behind it."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _OPENING or token == r"\begin") - (token in _CLOSING or token == r"\end")
        if token in at and depth == 0:
            parts.append([token])
        else:
            parts[-1].append(token)
    return parts


def _structure(tokens: list[str]) -> _Node:
    if len(tokens) > 2 and tokens[0] == r"\begin":
        return _matrix(tokens)
    if len(parts := _split(tokens, r"\cup")) > 1:
        return _Node("∪", [_structure(part[index > 0 :]) for index, part in enumerate(parts)])
    if len(parts := _split(tokens, ",", ";")) > 1:
        return _Node("set", [_structure(part[index > 0 :]) for index, part in enumerate(parts)])
    if tokens and tokens[0] in _OPENING and tokens[-1] in _CLOSING and len(_split(tokens[:-1], *_CLOSING)) == 1:
        if all(_depths(tokens)):
            inside = _split(tokens[1:-1], ",")
            if tokens[0] == r"\lbrace":
                return _Node("set", [_structure(part[index > 0 :]) for index, part in enumerate(inside) if part])
            if len(inside) > 1:
                brackets = tokens[0] + tokens[-1]
                return _Node(brackets, [_structure(part[index > 0 :]) for index, part in enumerate(inside)])
    if r"\pm" in tokens or r"\mp" in tokens:
        signs = ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"})
        return _Node("set", [_structure([sign.get(token, token) for token in tokens]) for sign in signs])
    if len(parts := _split(tokens, *_RELATIONS)) > 1:
        return _relation(parts)
    return _Node("value", [value_at(tokens, point) for point in range(POINTS)])


def _depths(tokens: list[str]) -> list[int]:
    """How many brackets are open behind each token but the last."""
    depth, depths = 0, []
    for token in tokens[:-1]:
        depth += (token in _OPENING) - (token in _CLOSING)
        depths.append(depth)
    return depths


def _matrix(tokens: list[str]) -> _Node:
    name = "".join(tokens[2 : tokens.index("}")])
    end = tokens.index(r"\end")
    inside = tokens[tokens.index("}") + 1 : end]
    if "matrix" not in name and name != "array" or tokens[end + 1 :] != ["{", *name, "}"]:
        raise Unreadable
    if name == "array" and inside[:1] == ["{"]:
        inside = inside[inside.index("}") + 1 :]
    rows = [row[index > 0 :] for index, row in enumerate(_split(inside, r"\\"))]
    cells = [[_structure(cell[at > 0 :]) for at, cell in enumerate(_split(row, "&"))] for row in rows if row]
    return _Node("determinant" if name[0] in "vV" else "matrix", [_Node("row", row) for row in cells])


def _relation(parts: list[list[str]]) -> _Node:
    signs = [_RELATIONS[part[0]] for part in parts[1:]]
    sides = [parts[0], *(part[1:] for part in parts[1:])]
    if signs == ["="] and (
        len(sides[0]) == 1 and sides[0][0].isalpha() or re.fullmatch(r"[a-zA-Z]\([a-z]\)", "".join(sides[0]))
    ):
        return _Node("named", ["".join(sides[0]), _structure(sides[1])])
    if ">" in signs or "≥" in signs:
        if "<" in signs or "≤" in signs:
            raise Unreadable
        signs, sides = [{">": "<", "≥": "≤"}.get(sign, sign) for sign in reversed(signs)], sides[::-1]
    return _Node(" ".join(signs), [_structure(side) for side in sides])


def _same(a: _Node, b: _Node) -> bool:
    if a.kind == "named" or b.kind == "named":
        if a.kind == b.kind:
            return a.parts[0] == b.parts[0] and _same(a.parts[1], b.parts[1])
        return _same(*(node.parts[1] if node.kind == "named" else node for node in (a, b)))
    if a.kind != b.kind:
        return False
    if a.kind == "text":
        return a.parts == b.parts
    if a.kind == "value":
        return all(_close(x, y) for x, y in zip(a.parts, b.parts, strict=True))
    if a.kind == "=" and all(side.kind == "value" for side in (*a.parts, *b.parts)):
        ours, theirs = (
            _Node("value", [x - y for x, y in zip(*(side.parts for side in node.parts), strict=True)])
            for node in (a, b)
        )
        return _same(ours, theirs) or _same(ours, _Node("value", [-value for value in theirs.parts]))
    if len(a.parts) != len(b.parts):
        return False
    if a.kind not in ("set", "∪"):
        return all(map(_same, a.parts, b.parts))
    if len(a.parts) > 200:
        return False
    rest = list(b.parts)
    for part in a.parts:
        if (index := next((index for index, other in enumerate(rest) if _same(part, other)), None)) is None:
            return False
        del rest[index]
    return True


def _close(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return False
    a, b = complex(a), complex(b)
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + TOLERANCE / 100 if cmath.isfinite(a - b) else False
