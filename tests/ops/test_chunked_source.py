"""The chunked CUDA kernels, compiled as C++ on the host shim, do what they should; no GPU is needed.

The same source runs on a card: cuda/shim/warp.h stands in for the instructions of tensor cores. The mode "debug" has
float32 operands, so that a wrong index shows beside the rounding of float32; "chunked" has one bfloat16 product, and
"accurate" three. What kernels are held to is in chunked_checks.py.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import costs
from rwkv_bone.ops.cuda import Unit
from tests.conftest import clean_environment, python_path
from tests.ops import chunked_checks as checks
from tests.ops import shim, wkv_inputs
from tests.ops.chunk_cases import bounds, inputs, with_one_decay, with_two_decays
from tests.ops.chunked_checks import MAKE_CASE, assert_same, assert_within, packed, problem, random_case
from tests.ops.chunked_shim import ChunkedShim, dtype_of
from tests.ops.packed_inputs import alone, each_alone
from tests.ops.shim import compile_on_shim, schedule
from tests.ops.sparse import in_last_head, sparse
from tests.ops.wkv_abi import poisoned

OPERATORS = ("wkv7", "wkv6", "wkv5")
LABELS = ("debug32", "debug64", "chunked32", "chunked64", "accurate16")

# What a default run takes; the rest is slow. WKV-5 is WKV-6's source with another way to its decay.
DEFAULT = {"wkv7": LABELS, "wkv6": ("debug32", "chunked32"), "wkv5": ("debug32",)}


def each(*labels: str) -> pytest.MarkDecorator:
    """Each operator with each of these labels."""
    rows = [
        pytest.param(operator, label, marks=[] if label in DEFAULT[operator] else pytest.mark.slow)
        for operator in OPERATORS
        for label in labels
    ]
    return pytest.mark.parametrize(("operator", "label"), rows)


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
        return ChunkedShim.build(Unit(operator, label, dtype or dtype_of(label), N), folder)

    return cached


# --------------------------------------------------------------------------------------------- against float64
FEW = ("three_rows_with_different_states", "length_1", "length_17", "length_65", "packed")
FULL = {"wkv7": ("debug32", "chunked32"), "wkv6": ("debug32",), "wkv5": ()}  # all inputs in the default run


def every_input() -> list:
    rows = []
    for operator in OPERATORS:
        for label in LABELS:
            for name in inputs(operator, int(label.lstrip("abcdefghijklmnopqrstuvwxyz"))):
                default = label in FULL[operator] or label in DEFAULT[operator] and name in FEW
                rows.append(pytest.param(operator, label, name, marks=[] if default else pytest.mark.slow))
    return rows


@pytest.mark.parametrize(("operator", "label", "name"), every_input())
def test_results_and_gradients_agree_with_float64(build, operator, label, name):
    checks.agrees_with_float64(build(operator, label), name)


# Kernels for other head sizes than 64: (label, N). Which lengths of chunks there are: ops/chunked_launches.py.
OTHERS = [
    ("debug32", 32),
    ("chunked32", 32),
    ("chunked64", 32),
    ("accurate16", 32),
    ("debug16", 128),
    ("chunked16", 128),
]


def others() -> list:
    return [
        pytest.param(operator, *row, marks=[] if operator == "wkv7" and "debug" in row[0] else pytest.mark.slow)
        for operator in OPERATORS
        for row in OTHERS
    ]


@pytest.mark.parametrize(("operator", "label", "N"), others())
def test_other_head_sizes_agree_with_float64(build, operator, label, N):
    names = ("three_rows_with_different_states", "repeated_keys_over_one_boundary", "length_17", "packed")
    checks.agrees_with_float64(build(operator, label, N=N), *names)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_accurate_kernels_take_bfloat16_too(build, operator):
    library = build(operator, "accurate16", "bfloat16")
    for name in ("three_rows_with_different_states", "repeated_keys", "packed"):
        case, expected, kind = problem(operator, library.L, name, torch.bfloat16, 64)
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
    checks.adds_two_decays_in_float32(parts)


# --------------------------------------------------------------------------------------------- bit for bit
@each("debug32", "chunked32", "chunked64", "accurate16")
def test_each_packed_document_is_what_it_is_alone_bit_for_bit(build, operator, label):
    checks.is_the_same_alone(build(operator, label))


@each("debug32")
def test_documents_may_end_anywhere_in_a_chunk(build, operator, label):
    library = build(operator, label, N=32)
    for lengths in ((31, 1, 32, 32, 1, 31, 33), (1,) * 33, (33, 63, 2, 30, 64), (70,)):
        case = packed(library, lengths)
        expected = each_alone(operator, case, library.run)
        assert_same(library.run(case), expected, f"not as alone, of {lengths}")
        with schedule(library.raw, reverse=True):
            assert_same(library.run(case), expected, "depends on the order of threads")


@each("debug32")
def test_a_document_does_not_see_its_neighbours(build, operator, label):
    """All but one document are NaN."""
    library = build(operator, label)
    case = packed(library, (33, 1, 5, 40, 2))
    offsets = case["cu_seqlens"].tolist()
    for d in (1, 2, 3):

        def own(name: str, d: int = d) -> tuple[slice, ...]:
            return (slice(d, d + 1),) if "state" in name else (slice(None), slice(*offsets[d : d + 2]))

        others = dict(case)
        for name, x in case.items():
            if x.dim() == 4:
                others[name] = torch.full_like(x, float("nan"))
                others[name][own(name)] = x[own(name)]
        found = library.run(others)
        for name, x in library.run(alone(operator, case, d)).items():
            if x.dim() == 4:
                assert torch.equal(found[name][own(name)], x), (name, d)


@each("chunked32")
def test_unused_slots_are_left_alone(build, operator, label):
    checks.leaves_unused_slots(build(operator, label))


@each(*LABELS)
def test_results_do_not_depend_on_the_order_of_threads(build, operator, label):
    checks.is_the_same_in_any_order(build(operator, label))


@pytest.mark.parametrize(("label", "N"), [("chunked32", 64), ("accurate16", 64), ("debug32", 32), ("debug16", 128)])
def test_results_do_not_depend_on_the_splits_of_a_scan(build, label, N):
    """WKV-5\'s and -6\'s scans have nothing to choose."""
    checks.is_the_same_for_all_splits(build("wkv7", label, N=N))


@each("chunked32")
def test_a_missing_state_counts_as_zeros(build, operator, label):
    library = build(operator, label)
    missing = MAKE_CASE[operator](torch.bfloat16, T=40, H=1, states=None)
    zeros = {**missing, "state": torch.zeros(2, 1, 64, 64), "dstate": torch.zeros(2, 1, 64, 64)}
    assert_same(library.run(missing), library.run(zeros), "not as with zeros")


@each("chunked32")
def test_unwanted_results_may_be_null(build, operator, label):
    library = build(operator, label)
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


# --------------------------------------------------------------------------------------------- as specified
@each(*LABELS)
def test_each_kernel_does_what_is_specified_with_the_same_memory(build, operator, label):
    checks.does_what_is_specified(build(operator, label), "packed", "repeated_keys_over_one_boundary")


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "label", "N"), [x.values for x in others()])
def test_each_kernel_does_what_is_specified_for_other_head_sizes(build, operator, label, N):
    checks.does_what_is_specified(build(operator, label, N=N), "packed", "repeated_keys_over_one_boundary")


@each("chunked32", "chunked64", "accurate16")
def test_all_kernels_together_do_what_is_specified(build, operator, label):
    library = build(operator, label)
    checks.all_kernels_do_what_is_specified(library, random_case(library, B=1, T=130, H=1))


@each("chunked32")
@pytest.mark.parametrize("repeated", [False, True])
def test_each_kernel_does_what_is_specified_over_thousands_of_tokens(build, operator, label, repeated):
    library = build(operator, label)
    checks.each_kernel_does_what_is_specified(library, random_case(library, B=1, T=4096, H=1, repeated=repeated))


# --------------------------------------------------------------------------------------------- bytes
# Bytes of a token and head that a kernel moves beyond benchmarks/costs.py: what a card finds in its caches, being read
# by the same block a moment ago, or by the other blocks of a head in WKV-5's and -6's scans, four at head size 64.
READ_AGAIN = {"gradients": {"w": 1}}
READ_AGAIN_6 = READ_AGAIN | {"scan": {"whole": 3}, "scan_backward": {"whole": 3}}


@pytest.mark.parametrize(
    ("operator", "label", "dtype", "N"),
    [
        ("wkv7", "chunked32", "bfloat16", 64),
        ("wkv7", "chunked32", "bfloat16w", 64),
        ("wkv7", "chunked64", "bfloat16", 64),
        ("wkv7", "accurate16", "float32", 64),
        ("wkv6", "chunked32", "bfloat16", 64),
        ("wkv6", "accurate16", "float32", 64),
        ("wkv5", "chunked32", "bfloat16", 64),
        pytest.param("wkv7", "chunked16", "bfloat16", 128, marks=pytest.mark.slow),
    ],
)
def test_kernels_move_the_bytes_that_are_counted_for_them(build, operator, label, dtype, N):
    """Counted where kernels load and store, at full chunks, without states at the ends of the sequence."""
    library = build(operator, label, dtype, N)
    tensors = torch.float32 if dtype == "float32" else torch.bfloat16
    T = 2 * library.L
    case = MAKE_CASE[operator](tensors, B=1, T=T, H=1, N=N, states=None)
    if dtype == "bfloat16w":
        case = with_two_decays(case)
    library.splits = 1  # each split reads the factors of the transition again
    try:
        library.run(case)
    finally:
        library.splits = None
    counted = costs.Problem(N, tensors.itemsize, case["w"].element_size(), library.L)
    handed = 4 if library.mode == "accurate" else 2
    expected = {}
    for kernel in sum(costs.KERNELS[operator, "chunked"], []):
        again = (READ_AGAIN if operator == "wkv7" else READ_AGAIN_6).get(kernel.name, {})
        reads, writes = (
            sum(count * costs.UNITS[unit](counted, handed) for unit, count in units.items())
            for units in ({unit: n + again.get(unit, 0) for unit, n in kernel.reads.items()}, kernel.writes)
        )
        expected[kernel.name] = (reads, writes)
    # What is written of a whole sequence: the states at its ends, sT and ds0, du, and WKV-5's dw.
    ends = {"scan": 4 * N * N, "scan_backward": 4 * N * N, "sums": 4 * N * (2 if operator == "wkv5" else 1)}
    found = {part: (read / T, (wrote - ends.get(part, 0)) / T) for part, (read, wrote) in library.traffic.items()}
    assert found == expected


# --------------------------------------------------------------------------------------------- memory
@each("chunked32")
def test_offsets_are_64_bit(build, operator, label, monkeypatch):
    """The last of 4 x 2097153 heads, in sparse memory: it begins beyond 2^31 elements in tensors and hand-overs."""
    B, T, H, N = 4, 11, 2**21 + 1, 32
    assert min((B - 1) * T * H * N, (B * H - 1) * N * N) > 2**31
    library = build(operator, label, N=N)
    alone = MAKE_CASE[operator](torch.bfloat16, B=1, T=T, H=1, N=N)
    expected = library.run(alone)
    given = {name: in_last_head(tensor, B, H)[0] for name, tensor in alone.items()}
    forward = {name: torch.full_like(expected[name], float("nan")) for name in ("y", "state")}
    outputs = {name: in_last_head(x, B, H) for name, x in {**forward, **library.gradients(alone)}.items()}
    y, state, *gradients = (whole for whole, _ in outputs.values())
    saved, workspace = (sparse(library.floats(name, B, T, H, N, 0)) for name in ("saved_floats", "workspace_floats"))
    monkeypatch.setattr(shim, "poisoned", lambda shape: sparse(*shape))  # forward's workspace
    with schedule(library.raw, first=B * H - 1, last=B * H):
        library.call("forward", given, y, state, saved)
        library.call("backward", given, saved, given["dy"], given["dstate"], workspace, *gradients)
    for name, (_, view) in outputs.items():
        assert torch.equal(view.reshape(expected[name].shape), expected[name]), name


SANITIZED = """
import torch
from rwkv_bone.ops.cuda import Unit
from tests.ops.chunk_cases import with_two_decays
from tests.ops.chunked_checks import packed, random_case
from tests.ops.chunked_shim import ChunkedShim
from tests.ops.test_chunked_source import SANITIZED_UNITS
for i, unit in enumerate(SANITIZED_UNITS):
    library = ChunkedShim({folder!r} + f"/{{i}}.so", Unit(*unit))
    L = library.L
    cases = [random_case(library, B=1, T=T, H=2) for T in (1, L - 1, L + 1)]
    cases += [packed(library, (1, L, L + 1, 9, 3))]
    for case in cases:
        if unit[2] == "bfloat16w":
            case = with_two_decays(case)
        assert all(x.isfinite().all() for x in library.run(case).values())
print("all ran")
"""
SANITIZED_UNITS = [
    ("wkv7", "chunked32", "bfloat16", 64),
    ("wkv7", "chunked64", "bfloat16w", 64),
    ("wkv7", "accurate16", "float32", 32),
    ("wkv6", "chunked32", "bfloat16", 64),
    ("wkv6", "accurate16", "float32", 32),
    ("wkv5", "debug32", "float32", 32),
]


@pytest.mark.slow
def test_no_kernel_touches_memory_outside_its_tensors(tmp_path):
    """Under AddressSanitizer, with every buffer exactly as large as ops/sizes.py says."""
    sanitize = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for i, unit in enumerate(SANITIZED_UNITS):
        compile_on_shim(Unit(*unit).source(), tmp_path / f"{i}.so", *sanitize)
    runtime = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = clean_environment() | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": python_path(),
    }
    command = [sys.executable, "-c", SANITIZED.format(folder=str(tmp_path))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "all ran" in result.stdout, result.stdout + result.stderr
