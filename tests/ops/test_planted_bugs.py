"""Bugs planted in a copy of the chunked kernels' source are seen, each by the check that is named beside it.

A bug is a text of the source and what stands in its place. So the checks of chunked_checks.py are known to fail where
they should: a new kind of mistake, once met, belongs in here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rwkv_bone.ops.build import SOURCES
from rwkv_bone.ops.cuda import Unit
from rwkv_bone.ops.driver import DriverError
from tests.ops import chunked_checks as checks
from tests.ops import shim, wkv_abi
from tests.ops.chunked_shim import ChunkedShim, dtype_of
from tests.ops.shim import compile_on_shim

WARP, CHUNKED, COMMON, WKV7 = "warp.cuh", "chunked.cuh", "common.cuh", "wkv7_chunked.cuh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++"),
]


class Check(NamedTuple):
    run: Callable[[ChunkedShim], None]
    label: str = "debug32"
    dtype: str = ""
    N: int = 64


def on(*names: str) -> Callable[[ChunkedShim], None]:
    return lambda library: checks.agrees_with_float64(library, *names)


CHECKS = {
    "float64": Check(on("three_rows_with_different_states")),
    "rank-1 states": Check(on("asymmetric_rank1_states")),
    "repeated keys": Check(on("repeated_keys_over_one_boundary")),
    "a last chunk of 17 tokens": Check(on("length_17")),
    "packed": Check(on("packed")),
    "bfloat16": Check(on("three_rows_with_different_states"), "chunked32"),
    "three products": Check(on("three_rows_with_different_states"), "accurate16"),
    "the decay in two parts": Check(checks.adds_two_decays_in_float32, "chunked32", "bfloat16w"),
    "alone": Check(checks.is_the_same_alone),
    "alone, bfloat16": Check(checks.is_the_same_alone, "chunked32"),
    "unused slots": Check(checks.leaves_unused_slots),
    "order": Check(checks.is_the_same_in_any_order),
    "order, N 128": Check(checks.is_the_same_in_any_order, "debug16", N=128),
    "splits": Check(checks.is_the_same_for_all_splits),
    "specified": Check(lambda library: checks.does_what_is_specified(library, "packed")),
    "specified, bfloat16": Check(lambda library: checks.does_what_is_specified(library, "packed"), "chunked32"),
}


class Bug(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    check: str  # that sees it
    says: str = ""  # in its text


RACE = "a race"
BUGS = [
    # Where the elements of a fragment, a block or a row are.
    Bug(
        "a fragment's quarters in another order",
        WARP,
        "load<false>(Place::in_shared(row, column, threadIdx.x % 16u, threadIdx.x % 32u / 16u * 8u))",
        "load<false>(Place::in_shared(row, column, threadIdx.x % 16u ^ 8u, threadIdx.x % 32u / 16u * 8u))",
        "float64",
    ),
    Bug(
        "a transposed fragment's quarters in another order",
        WARP,
        "lane % 8u + lane / 16u * 8u, lane / 8u % 2u * 8u",
        "lane % 16u, lane / 16u * 8u",
        "float64",
    ),
    Bug(
        "an accumulator's rows and columns swapped among quarters",
        WARP,
        "f(value[2 * q + e], lane_row() + q % 2 * 8, lane_column() + e + q / 2 * 8)",
        "f(value[2 * q + e], lane_row() + q / 2 * 8, lane_column() + e + q % 2 * 8)",
        "float64",
    ),
    Bug(
        "rows of bfloat16 stored in the wrong quarter",
        WARP,
        "(quarter & 2) * 4) = make_uint4",
        "(quarter & 2 ^ 2) * 4) = make_uint4",
        "bfloat16",
    ),
    Bug(
        "a hand-over fetched in another order than written",
        WARP,
        "copy_async(value[plane] + Place::shared_place(place), from + plane * kElements + place,",
        "copy_async(value[plane] + Place::shared_place(place), from + plane * kElements + (place ^ 8),",
        "specified",
    ),
    Bug(
        "a hand-over written in another order than fetched",
        WARP,
        "block<64>(row, column) + of<64>(y, x)",
        "block<64>(row, column) + of<64>(y, x ^ 8)",
        "specified",
    ),
    # Barriers and copies.
    Bug(
        "no barrier between making the decayed inputs and reading them",
        WKV7,
        "    __syncthreads();\n  }\n};\n\n// ---",
        "  }\n};\n\n// ---",
        "order",
        RACE,
    ),
    Bug(
        "no barrier before the diagonal is inverted",
        WKV7,
        "__syncthreads();\n  s.solver.invert();\n  __syncthreads();\n  for (int slice",
        "s.solver.invert();\n  __syncthreads();\n  for (int slice",
        "order",
        RACE,
    ),
    Bug(
        "no barrier after the diagonal is inverted",
        WKV7,
        "s.solver.invert();\n  __syncthreads();\n  for (int task",
        "s.solver.invert();\n  for (int task",
        "order",
        RACE,
    ),
    Bug(
        "no barrier between the solves and the triangles' gradients",
        WKV7,
        "__syncthreads();\n  make_triangle_gradients(s);",
        "make_triangle_gradients(s);",
        "order",
        RACE,
    ),
    Bug(
        "no barrier before the decays give way to products",
        WKV7,
        "  __syncthreads();\n  if (warp_id() < slices) {",
        "  if (warp_id() < slices) {",
        "order",
        RACE,
    ),
    Bug(
        "no barrier in the scan's ring",
        WKV7,
        "wait_async<stages - 2>();\n    __syncthreads();\n    fetch(chunk + stages - 1);",
        "wait_async<stages - 2>();\n    fetch(chunk + stages - 1);",
        "order",
        RACE,
    ),
    Bug(
        "copies that nobody waits for", WKV7, "wait_async<0>();\n  __syncthreads();\n  s.solver", "s.solver", "float64"
    ),
    Bug(
        "a copy waited for a turn too late",
        WKV7,
        "wait_async<stages - 2>();\n    __syncthreads();\n    fetch(chunk - stages + 1);",
        "wait_async<stages - 1>();\n    __syncthreads();\n    fetch(chunk - stages + 1);",
        "float64",
    ),
    Bug(
        "the wrong stage of the scan's ring",
        WKV7,
        "const ScanStage<F, N, L>& now = shared.stage[chunk % stages];",
        "const ScanStage<F, N, L>& now = shared.stage[(chunk + 1) % stages];",
        "float64",
    ),
    Bug(
        "a stage filled while it is read",
        WKV7,
        "fetch(chunk - stages + 1);",
        "fetch(chunk - stages + 1);\n    if (chunk == walk.chunks - 1) fetch(chunk);",
        "order",
    ),
    # The ends of sequences.
    Bug(
        "missing tokens that decay",
        WKV7,
        "part.row + i < chunk.tokens ? log2_decay(raw[e]) : 0.0f",
        "log2_decay(raw[e])",
        "a last chunk of 17 tokens",
    ),
    Bug(
        "tokens of the next document read",
        CHUNKED,
        "chunk.stride + column, row + i < chunk.tokens)",
        "chunk.stride + column, chunk.base + (row + i) * chunk.stride < 100 * chunk.stride)",
        "alone",
    ),
    Bug(
        "tokens of the next document written",
        WARP,
        "(quarter & 1) * 8;\n  if (row >= rows) return;",
        "(quarter & 1) * 8;\n  if (row >= rows + 1) return;",
        "alone, bfloat16",
    ),
    Bug(
        "dy of the next document read by the scan",
        WKV7,
        "t * at.stride + column, t < at.tokens)",
        "t * at.stride + column, t < at.tokens + 1 && t < L && number == 0)",
        "alone",
    ),
    Bug(
        "a document's slots counted without the documents before it",
        COMMON,
        "offsets ? offsets[sequence] / kLength + sequence :",
        "offsets ? offsets[sequence] / kLength :",
        "alone",
    ),
    Bug(
        "a slot ascribed to the document before its own",
        COMMON,
        "first_segment<kLength>(middle) <= number",
        "first_segment<kLength>(middle) < number",
        "packed",
    ),
    Bug(
        "a slot that no chunk has is worked on",
        WKV7,
        "if (chunk.tokens == 0) return;\n  const Share<N, L> part;",
        "const Share<N, L> part;",
        "unused slots",
    ),
    # States.
    Bug(
        "the state's axes swapped",
        WKV7,
        "s.S.block(i, j), s.in.a.block",
        "s.S.block(j, i), s.in.a.block",
        "rank-1 states",
    ),
    Bug(
        "the state transposed in y",
        WKV7,
        "s.Q.block(t, j), s.S.block(i, j)",
        "s.Q.block(t, j), s.S.transposed(j, i)",
        "rank-1 states",
    ),
    Bug(
        "a stale carry: a chunk adds to the state at its start",
        WKV7,
        "S[j].value[i] += added[i];",
        "S[j].value[i] = start[j][i] + added[i];",
        "specified",
    ),
    Bug(
        "a stale carry: the gradient handed over after its decay",
        WKV7,
        "row, 16 * j, block_of<F>(dS[j]));\n    scale_columns<N>(dS, now.whole);",
        "row, 16 * j, block_of<F>(dS[j]));",
        "float64",
    ),
    Bug(
        "the first row's initial state for all",
        WKV7,
        "load_state<N>(S, p.s0, walk.state, row)",
        "load_state<N>(S, p.s0, walk.head, row)",
        "float64",
    ),
    Bug(
        "the first split's rows for all",
        WKV7,
        "walk.row, walk.row + walk.rows, walk.threads",
        "0, walk.rows, walk.threads",
        "splits",
    ),
    # The algorithm.
    Bug(
        "a diagonal that belongs to a triangle left in",
        WKV7,
        "return triangle == kAB || triangle == kAK;",
        "return triangle == kAB;",
        "float64",
    ),
    Bug("the upper triangle for the lower", CHUNKED, "x = column < row ||", "x = column > row ||", "float64"),
    Bug("the inverse transposed", WKV7, "inverse[b].block(0, 0)", "inverse[b].transposed(0, 0)", "repeated keys"),
    Bug("the inverse not transposed", WKV7, "inverse[b].transposed(0, 0)", "inverse[b].block(0, 0)", "repeated keys"),
    Bug("the inverse with its identity twice", WKV7, "i == column ? 0.0f : x[i]", "x[i]", "float64"),
    Bug(
        "a block of the solve left out",
        WKV7,
        "for (int m = b + 1; m < L / 16; ++m)",
        "for (int m = b + 2; m < L / 16; ++m)",
        "float64",
    ),
    Bug("a decayed with its own token", WKV7, "* power_of_two(before[i][e])", "* power_of_two(upto[i][e])", "float64"),
    Bug("da decayed with its own token", WKV7, "x *= s.grown[t - 1]", "x *= s.grown[t]", "float64"),
    Bug("the whole decay of the first chunk for all", WKV7, "p.whole + number * N, walk", "p.whole, walk", "float64"),
    Bug(
        "dlogw without what reaches the chunk's end",
        WKV7,
        "- a_products[b].value[i] + base.value[i]",
        "- a_products[b].value[i]",
        "float64",
    ),
    Bug("dS not decayed over its chunk", WARP, "x[e] *= factor[Place::column(place) + e]", "x[e] *= 1.0f", "specified"),
    Bug(
        "sums over tokens without the warps before",
        CHUNKED,
        "warp < warp_id(); ++warp",
        "warp < warp_id() - 1; ++warp",
        "float64",
    ),
    Bug("w0 left out of the decay's slope", WKV7, "if (p.w0) y +=", "if (false) y +=", "the decay in two parts"),
    # The number formats.
    Bug("low times high with the wrong plane", WARP, "x.pair[1], y.pair[0]", "x.pair[0], y.pair[0]", "three products"),
    Bug(
        "a product of the three left out",
        WARP,
        "multiply_pairs(sum.value, x.pair[0], y.pair[1]);",
        "",
        "three products",
    ),
    Bug(
        "the high plane fetched in the place of the low one",
        WARP,
        "copy_async(value[plane] + Place::shared_place(place), from + plane * kElements + place,",
        "copy_async(value[plane] + Place::shared_place(place), from + place,",
        "three products",
    ),
    Bug(
        "pairs swapped in bfloat16 rows",
        WARP,
        "pair_of(BFloat16{}, sum.value[2 * q], sum.value[2 * q + 1])",
        "pair_of(BFloat16{}, sum.value[2 * q + 1], sum.value[2 * q])",
        "bfloat16",
    ),
]


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Around every buffer, so that a bug that writes beyond harms nothing else."""
    exact, rows = wkv_abi.poisoned, 2**14

    def roomy(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return exact((math.prod(shape) + 2 * rows,), dtype)[rows:-rows].view(shape)

    monkeypatch.setattr(wkv_abi, "poisoned", roomy)
    monkeypatch.setattr(shim, "poisoned", roomy)


def compiled(folder: Path, check: Check, *changes: tuple[str, str, str]) -> ChunkedShim:
    """The kernels that a check needs, from a copy of the source with (file, text, replacement) applied."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    for file, text, replacement in changes:
        source = (sources / file).read_text(encoding="utf-8")
        assert text in source, f"{file} has changed: {text!r} is not in it any more"
        (sources / file).write_text(source.replace(text, replacement), encoding="utf-8")
    unit = Unit("wkv7", check.label, check.dtype or dtype_of(check.label), check.N)
    return ChunkedShim(compile_on_shim(unit.source(), folder / "kernels.so", "-O1", sources=sources), unit)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_without_a_bug(name, tmp_path):
    CHECKS[name].run(compiled(tmp_path, CHECKS[name]))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen(bug, tmp_path):
    check = CHECKS[bug.check]
    library = compiled(tmp_path, check, (bug.file, bug.text, bug.replacement))
    with pytest.raises((AssertionError, DriverError), match=bug.says or None):
        check.run(library)
