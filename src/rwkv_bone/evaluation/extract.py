r"""The answer within a model's text, by each benchmark's published rule. Pure functions: text -> answer, or None.

| rule | the number it reproduces | compared by (equal.py; tasks.py) |
|---|---|---|
| `after_hashes` | GSM8K as published (Cobbe et al. 2021); lm_eval's gsm8k, strict-match | `same_string` |
| `flexible` | lm_eval's gsm8k, flexible-extract | `same_string` |
| `metamath_number` | GSM8K of MetaMath, PiSSA, Bone (models tuned on MetaMathQA) | `same_number` |
| `metamath_text` | MATH of MetaMath, PiSSA, Bone | `same_hendrycks` |
| `boxed` | MATH as published (Hendrycks et al. 2021) | `same_hendrycks` |
| `minerva` | MATH four-shot (Lewkowycz et al. 2022); lm_eval's minerva_math | `same_math` |
| `last_number` | SVAMP, and GSM8K of chat models: the last number, read with care (no script) | `same_number` |
| `number_answer`, `math_answer` | none: the first of the marks above that the text has, for one's own comparisons | |
| `code_block` | HumanEval and MBPP of chat models, with `code.solution` | tests |

Every rule looks only behind the last `</think>`; a text that still thinks has no answer. Where the prompt has opened
the block, give `<think>` + text: of a text that was cut while thinking the rules could not tell it otherwise.
"""

from __future__ import annotations

import re
from fractions import Fraction

OPEN, CLOSE = "<think>", "</think>"


def after_thinking(text: str) -> str:
    """What a reasoning model says when it has thought: behind the last `</think>`; nothing if a `<think>` is open."""
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]


# ---- GSM8K


def after_hashes(text: str) -> str | None:
    """The number behind the first `#### `, commas removed: GSM8K's own rule (openai/grade-school-math, dataset.py).

    A sign, digits, dots and commas, right behind `#### `: `#### $18` and `####18` are no answers, there as here.
    """
    found = re.search(r"#### (-?[0-9.,]+)", after_thinking(text))
    answer = found[1].replace(",", "") if found else ""
    return answer if re.search("[0-9]", answer) else None


def flexible(text: str) -> str | None:
    """The last run of digits, `$`, `.` and `,`, or lone digit: flexible-extract of lm_eval's gsm8k (version 3).

    It takes `...` for a number, too: that is the rule.
    """
    found = re.findall(r"-?(?:[$.,0-9]{2,}|[0-9])", after_thinking(text))
    return found[-1] if found else None


def metamath_number(text: str) -> str | None:
    """The first number behind the last `The answer is: `, rounded to an integer: MetaMath's eval_gsm8k.py.

    PiSSA and Bone report GSM8K by it. A number has one dot, comma or slash at most, so `1,234,567` is read as 1234,
    there as here; a denominator of 0 counts as 1; halves round to the even neighbour.
    """
    _, mark, rest = after_thinking(text).rpartition("The answer is: ")
    found = re.search(r"[-+]?[0-9]*[.,/]?[0-9]+", rest) if mark else None
    if not found or len(found[0]) > 300:  # the float of so long a number is infinite, which has no integer
        return None
    number, slash, below = found[0].replace(",", "").partition("/")
    if number in ("", "+", "-"):
        return None
    value = Fraction(number)
    if slash:
        value /= int(below) or 1
    return str(round(value))


# ---- MATH


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, else the last `\fbox{...}`: Hendrycks et al. (2021), hendrycks/math.

    Braces within it are matched, `\{` and `\}` left aside; one that never closes is no answer. Without braces it
    reaches to the next `$` or the end of the line, as lm_eval reads `\boxed 5`.
    """
    text = after_thinking(text)
    name = "\\boxed" if "\\boxed" in text else "\\fbox"
    _, found, rest = text.rpartition(name)
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip() or None if found else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip() or None
    return None


def metamath_text(text: str) -> str | None:
    """What follows the last `The answer is: `, up to a full stop at a line's end: MetaMath's eval_math.py."""
    _, mark, rest = after_thinking(text).rpartition("The answer is: ")
    answer = rest.partition(".\n")[0].strip()
    return answer.removesuffix(".").strip() or None if mark else None


def minerva(text: str) -> str | None:
    """Between the first `Final Answer: The final answer is` and `. I hope it is correct.`, on one line.

    Lewkowycz et al. (2022), appendix D, as lm_eval's minerva_math reads it: the closing words may be missing at the
    text's end.
    """
    line = after_thinking(text).partition("Final Answer: The final answer is")[2].partition("\n")[0]
    answer = line.partition(". I hope it is correct.")[0].strip()
    answer = answer.removesuffix(".").strip()
    return answer or None


# ---- any text

_PHRASE = re.compile(
    r"""\banswer(?:\ \(arabic\ numerals\)|\ to\ [^.:\n]{1,80}?)?\**(?:\ is\b|\ ?:|\ ?=)\**|\#{4}|答案|结果[是为]""",
    re.IGNORECASE | re.VERBOSE,
)


def final_answer(text: str) -> str | None:
    """What follows the last phrase that announces an answer: "The answer is", "**Answer:**", "####", "答案是".

    To the end of the sentence or line, without `**` and `$` around it and the full stop behind it.
    """
    text = after_thinking(text)
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    rest = re.sub(r"\A[\s:：*是为]+", "", text[ends[-1] :] if ends else "")
    rest = re.split(r"\n|[.!](?=\s|\Z)|[。！；]", rest, maxsplit=1)[0].strip(" *")
    for left, right in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = rest[len(left) : -len(right)]
        if rest.startswith(left) and rest.endswith(right) and left not in inner:
            rest = inner.strip()
    return rest or None


_WRITTEN = str.maketrans("０１２３４５６７８９．，－−", "0123456789.,--")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_NUMBER = re.compile(
    r"""(?:(?<![\w)\]}%])(?P<sign>[-+]))?(?:[$€£¥￥₹]\ ?(?P<inner>-)?)?
    (?P<number>(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,9},[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
    (?P<power>[eE][-+]?[0-9]+(?!\w))?
    (?P<fraction>\ {1,2}[0-9]{1,99}/[0-9]{1,99}(?![0-9/])|\ ?/\ ?[0-9]{1,99}(?![0-9.,/]))?""",
    re.VERBOSE,
)


def last_number(text: str) -> str | None:
    r"""The last number of the text, written plainly: `-1234.5`, `3/4`, `2 1/2`, `1.5e6`.

    Commas between thousands, currencies, a percent sign and a full stop behind it are left out; `\frac{3}{4}`,
    `3 × 10^5`, full-width digits and the typographic minus are read. A minus behind a digit or a bracket subtracts:
    `10-5` ends with 5. Exponents and indices (`cm^2`, `x_1`) are no numbers of their own.
    """
    numbers = _numbers(after_thinking(text))
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[str]:
    """All numbers of a text, as `last_number` writes them."""
    text = text.translate(_WRITTEN).replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(?<=[0-9])(?:\\,|[\u00a0\u2009\u202f])(?=[0-9]{3})", "", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda raised: "^{" + raised[0].translate(_RAISED) + "}", text)
    power = r"10\^(?:\{ ?([-+]?[0-9]+) ?\}|([-+]?[0-9]+))"
    text = re.sub(rf"(?<=[0-9]) {{0,2}}(?:×|x|\*|·|⋅|\\times|\\cdot) {{0,2}}{power}", r"e\1\2", text)
    text = re.sub(rf"(?<![\w.]){power}", r"1e\1\2", text)
    text = re.sub(r"(?:\^|(?<=[A-Za-z})\]])_) ?(?:\{[^{}]{0,99}\}|[-+]?\w+)", " ", text)
    text = re.sub(r"\\[dtc]?frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2 ", text)
    text = re.sub(r"\\[dtc]?frac ?([0-9]) ?([0-9])", r" \1/\2 ", text)
    return [_plainly(found) for found in _NUMBER.finditer(text)]


def _plainly(found: re.Match[str]) -> str:
    sign, inner, number, power, fraction = found.groups(default="")
    mixed = " " if fraction.startswith(" ") and fraction.lstrip()[0] != "/" else ""
    minus = "-" if (sign == "-") != (inner == "-") else ""
    return minus + number.replace(",", "") + power + mixed + fraction.replace(" ", "")


def number_answer(text: str) -> str | None:
    """The number that a text gives as its answer, however it marks it: in a box, behind a phrase, or the last one.

    Behind a phrase it is the first number after the last `=`. It follows no published script.
    """
    for marked in (boxed(text), final_answer(text)):
        numbers = _numbers((marked or "").rpartition("=")[2])
        if numbers:
            return numbers[0]
    return last_number(text)


def math_answer(text: str) -> str | None:
    """The formula that a text gives as its answer, however it marks it: in a box, behind a phrase, or the last `$...$`.

    It follows no published script.
    """
    formulas = re.findall(r"\$([^$\n]+)\$", after_thinking(text))
    return boxed(text) or final_answer(text) or (formulas[-1].strip() or None if formulas else None)


def code_block(text: str, containing: str = "") -> str | None:
    """The first fenced block of a text that has `containing` in it, else the first block; None without a fence.

    A block that never closes reaches to the end. Blocks within a list lose its indentation.
    """
    fences = r"^([ \t]*)(`{3,}|~{3,})(?![`~])([^`\n]*)\n(.*?)(?:^[ \t]*\2[ \t]*$|\Z)"
    blocks = [
        re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        for indent, _, _, body in re.findall(fences, after_thinking(text), re.MULTILINE | re.DOTALL)
    ]
    return next((block for block in blocks if containing in block), blocks[0] if blocks else None)
