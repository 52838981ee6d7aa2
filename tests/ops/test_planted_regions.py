"""Bugs planted in a copy of the regions' CUDA source are seen, each by the check that is named beside it.

As test_planted_bugs.py, which has the chunked kernels'.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rwkv_bone.ops.build import SOURCES
from rwkv_bone.ops.driver import DriverError
from rwkv_bone.ops.regions.launches import Unit
from tests.ops import region_checks as checks
from tests.ops.region_checks import case_of
from tests.ops.shim import ShimCalls, compile_on_shim

REGIONS, CROSS_ENTROPY = "regions.cuh", "cross_entropy.cuh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++"),
]


class Check(NamedTuple):
    unit: Unit
    run: Callable[[ctypes.CDLL], None]


def equals(region: str, size: str, dtypes: str = "bf16 with trained parameters") -> Callable[[ctypes.CDLL], None]:
    def run(_: ctypes.CDLL) -> None:
        case = case_of(region, dtypes, size)
        checks.equals_its_definition(region, case)
        checks.strips_do_not_matter(region, case)

    return run


def ordered(region: str, size: str) -> Callable[[ctypes.CDLL], None]:
    return lambda raw: checks.is_the_same_in_any_order(raw, region, case_of(region, "fp32", size))


MIX1, MIX6 = Unit("mix", "bfloat16", 1), Unit("mix", "bfloat16", 6)
PRE, POST, GATED = (Unit(region, "bfloat16", 64) for region in ("pre7", "post7", "gated_norm"))
ROWS = Unit("cross_entropy", "bfloat16", 1)
SOME, USUAL = "documents, some carried", "the usual head"
CHECKS = {
    "one token": Check(MIX1, equals("mix", "one token")),
    "batch": Check(MIX1, equals("mix", "one lerp")),
    "carried": Check(MIX1, equals("mix", "carried")),
    "documents": Check(MIX6, equals("mix", SOME)),
    "many documents": Check(MIX1, equals("mix", "more documents than blocks")),
    "alone": Check(MIX6, lambda _: checks.documents_are_alone("mix")),
    "changes": Check(Unit("mix6", "bfloat16", 6), equals("mix6", SOME)),
    "float32 shares": Check(MIX6, equals("mix", SOME, "bf16")),
    "mix order": Check(Unit("mix", "float32", 6), ordered("mix", SOME)),
    "relu": Check(Unit("relu_square", "bfloat16", 1), equals("relu_square", "no whole pack")),
    "pre7": Check(PRE, equals("pre7", USUAL)),
    "first layer": Check(PRE, lambda _: checks.first_layer_adds_both_parts("bf16")),
    "pre7 order": Check(Unit("pre7", "float32", 64), ordered("pre7", USUAL)),
    "post7": Check(POST, equals("post7", USUAL)),
    "wide": Check(POST, equals("post7", "more channels than a block has")),
    "post7 order": Check(Unit("post7", "float32", 64), ordered("post7", USUAL)),
    "gated": Check(GATED, equals("gated_norm", USUAL)),
    "rows": Check(ROWS, lambda _: checks.cross_entropy_equals_its_definition(8200, torch.bfloat16)),
    "uneven rows": Check(ROWS, lambda _: checks.cross_entropy_equals_its_definition(4099, torch.bfloat16)),
    "strange rows": Check(ROWS, lambda _: checks.cross_entropy_of_strange_rows(torch.bfloat16)),
    "rows order": Check(ROWS, checks.cross_entropy_is_the_same_in_any_order),
}


class Bug(NamedTuple):
    name: str
    text: str
    replacement: str
    check: str
    file: str = REGIONS


BUGS = [
    # Sequences.
    Bug(
        "a document ascribed to the one before",
        "all.offsets[middle] <= token",
        "all.offsets[middle] < token",
        "documents",
    ),
    Bug("a strip that does not see a document end", "while (token >= end)", "while (token > end)", "many documents"),
    Bug(
        "a strip that sees one document at most",
        "while (token >= end) ++sequence, begin = end, end = all.begin(sequence + 1);",
        "if (token > end) ++sequence, begin = end, end = all.begin(sequence + 1);",
        "documents",
    ),
    Bug(
        "the row before a document for its first",
        "if (token > at.begin) return place",
        "if (token > 0) return place",
        "alone",
    ),
    Bug("carried rows for all", "at.sequence >= in.last_rows", "at.sequence > in.last_rows", "documents"),
    Bug(
        "a gradient handed to the document before",
        "next = begins ? Row<W>{} : passed;",
        "next = passed;",
        "documents",
    ),
    Bug("nothing from the strip after", "if (end < at.end) {", "if (false) {", "batch"),
    Bug("a gradient from the next sequence's strip", "if (end < at.end) {", "if (end < place.tokens) {", "documents"),
    Bug("dlast of every sequence", "begins && at.sequence < p.carried", "begins && at.sequence == 0", "carried"),
    # Formulas and the places of numbers.
    Bug(
        "the first share for all",
        "in.shares.at(m * place.channels + place.channel)",
        "in.shares.at(place.channel)",
        "documents",
    ),
    Bug("shares read in the wrong dtype", "return wide ? load", "return !wide ? load", "float32 shares"),
    Bug(
        "changes of the first mix for all",
        "in.changes + place.element(m * place.tokens + token)",
        "in.changes + place.element(token)",
        "changes",
    ),
    Bug("own and passed exchanged", "own[e] += g[e] * (1.0f - share[e]);", "own[e] += g[e] * share[e];", "one token"),
    Bug("relu's square of negative numbers", "h < 0.0f ? 0.0f : h", "h", "relu"),
    Bug(
        "the tail of the numbers left out",
        "for (int64_t i = first; i < p.numbers; ++i)",
        "for (int64_t i = first; i < 0; ++i)",
        "relu",
    ),
    Bug("a head summed over half of itself", "other < N / W; other *= 2", "other < N / W / 2; other *= 2", "post7"),
    Bug("two heads summed as one", "other < N / W; other *= 2", "other < 2 * N / W; other *= 2", "wide"),
    Bug("the direction not taken out of its gradient", "kk.zero ? 0.0f : kk.value[e] * along", "0.0f", "pre7"),
    Bug("a head of zeros divided by its length", "1.0f / (zero ? kShortest : length)", "1.0f / length", "pre7"),
    Bug("the bonus left out of dk", "return dk_wkv[e] + dk_bonus[e];", "return dk_wkv[e];", "pre7"),
    Bug("the bonus left out of dv0", "place.put(p.dv0, token, dv);", "place.put(p.dv0, token, dv_wkv);", "first layer"),
    Bug(
        "the variance with its mean",
        "return (d[e] - mean - value[e] * along) * scale;",
        "return (d[e] - value[e] * along) * scale;",
        "post7",
    ),
    Bug("eps left out", "* (1.0f / N) + eps)", "* (1.0f / N))", "post7"),
    Bug(
        "silu's slope without its second part",
        "opened[e] * (1.0f + gate[e] * (1.0f - opened[e]))",
        "opened[e]",
        "gated",
    ),
    # Sums over tokens, and barriers.
    Bug("only the first strip of a block counts", "strip < kThreads / kLanes; ++strip", "strip < 1; ++strip", "post7"),
    Bug("parts of the wrong block", "(place.block * count + number)", "(number)", "batch"),
    Bug(
        "channels of the first block of channels for all",
        "place.channel - threadIdx.x % kLanes * kWidth<T> + threadIdx.x;",
        "threadIdx.x;",
        "wide",
    ),
    Bug(
        "only the first part counts",
        "for (int64_t block = slice; block < p.blocks;",
        "for (int64_t block = slice; block < 1;",
        "batch",
    ),
    Bug(
        "no barrier before the strips are summed",
        "store(value + threadIdx.x * kWidth<T>, part);\n    __syncthreads();",
        "store(value + threadIdx.x * kWidth<T>, part);",
        "mix order",
    ),
    Bug(
        "no barrier after the strips are summed",
        "place.channels + channel] = sum;\n    }\n    __syncthreads();",
        "place.channels + channel] = sum;\n    }",
        "post7 order",
    ),
    Bug(
        "no barrier before the parts are summed",
        "shared.value[slice][lane] = sum;\n  __syncthreads();",
        "shared.value[slice][lane] = sum;",
        "pre7 order",
    ),
    # Rows of logits.
    Bug("the last of the largest logits", "here > largest", "here >= largest", "rows", CROSS_ENTROPY),
    Bug("a sum that is not scaled", "sum *= expf(largest - here);", "", "rows", CROSS_ENTROPY),
    Bug(
        "every largest logit of its pack",
        "gradient[e] += l2wrap * most, found = true;",
        "gradient[e] += l2wrap * most;",
        "rows",
        CROSS_ENTROPY,
    ),
    Bug(
        "logits after the last whole pack", "p.vocabulary / W", "p.vocabulary / kWidth<T>", "uneven rows", CROSS_ENTROPY
    ),
    Bug(
        "-inf for the lowest number",
        "float largest = kLowest",
        "float largest = -__uint_as_float(0x7f800000)",
        "strange rows",
        CROSS_ENTROPY,
    ),
    Bug(
        "a target outside the vocabulary", "target >= 0 && target < p.vocabulary", "true", "strange rows", CROSS_ENTROPY
    ),
    Bug(
        "the loss read after a gradient is written",
        "if (!p.gradient) return;\n  __syncthreads();",
        "if (!p.gradient) return;",
        "rows order",
        CROSS_ENTROPY,
    ),
]


def compiled(folder: Path, check: Check, *changes: tuple[str, str, str]) -> ShimCalls:
    """The kernels that a check needs, from a copy of the source with (file, text, replacement) applied."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    for file, text, replacement in changes:
        source = (sources / file).read_text(encoding="utf-8")
        assert text in source, f"{file} has changed: {text!r} is not in it any more"
        (sources / file).write_text(source.replace(text, replacement), encoding="utf-8")
    calls = ShimCalls(folder)
    calls.load(compile_on_shim(check.unit.source(), folder / "kernels.so", "-O1", sources=sources), check.unit)
    return calls


def run(calls: ShimCalls, check: Check) -> None:
    raw = ctypes.CDLL(str(calls.folder / "kernels.so"))
    with checks.on_the_shim(calls):
        check.run(raw)


def test_every_check_passes_without_a_bug(tmp_path):
    units = {check.unit for check in CHECKS.values()}
    calls = ShimCalls(tmp_path)
    calls.load(compile_on_shim("".join(unit.source() for unit in units), tmp_path / "kernels.so", "-O1"), *units)
    for check in CHECKS.values():
        run(calls, check)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen(bug, tmp_path):
    check = CHECKS[bug.check]
    calls = compiled(tmp_path, check, (bug.file, bug.text, bug.replacement))
    with pytest.raises((AssertionError, DriverError)):
        run(calls, check)
