"""Which kernels a call of a form of CUDA's takes.

    cuda-exact      the sequential kernels, label "exact"
    cuda-chunked    tensor cores, one bfloat16 product each, in chunks of 32 tokens (16 for heads of 128)
    cuda-accurate   tensor cores, three bfloat16 products each, in chunks of 16 tokens
    cuda-LABEL      the chunked kernels of that label (ops/sizes.py), e.g. cuda-chunked64: for tests and benchmarks
    cuda            whichever is the fastest for the call's sizes: the first of choice.json's rules that fits says so,
                    and without one it is "exact", which it also is for float32

choice.json is a list of rules, which scripts/gpu_check/choose.py writes from measurements. A rule is an object of

    operator    "wkv7", "wkv6" or "wkv5"
    N           the head size
    kernels     a label: "exact", or e.g. "chunked32", of those that there are (LENGTHS in ops/chunked_launches.py)
    tokens      [from, below]: tokens of a sequence, of packed documents their mean; below may be null: any number
    heads       [from, below]: heads of all sequences, H times B or times the number of documents
    capability  optional: the compute capability of the cards that it is for, e.g. "9.0". Without it, all from 8.0 on
                for whose capability, operator and head size there is no rule
    origin      "predicted", or "measured on " and the card's name
    why         one sentence

Rules are tried in their order. A choice depends on nothing else, so backward makes that of forward.

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_bone.ops.chunked_launches import LENGTHS
from rwkv_bone.ops.sizes import CPU, EXACT, chunking

TABLE = Path(__file__).with_name("choice.json")
LABELS = {"cpu": CPU, "cuda-exact": EXACT}
# Of what a form computes with; float32 takes more than one bfloat16 product.
DTYPES = {"chunked": (torch.bfloat16,), "accurate": (torch.bfloat16, torch.float32)}
FEW = 3  # rules that fit into a line
CAPABILITY = (8, 0)  # bfloat16 tensor cores, and copies into shared memory that nobody waits for


class Range(NamedTuple):
    start: int
    below: int | None

    def holds(self, number: int) -> bool:
        return self.start <= number and (self.below is None or number < self.below)


ANY = Range(1, None)


class Rule(NamedTuple):
    """See above."""

    operator: str
    N: int
    kernels: str
    tokens: Range
    heads: Range
    capability: str | None
    origin: str
    why: str

    def __str__(self) -> str:
        chunked = chunking(self.kernels)
        words = [f"tensor cores in chunks of {chunked.tokens} tokens" if chunked else "sequential"]
        for number, what in ((self.tokens, "tokens"), (self.heads, "heads")):
            if number.start > 1:
                words.append(f"from {number.start} {what} on")
            if number.below is not None:
                words.append(f"below {number.below} {what}")
        return " ".join(words)


def label(form: str, operator: str, dtype: torch.dtype, sizes: Sequence[int], device: torch.device) -> str:
    """The kernels of a call: of sizes (B, T, H, N, D), on r's device in r's dtype."""
    if form != "cuda":
        return _fixed(form, sizes[3])
    B, T, H, N, D = sizes
    tokens, heads = (T // D if D else T), (D or B) * H
    if dtype in DTYPES["chunked"]:
        for rule in rules(operator, N, torch.cuda.get_device_capability(device)):
            if rule.tokens.holds(tokens) and rule.heads.holds(heads):
                return rule.kernels
    return EXACT


def labels(form: str, operator: str, dtype: torch.dtype, N: int) -> tuple[str, ...]:
    """All kernels that calls of a form may take, on whatever card and for whatever sizes."""
    if form != "cuda":
        return (_fixed(form, N),)
    chosen = (rule.kernels for rule in table() if (rule.operator, rule.N) == (operator, N))
    return tuple(dict.fromkeys((EXACT, *(chosen if dtype in DTYPES["chunked"] else ()))))


def _fixed(form: str, N: int) -> str:
    if form in LABELS:
        return LABELS[form]
    mode = form.removeprefix("cuda-")
    if mode not in LENGTHS:
        return mode
    # A trace may have made N a symbol, hence int.
    # A head size without kernels gets the label of another: `obstacle` says what is wrong with it.
    return f"{mode}{LENGTHS[mode].get(int(N), LENGTHS[mode][64])[0]}"


@functools.cache
def rules(operator: str, N: int, capability: tuple[int, int]) -> tuple[Rule, ...]:
    """Those of a card."""
    if capability < CAPABILITY:
        return ()
    found = [rule for rule in table() if (rule.operator, rule.N) == (operator, N)]
    own = [rule for rule in found if rule.capability == "{}.{}".format(*capability)]
    return tuple(own or [rule for rule in found if rule.capability is None])


@functools.cache
def table() -> tuple[Rule, ...]:
    """choice.json."""
    return tuple(parse(row) for row in json.loads(TABLE.read_text(encoding="utf-8")))


def parse(row: dict) -> Rule:
    """A rule of choice.json. Raises ValueError, KeyError or TypeError for one that is none."""
    row = {"capability": None, **row}
    rule = Rule(**{**row, "tokens": Range(*row["tokens"]), "heads": Range(*row["heads"])})
    if rule.kernels not in (EXACT, *(f"chunked{length}" for length in LENGTHS["chunked"].get(rule.N, ()))):
        raise ValueError(f"no kernels of a rule: {rule.kernels} for head size {rule.N}")
    if rule.origin != "predicted" and not rule.origin.startswith("measured on "):
        raise ValueError(f"origin must be 'predicted' or 'measured on ' and a card, found {rule.origin!r}")
    return rule


def obstacle(mode: str, N: int, capability: tuple[int, int], tokens: int | None = None) -> str:
    """Why the kernels of a mode ("chunked" or "accurate") cannot be had, in words; nothing if they can.

    `tokens`: of a chunk, where a length is asked for.
    """
    if capability < CAPABILITY:
        needed, found = ("{}.{}".format(*x) for x in (CAPABILITY, capability))
        return f"the {mode} kernels need a card of compute capability {needed} or higher, this one has {found}"
    if N not in LENGTHS[mode]:
        sizes = ", ".join(map(str, LENGTHS[mode]))
        return f"the {mode} kernels need a head size of {sizes}, found {N}"
    if tokens is not None and tokens not in LENGTHS[mode][N]:
        lengths = ", ".join(map(str, LENGTHS[mode][N]))
        return f"the {mode} kernels for a head size of {N} take chunks of {lengths} tokens, not {tokens}"
    return ""


def describe(operator: str, N: int, capability: tuple[int, int], card: str) -> str:
    """What form "cuda" takes on a card for bfloat16, and how that is known."""
    found = rules(operator, N, capability)
    if not found:
        return f"sequential (nothing else is known to be faster for head size {N})"
    parts = ", ".join(map(str, found))
    if len(found) > FEW:
        lengths = ", ".join(dict.fromkeys(str(rule._replace(tokens=ANY, heads=ANY)) for rule in found))
        parts = f"by the sizes of each call {lengths}"
    elif not any(rule.tokens == rule.heads == ANY for rule in found):
        parts += ", else sequential"
    return f"{parts} ({'; '.join(dict.fromkeys(_known(rule.origin, card) for rule in found))})"


def _known(origin: str, card: str) -> str:
    if origin == "predicted":
        return "predicted, not measured on this card"
    return "measured on this card" if origin == f"measured on {card}" else f"{origin}, not on this card"
