r"""The value of a formula in LaTeX or plain notation, at a point: by recursive descent, no `eval`, in bounded time.

Numbers stay exact fractions while they are rational and short, and are floats or complex numbers beyond. Two formulas
that agree at several points are the same, but for a chance of about one in a million millions.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

BITS = 4096  # of an exact numerator or denominator; beyond, numbers are floats
DEEPEST = 40  # brackets within brackets


class Unreadable(Exception):
    """A text that is no formula, or one too deep."""


_TOKEN = re.compile(
    r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\[A-Za-z]+|\\\\|"
    r"(?<![A-Za-z])(?:arcsin|arccos|arctan|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infinity|infty)(?![A-Za-z]))|(\S))"
)


def tokens_of(text: str) -> list[str]:
    """Numbers, commands and names of functions, and single characters."""
    return [found[0].strip() for found in _TOKEN.finditer(text)]


def value_at(tokens: list[str], point: int) -> Any:
    """The value where the variables have the values of this point: a Fraction, float or complex.

    Raises Unreadable, or an ArithmeticError or ValueError of Python's where there is no value.
    """
    return _Value(tokens, point).whole()


def _real_log(x: Any) -> Any:
    return math.log(x) if not isinstance(x, complex) and x > 0 else cmath.log(x)


def _root(x: Any, degree: int = 2) -> Any:
    if isinstance(x, complex) or (x < 0 and degree % 2 == 0):
        return complex(x) ** (1 / degree)
    return math.copysign(math.sqrt(abs(x)) if degree == 2 else abs(x) ** (1 / degree), x)


def _of(real: Callable[[float], float], imaginary: Callable[[complex], complex]) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        try:
            return imaginary(x) if isinstance(x, complex) else real(x)
        except ValueError:
            return imaginary(complex(x))

    return function


_SIN, _COS, _TAN = _of(math.sin, cmath.sin), _of(math.cos, cmath.cos), _of(math.tan, cmath.tan)
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sin": _SIN,
    "cos": _COS,
    "tan": _TAN,
    "csc": lambda x: 1 / _SIN(x),
    "sec": lambda x: 1 / _COS(x),
    "cot": lambda x: 1 / _TAN(x),
    "arcsin": _of(math.asin, cmath.asin),
    "arccos": _of(math.acos, cmath.acos),
    "arctan": _of(math.atan, cmath.atan),
    "exp": _of(math.exp, cmath.exp),
    "ln": _real_log,
    "log": _real_log,
}
_CONSTANTS: dict[str, Any] = {"pi": math.pi, "infty": math.inf, "infinity": math.inf, "e": math.e, "i": 1j}
_GREEK = set("alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega Delta Omega ell".split())
_TIMES, _OVER = ("*", r"\cdot", r"\times"), ("/", r"\div")


class _Value:
    """The value of a formula at one point, by recursive descent over its tokens."""

    def __init__(self, tokens: list[str], point: int):
        self.tokens = tokens[::-1]  # the next one last
        self.point = point
        self.depth = self.bars = 0

    def whole(self) -> Any:
        value = self.sum()
        if self.tokens:
            raise Unreadable
        return value

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        if not self.tokens or (wanted and self.tokens[-1] not in wanted):
            raise Unreadable
        return self.tokens.pop()

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable
        value = self.term(self.sign())
        while self.next() in ("+", "-") and self.next():
            value = _exact(value + self.term(self.sign()))
        self.depth -= 1
        return value

    def sign(self) -> int:
        sign = 1
        while self.next() in ("+", "-") and self.next():
            sign *= -1 if self.take() == "-" else 1
        return sign

    def term(self, sign: int) -> Any:
        value = sign * self.factor()
        while True:
            if self.next() in _TIMES:
                self.take()
                value = _exact(value * self.sign() * self.factor())
            elif self.next() in _OVER:
                self.take()
                value = _exact(value / (self.sign() * self.factor()))
            elif self.starts():
                value = _exact(value * self.factor())
            else:
                return value

    def starts(self) -> bool:
        """Whether the next token can begin a factor."""
        token = self.next()
        if token == "|":
            return self.bars == 0
        return (
            token in ("(", "[", "{")
            or token.isalpha()
            or token[:1] == "\\"
            and token[1:].isalpha()
            and token not in (r"\cdot", r"\times", r"\div", r"\rbrace", r"\lbrace")
        )

    def factor(self) -> Any:
        if _digits(self.next()):
            return self.power(self.number())
        return self.power(self.atom())

    def number(self) -> Fraction:
        """A number, mixed with the fraction behind it: 2\\frac{1}{2}, 2 1/2."""
        text = self.take()
        if self.next() == "_":  # a number in another base
            raise Unreadable
        value = Fraction(text)
        if text.isdigit():
            ahead = "".join(self.tokens[-7:][::-1])
            for pattern in (
                r"([0-9]+)(/)([0-9]+)",
                r"\\frac\{([0-9]+)(\}\{)([0-9]+)\}",
                r"\\frac([0-9])()([0-9])(?![0-9])",
            ):
                if (found := re.match(pattern, ahead)) and int(found[3]):
                    self.skip(len(found[0]))
                    return value + Fraction(int(found[1]), int(found[3]))
        if _digits(self.next()):
            raise Unreadable
        return value

    def skip(self, characters: int) -> None:
        while characters > 0:
            characters -= len(self.take())

    def power(self, value: Any) -> Any:
        while self.next() == "!":
            self.take()
            value = Fraction(math.factorial(_integer(value, 170)))
        if self.next() == "^":
            self.take()
            value = _power(value, self.exponent())
        return value

    def exponent(self) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable
        sign = self.sign()
        value = Fraction(self.take()) if _digits(self.next()) else self.atom()
        if self.next() == "^":
            self.take()
            value = _power(value, self.exponent())
        self.depth -= 1
        return sign * value

    def argument(self) -> Any:
        """What a command applies to: a group, or one digit, letter or command."""
        token = self.next()
        if _digits(token):
            self.take()
            if len(token) > 1:
                self.tokens.append(token[1:])
            return Fraction(token[0])
        return self.atom()

    def atom(self) -> Any:
        token = self.take()
        closing = {"(": ")", "[": "]", "{": "}"}.get(token)
        if closing:
            bars, self.bars = self.bars, 0
            value = self.sum()
            self.take(closing)
            self.bars = bars
            return value
        if token == "|":
            self.bars += 1
            value = self.sum()
            self.take("|")
            self.bars -= 1
            return abs(value)
        name = token.lstrip("\\")
        if name == "frac":
            above = self.argument()
            return _exact(above / self.argument())
        if name == "sqrt":
            degree = 2
            if self.next() == "[":
                self.take()
                degree = int(self.take())
                self.take("]")
                if not 1 < degree < 100:
                    raise Unreadable
            # Plain sqrt12 has 12 under the root, \\sqrt12 as TeX reads it only 1.
            plain = token == "sqrt" and _digits(self.next())
            return _root(Fraction(self.take()) if plain else self.argument(), degree)
        if name == "binom":
            above, below = _integer(self.argument(), 1000), _integer(self.argument(), 1000)
            return _exact(Fraction(math.comb(above, below)))
        if name in _FUNCTIONS:
            return self.applied(_FUNCTIONS[name], name)
        if token == "\\" + name and name not in _GREEK and name not in _CONSTANTS or not name.isalpha():
            raise Unreadable
        if self.next() == "_":
            self.take()
            name += "_" + self.index()
        elif name in _CONSTANTS:
            return _CONSTANTS[name]
        return _variable(name, self.point)

    def index(self) -> str:
        if self.next() != "{":
            return self.take()
        self.take()
        index = ""
        while self.next() != "}":
            index += self.take()
        self.take()
        return index

    def applied(self, function: Callable[[Any], Any], name: str) -> Any:
        r"""A function of what follows it: \sin^2 x, \log_2 8, \sin 2x, \sin(x)."""
        base, exponent = None, None
        if self.next() == "_" and name == "log":
            self.take()
            base = Fraction(self.take()) if _digits(self.next()) else self.atom()
        if self.next() == "^":
            self.take()
            exponent = self.exponent()
        if self.next() in ("(", "[", "{", "|"):
            value = self.atom()
        else:
            value = self.sign() * self.factor()
            while (self.starts() or _digits(self.next())) and self.next().lstrip("\\") not in _FUNCTIONS:
                value = value * self.factor()
        value = function(value)
        value = value / _real_log(base) if base is not None else value
        return _power(value, exponent) if exponent is not None else value


def _digits(token: str) -> bool:
    return token[:1] in "0123456789." and token not in ("", ".")


def _integer(value: Any, most: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= most:
        raise Unreadable
    return int(value)


def _variable(name: str, point: int) -> Fraction:
    """The value that stands for a variable at a point: between 0.2 and 2.2, of either sign."""
    number = zlib.crc32(f"{name} {point}".encode())
    return Fraction(number % 2003 + 201, 1001) * (-1 if number >> 16 & 1 else 1)


def _exact(value: Any) -> Any:
    """The number itself, or a float where a fraction has grown too long."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        return float(value)
    return value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits <= BITS:
            return base ** int(exponent)
    if isinstance(base, complex) or isinstance(exponent, complex) or (base < 0 and exponent != int(exponent)):
        return complex(base) ** complex(exponent)
    return float(base) ** float(exponent)
