"""What chunked kernels on the host shim are held to: each check takes a library, and raises if it finds a fault.

test_chunked_source.py asks them of our kernels, and test_planted_bugs.py shows which check sees which bug.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tests.ops import chunk_spec6, chunk_spec7, wkv6_inputs, wkv_inputs
from tests.ops.chunk_cases import AGAINST_SPEC, bounds, inputs, reference, with_two_decays
from tests.ops.chunk_model import Chunks
from tests.ops.chunked_shim import DTYPES, ChunkedShim, Step
from tests.ops.packed_inputs import each_alone, packed_case
from tests.ops.shim import schedule
from tests.ops.wkv_inputs import relative_error

MAKE_CASE = {
    "wkv7": wkv_inputs.make_case,
    "wkv6": functools.partial(wkv6_inputs.make_case, "wkv6"),
    "wkv5": functools.partial(wkv6_inputs.make_case, "wkv5"),
}
SPECS = {"wkv7": chunk_spec7, "wkv6": chunk_spec6, "wkv5": chunk_spec6}
OPERANDS = {"debug": "fp32", "chunked": "bf16", "accurate": "bf16x3"}  # as the specifications call them
# Of three products: what sums of another order leave, where an operand's 16 bits round to a neighbour.
LIMITS = {**AGAINST_SPEC, "bf16x3": 1e-5}
# What a specification's name lies in, where a kernel puts another thing in the same place later.
PLACES = {"KV": "states", "DR": "dstates", "Y0": "y"}
RESULTS = ("y", "state", "dstate0", "dr", "dw", "dk", "dv", "da", "db", "du")  # all else is numbered by slots


@functools.cache
def problem(operator: str, L: int, name: str, dtype: torch.dtype, N: int) -> tuple[dict, dict[str, Tensor], str]:
    """An input of chunk_cases: the case, its float64 results, and which bounds are for it."""
    make, kind = inputs(operator, L, N)[name]
    case = make(dtype)
    return case, reference(operator, case), kind


def assert_within(found: dict[str, Tensor], expected: dict[str, Tensor], limits: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    errors = {name: relative_error(x, expected[name]) for name, x in found.items()}
    over = {name: f"{error:.1e}, at most {limits[name]:.1e}" for name, error in errors.items() if error > limits[name]}
    assert not over, over


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], why: str) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.isfinite(x).all(), name
        assert torch.equal(x, expected[name]), f"{name}: {why}"


def random_case(library: ChunkedShim, **sizes: int) -> dict:
    return MAKE_CASE[library.operator](DTYPES[library.mode], N=library.unit.N, **sizes)


def packed(library: ChunkedShim, lengths: tuple[int, ...]) -> dict:
    return packed_case(library.operator, DTYPES[library.mode], lengths=lengths, H=1, N=library.unit.N)


# --------------------------------------------------------------------------------------------- the checks
def agrees_with_float64(library: ChunkedShim, *names: str) -> None:
    """On inputs of chunk_cases."""
    for name in names:
        case, expected, kind = problem(library.operator, library.L, name, DTYPES[library.mode], library.unit.N)
        assert_within(library.run(case), expected, bounds(library.operator, kind, OPERANDS[library.mode]))


def adds_two_decays_in_float32(library: ChunkedShim) -> None:
    """Kernels for a bfloat16 w and a float32 w0."""
    case = with_two_decays(random_case(library, T=65))
    assert_within(library.run(case), reference("wkv7", case), bounds("wkv7", "ordinary"))


def is_the_same_alone(library: ChunkedShim) -> None:
    """A packed document has the bits it has alone: of one token, as long as a chunk, shorter and longer."""
    L = library.L
    case = packed(library, (1, 1, L - 1, L, L + 1, 3, 2 * L, 1, 2 * L + 5, 16, 17))
    assert_same(library.run(case), each_alone(library.operator, case, library.run), "not as alone")


def leaves_unused_slots(library: ChunkedShim) -> None:
    L = library.L
    case = packed(library, (1, L - 1, L, L + 8, 3))
    used = Chunks(1, case["r"].shape[1], L, case["cu_seqlens"]).used
    assert not used.all()
    seen = set()
    for step in library.run_in_steps(case)[0]:
        for name, x in step.after.items():
            if name not in RESULTS:
                assert x[~used].isnan().all(), f"{step.part} writes {name} of a slot that no chunk has"
                seen.add(name)
    assert {"states", "dstates", "whole"} <= seen


def is_the_same_in_any_order(library: ChunkedShim) -> None:
    """Threads run in either order; all barriers are there."""
    case = random_case(library, B=2, T=2 * library.L + 3, H=1)
    expected = library.run(case)
    with schedule(library.raw, reverse=True):
        assert_same(library.run(case), expected, "depends on the order of threads")


def is_the_same_for_all_splits(library: ChunkedShim) -> None:
    case = random_case(library, B=2, T=library.L + 3, H=1)
    splits, found = 1, []
    try:
        while splits <= library.unit.N // 16:
            library.splits = splits
            found.append(library.run(case))
            splits *= 2
    finally:
        library.splits = None
    for each in found[1:]:
        assert_same(each, found[0], "depends on the splits of a scan")


def does_what_is_specified(library: ChunkedShim, *names: str) -> None:
    """Each kernel does what its specification does with the same memory, on inputs of chunk_cases."""
    for name in names:
        case, *_ = problem(library.operator, library.L, name, DTYPES[library.mode], library.unit.N)
        each_kernel_does_what_is_specified(library, case)


def each_kernel_does_what_is_specified(library: ChunkedShim, case: dict) -> None:
    steps, _ = library.run_in_steps(case)
    compared = {step.part: _compare(library, case, step) for step in steps}
    assert all(compared.values())
    assert {"KV", "whole"} <= compared["prepare"] and compared["scan"] == {"states", "state"}
    assert compared["outputs"] == {"y"} and compared["scan_backward"] == {"dstates", "dstate0"}
    assert {"dr", "dk", "dv"} <= compared["gradients"]


def all_kernels_do_what_is_specified(library: ChunkedShim, case: dict) -> None:
    spec, found = SPECS[library.operator], library.run(case)
    expected = spec.run(_specified(library, case))
    expected = {name: expected[name].reshape(x.shape).double() for name, x in found.items()}
    assert_within(found, expected, {name: _limit(library, name) for name in expected})


def _limit(library: ChunkedShim, name: str) -> float:
    operand = OPERANDS[library.mode]
    if operand == "fp32" and library.L > 32:
        return 2e-6  # sums of the log decay reach 38.8, of which half of float32's last digit is that much
    return LIMITS[operand]


def _specified(library: ChunkedShim, case: dict):
    """The specification's Problem; without rounded operands in float64, or half of the difference were its own."""
    operand = OPERANDS[library.mode]
    dtype = torch.float64 if operand == "fp32" else torch.float32
    return SPECS[library.operator].Problem(case, library.L, operand=operand, dtype=dtype)


def _compare(library: ChunkedShim, case: dict, step: Step) -> set[str]:
    """A kernel's results beside those of the specification's function given the same memory; the names compared."""
    spec, p = SPECS[library.operator], _specified(library, case)
    handed = {**step.before, **{name: step.before[at] for name, at in PLACES.items() if at in step.before}}
    # Slots that nobody uses hold NaN, and the specification's products take all.
    handed = {
        name: (x if len(x) != p.chunks.slots else x.nan_to_num()).to(p.rounding.dtype) for name, x in handed.items()
    }
    kernel = getattr(spec, step.part, spec.prepare)
    expected = kernel(p) if step.part.startswith("prepare") else kernel(p, handed)
    compared = set()
    for name, x in expected.items():
        place = PLACES.get(name, name)
        if place not in step.after or step.part == "prepare_backward" and name in ("KV", "Y0"):
            continue
        rows = p.chunks.used if place not in RESULTS else slice(None)
        found = step.after[place].reshape(x.shape)[rows]
        if name == "sums" and library.operator == "wkv6":
            found, x = found[..., :1, :], x[..., :1, :]  # the second row is of WKV-5 alone
        error, limit = relative_error(found, x[rows].double()), _limit(library, name)
        assert error <= limit, f"{step.part}: {name} is off by {error:.1e}, at most {limit:.1e}"
        compared.add(name)
    return compared
