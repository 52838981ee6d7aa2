"""The chunked CUDA kernels, compiled as C++ on the host shim, do what they should; no GPU is needed.

The same source runs on a card: cuda/shim/warp.h stands in for the instructions of tensor cores. The mode "debug" has
float32 operands, so that a wrong index shows beside the rounding of float32; "chunked" has one bfloat16 product, and
"accurate" three.
"""

from __future__ import annotations

import functools
import math
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops.cuda import Unit
from rwkv_bone.ops.sizes import backward_regions, chunks, forward_regions
from tests.conftest import clean_environment, python_path
from tests.ops import chunk_spec6, chunk_spec7, wkv6_inputs, wkv_inputs
from tests.ops.chunk_cases import AGAINST_SPEC, bounds, inputs, reference, with_one_decay, with_two_decays
from tests.ops.chunk_model import Chunks
from tests.ops.chunked_shim import DTYPES, ChunkedShim, Step
from tests.ops.packed_inputs import alone, each_alone, packed_case
from tests.ops.shim import compile_on_shim, schedule
from tests.ops.wkv_abi import poisoned
from tests.ops.wkv_inputs import relative_error

MAP_NORESERVE = 0x4000  # Linux; the mmap module of Python 3.10 does not name it
MAKE_CASE = {
    "wkv7": wkv_inputs.make_case,
    "wkv6": functools.partial(wkv6_inputs.make_case, "wkv6"),
    "wkv5": functools.partial(wkv6_inputs.make_case, "wkv5"),
}
SPECS = {"wkv7": chunk_spec7, "wkv6": chunk_spec6, "wkv5": chunk_spec6}
OPERATORS = ("wkv7",)
LABELS = ("debug32", "debug64", "chunked32", "chunked64", "accurate16")
OPERANDS = {"debug": "fp32", "chunked": "bf16", "accurate": "bf16x3"}  # as the specifications call them
# Of three products: what two sums of other orders leave, where an operand's 16 bits round to a neighbour.
AGAINST_SPEC = {**AGAINST_SPEC, "bf16x3": 2e-5}
# What lies where in memory while another name is meant.
PLACES = {"KV": "states", "DR": "dstates", "Y0": "y"}

each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_label = pytest.mark.parametrize("label", LABELS)
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build(pytestconfig) -> Callable[..., ChunkedShim]:
    """build(operator, label, dtype, N): a unit of kernels on the shim; the dtype is the mode's own if not given."""
    folder = pytestconfig.cache.mkdir("cuda_shim")

    @functools.cache
    def cached(operator: str, label: str, dtype: str = "", N: int = 64) -> ChunkedShim:
        return ChunkedShim.build(operator, label, dtype or str(dtype_of(label)).removeprefix("torch."), N, folder)

    return cached


def dtype_of(label: str) -> torch.dtype:
    chunked = chunks(label)
    assert chunked
    return DTYPES[chunked.mode]


@functools.cache
def problem(operator: str, L: int, name: str, dtype: torch.dtype, N: int = 64) -> tuple[dict, dict[str, Tensor], str]:
    """A case, its float64 results, and which bounds are for it."""
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


# --------------------------------------------------------------------------------------------- against float64
FEW = ("three_rows_with_different_states", "length_1", "length_17", "length_65", "packed")
FULL = ("debug32", "chunked32")  # labels with all inputs in the default run


@pytest.mark.parametrize(
    ("operator", "label", "name"),
    [
        pytest.param(operator, label, name, marks=[] if label in FULL or name in FEW else pytest.mark.slow)
        for operator in OPERATORS
        for label in LABELS
        for name in inputs(operator, int(label.lstrip("abcdefghijklmnopqrstuvwxyz")))
    ],
)
def test_results_and_gradients_agree_with_float64(build, operator, label, name):
    library = build(operator, label)
    case, expected, kind = problem(operator, library.L, name, dtype_of(label))
    assert_within(library.run(case), expected, bounds(operator, kind, OPERANDS[library.mode]))


@each_operator
@pytest.mark.parametrize("N", [32, 128])
@pytest.mark.parametrize("label", ["debug32", *(pytest.param(x, marks=pytest.mark.slow) for x in LABELS[1:])])
def test_other_head_sizes_agree_with_float64(build, operator, label, N):
    library = build(operator, label, N=N)
    for name in ("three_rows_with_different_states", "repeated_keys_over_one_boundary", "length_17", "packed"):
        case, expected, kind = problem(operator, library.L, name, dtype_of(label), N)
        assert_within(library.run(case), expected, bounds(operator, kind, OPERANDS[library.mode]))


@each_operator
@pytest.mark.slow
def test_accurate_kernels_take_bfloat16_too(build, operator):
    library = build(operator, "accurate16", "bfloat16")
    for name in ("three_rows_with_different_states", "repeated_keys", "packed"):
        case, expected, kind = problem(operator, library.L, name, torch.bfloat16)
        limits = dict.fromkeys(expected, 3e-3)  # an output's own rounding
        fine = bounds(operator, kind, "bf16x3")
        limits |= {key: fine[key] for key in ("state", "dw", "du", "dstate0") if key in fine}
        assert_within(library.run(case), expected, limits)


def test_a_decay_in_two_parts_is_added_in_float32(build):
    """w in bfloat16 and w0 in float32 give the bits of their float32 sum; only w's gradient is rounded."""
    parts, joined = build("wkv7", "chunked32", "bfloat16w"), build("wkv7", "chunked32")
    case = with_two_decays(wkv_inputs.make_case(torch.bfloat16, T=65))
    found, expected = parts.run(case), joined.run(with_one_decay(case))
    assert found["dw"].dtype == torch.bfloat16
    expected["dw"] = expected["dw"].bfloat16()
    assert_same(found, expected, "not as with the sum")
    assert_within(found, reference("wkv7", case), bounds("wkv7", "ordinary"))


# --------------------------------------------------------------------------------------------- bit for bit
def boundaries(L: int) -> tuple[int, ...]:
    """Documents of one token, as long as a chunk, shorter and longer, and several chunks with and without a rest."""
    return (1, 1, L - 1, L, L + 1, 3, 2 * L, 1, 2 * L + 5, 16, 17)


@each_operator
@pytest.mark.parametrize("label", ["debug32", "chunked32", "accurate16"])
def test_each_packed_document_is_what_it_is_alone_bit_for_bit(build, operator, label):
    library = build(operator, label)
    case = packed_case(operator, dtype_of(label), lengths=boundaries(library.L), H=1, N=64)
    packed = library.run(case)
    assert_same(packed, each_alone(operator, case, library.run), "not as alone")
    with schedule(library.raw, reverse=True):
        assert_same(library.run(case), packed, "depends on the order of threads")


@each_operator
def test_documents_may_end_anywhere_in_a_chunk(build, operator):
    library = build(operator, "debug32", N=32)
    for lengths in ((31, 1, 32, 32, 1, 31, 33), (1,) * 33, (33, 63, 2, 30, 64), (70,)):
        case = packed_case(operator, torch.float32, lengths=lengths, H=1, N=32)
        assert_same(library.run(case), each_alone(operator, case, library.run), f"not as alone, of {lengths}")


@each_operator
def test_a_document_does_not_see_its_neighbours(build, operator):
    """All but one document are NaN. Slots that no chunk has, and the places of missing tokens, hold NaN anyway."""
    library = build(operator, "debug32")
    case = packed_case(operator, torch.float32, lengths=(33, 1, 5, 40, 2), H=1, N=64)
    offsets = case["cu_seqlens"].tolist()
    for d in (1, 2, 3):
        others = {
            name: x.clone() if x.dtype.is_floating_point and x.dim() == 4 else x for name, x in case.items()
        }
        for name, x in others.items():
            if x.dtype.is_floating_point and x.dim() == 4:
                own = slice(d, d + 1) if "state" in name else (slice(None), slice(*offsets[d : d + 2]))
                kept = x[own].clone()
                x.fill_(float("nan"))
                x[own] = kept
        found, expected = library.run(others), library.run(alone(operator, case, d))
        for name, x in expected.items():
            if x.dim() == 4:
                own = slice(d, d + 1) if "state" in name else (slice(None), slice(*offsets[d : d + 2]))
                assert torch.equal(found[name][own], x), (name, d)


@each_operator
def test_unused_slots_are_left_alone(build, operator):
    library = build(operator, "chunked32")
    case = packed_case(operator, torch.bfloat16, lengths=(1, 31, 32, 40, 3), H=2, N=64)
    used = Chunks(1, case["r"].shape[1], 32, case["cu_seqlens"]).used
    assert not used.all()
    steps, _ = library.run_in_steps(case)
    seen = set()
    for step in steps:
        for name, x in step.after.items():
            if x.shape[0] == len(used) and name not in ("state", "dstate0"):
                assert x[~used].isnan().all(), (step.part, name)
                seen.add(name)
    assert {"states", "dstates", "whole"} <= seen


@each_operator
@pytest.mark.parametrize(("label", "N"), [("chunked32", 64), ("debug32", 128), ("accurate16", 64)])
def test_results_do_not_depend_on_splits_or_the_order_of_threads(build, operator, label, N):
    library = build(operator, label, N=N)
    case = MAKE_CASE[operator](dtype_of(label), B=2, T=2 * library.L + 3, H=1, N=N)
    try:
        library.splits = 1
        expected = library.run(case)
        splits = 2
        while splits <= N // 16:
            library.splits = splits
            with schedule(library.raw, reverse=splits > 2):
                assert_same(library.run(case), expected, f"depends on splits: {splits}, or on the order of threads")
            splits *= 2
    finally:
        library.splits = None


@each_operator
def test_a_missing_state_counts_as_zeros(build, operator):
    library = build(operator, "chunked32")
    missing = MAKE_CASE[operator](torch.bfloat16, T=40, H=1, states=None)
    zeros = {**missing, "state": torch.zeros(2, 1, 64, 64), "dstate": torch.zeros(2, 1, 64, 64)}
    assert_same(library.run(missing), library.run(zeros), "not as with zeros")


@each_operator
def test_unwanted_results_may_be_null(build, operator):
    library = build(operator, "chunked32")
    case = MAKE_CASE[operator](torch.bfloat16, B=1, T=40, H=1)
    expected, (saved, workspace) = library.run(case), library.scratch(case)
    y = poisoned(tuple(case["r"].shape), torch.bfloat16)
    library.call("forward", case, y, None, None)
    assert torch.equal(y, expected["y"])

    library.call("forward", case, y, None, saved)
    gradients = library.gradients(case)
    del gradients["dstate0"]
    library.call("backward", case, saved, case["dy"], case["dstate"], workspace, *gradients.values(), None)
    for name, gradient in gradients.items():
        assert torch.equal(gradient.view_as(expected[name]), expected[name]), name


# --------------------------------------------------------------------------------------------- against the specification
def compare(library: ChunkedShim, case: dict, step: Step, limit: float) -> set[str]:
    """A kernel's results beside those of the specification's function given the same memory; the names compared."""
    spec = SPECS[library.operator]
    operand = OPERANDS[library.mode]
    p = spec.Problem(case, library.L, operand=operand)
    handed = {**step.before, **{name: step.before[at] for name, at in PLACES.items() if at in step.before}}
    # Slots that nobody uses hold NaN.
    handed = {name: x[:] if x.shape[0] != len(p.chunks.used) else x.nan_to_num() for name, x in handed.items()}
    kernel = getattr(spec, step.part, spec.prepare)
    expected = kernel(p) if step.part.startswith("prepare") else kernel(p, handed)
    compared = set()
    for name, x in expected.items():
        place = PLACES.get(name, name)
        if place not in step.after or step.part == "prepare_backward" and name in ("KV", "Y0"):
            continue
        rows = p.chunks.used if x.shape[0] == len(p.chunks.used) and place not in ("y", "state") else slice(None)
        found = step.after[place].reshape(x.shape)[rows]
        error = relative_error(found, x[rows].double())
        assert error <= limit, f"{step.part}: {name} is off by {error:.1e}, at most {limit:.1e}"
        compared.add(name)
    return compared


@each_operator
@pytest.mark.parametrize(("label", "N"), [(label, 64) for label in LABELS] + [("debug32", 32), ("debug32", 128)])
def test_each_kernel_does_what_its_specification_does_with_the_same_memory(build, operator, label, N):
    library = build(operator, label, N=N)
    limit = AGAINST_SPEC[OPERANDS[library.mode]]
    for name in ("packed", "repeated_keys_over_one_boundary"):
        case = inputs(operator, library.L, N)[name].make(dtype_of(label))
        steps, _ = library.run_in_steps(case)
        compared = {step.part: compare(library, case, step, limit) for step in steps}
        assert all(compared.values())
        assert {"KV", "whole"} <= compared["prepare"] and compared["scan"] == {"states", "state"}
        assert compared["outputs"] == {"y"} and compared["scan_backward"] == {"dstates", "dstate0"}
        assert {"dr", "dk", "dv"} <= compared["gradients"]


@each_operator
@pytest.mark.parametrize("label", LABELS)
def test_all_kernels_together_do_what_their_specifications_do(build, operator, label):
    library = build(operator, label)
    spec = SPECS[operator]
    case = MAKE_CASE[operator](dtype_of(label), B=1, T=130, H=1)
    operand = OPERANDS[library.mode]
    expected = spec.run(spec.Problem(case, library.L, operand=operand))
    found = library.run(case)
    expected = {name: expected[name].reshape(x.shape).double() for name, x in found.items()}
    assert_within(found, expected, dict.fromkeys(expected, AGAINST_SPEC[operand]))


@each_operator
@pytest.mark.parametrize("label", ["chunked32", pytest.param("chunked64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("repeated", [False, True])
def test_each_kernel_does_so_in_bfloat16_over_thousands_of_tokens(build, operator, label, repeated):
    library = build(operator, label)
    case = MAKE_CASE[operator](torch.bfloat16, B=1, T=4096, H=1, repeated=repeated)
    steps, _ = library.run_in_steps(case)
    for step in steps:
        assert compare(library, case, step, AGAINST_SPEC["bf16"])
