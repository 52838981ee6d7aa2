"""The CUDA kernels, compiled as C++ on the host shim, agree with the float64 reference; no GPU is needed.

They are planned and launched by the product's own Python, through a stand-in for the driver (tests/ops/shim.py);
`cuda/shim/cuda_runtime.h` says what the shim can find. The same inputs run on a real GPU under the `gpu` mark.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from rwkv_bone.ops import driver
from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES, Launch, launches, source
from tests.conftest import clean_environment, python_path
from tests.ops import wkv6_inputs, wkv_inputs
from tests.ops.packed_inputs import each_alone, packed_case
from tests.ops.shim import ShimLibrary, build_shim, compile_on_shim, schedule
from tests.ops.sparse import in_last_head, sparse
from tests.ops.wkv_abi import poisoned
from tests.ops.wkv_inputs import relative_error

MAKE_CASE = {
    "wkv7": wkv_inputs.make_case,
    "wkv6": partial(wkv6_inputs.make_case, "wkv6"),
    "wkv5": partial(wkv6_inputs.make_case, "wkv5"),
}
CASES = {"wkv7": wkv_inputs.cases(), "wkv6": wkv6_inputs.cases("wkv6"), "wkv5": wkv6_inputs.cases("wkv5")}
FLOAT32_OUTPUTS = ("state", "dw", "du", "dstate0")  # whatever the dtype of the rest

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")


def reference_gradients(case: dict) -> dict[str, torch.Tensor]:
    return (wkv6_inputs if "u" in case else wkv_inputs).reference_gradients(case)


@pytest.fixture(scope="module", params=CASES)
def library(request):
    """An operator's kernels on the shim."""
    return ShimLibrary(build_shim(request.param, request.config.cache.mkdir("cuda_shim")), request.param)


def check(library: ShimLibrary, case: dict) -> None:
    outputs, expected = library.run(case), reference_gradients(case)
    for output, reference in expected.items():
        limit = 1e-5 if output in ("y", "state") else 5e-5
        if case["r"].dtype == torch.bfloat16 and output not in FLOAT32_OUTPUTS:
            limit = 3e-3
        error = relative_error(outputs[output], reference)
        assert error < limit, f"{output}: relative error {error:.1e}, limit {limit:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("library", "name"), [(operator, name) for operator in CASES for name in CASES[operator]], indirect=["library"]
)
def test_cuda_source_matches_float64_reference(library, name, dtype):
    check(library, CASES[library.operator][name](dtype))


def test_cuda_source_matches_float64_reference_over_thousands_of_tokens(library):
    check(library, MAKE_CASE[library.operator](torch.float32, B=1, T=4100, H=1, N=8, states=None))


@pytest.mark.parametrize("N", [8, 16, 32, 64, 128])
def test_results_repeat_bit_for_bit_whatever_the_order_of_threads(library, N):
    case = MAKE_CASE[library.operator](torch.bfloat16, B=1, T=21, H=2, N=N)
    first, again = library.run(case), library.run(case)
    with schedule(library.raw, reverse=True):
        reordered = library.run(case)
    for name, output in first.items():
        assert torch.equal(output, again[name]), name
        assert torch.equal(output, reordered[name]), f"{name} depends on the order of threads: a barrier is missing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_packed_document_is_what_it_is_alone_bit_for_bit(library, dtype):
    case = packed_case(library.operator, dtype)
    packed, expected = library.run(case), each_alone(library.operator, case, library.run)
    with schedule(library.raw, reverse=True):
        reordered = library.run(case)
    assert packed.keys() == expected.keys()
    for name, output in packed.items():
        assert torch.isfinite(output).all(), name
        assert torch.equal(output, expected[name]), name
        assert torch.equal(output, reordered[name]), f"{name} depends on the order of threads: a barrier is missing"


def test_packed_documents_may_end_anywhere_in_a_segment(library):
    """Segments are numbered from offsets rounded down to 64: lengths around that, from offsets around that."""
    for lengths in ((63, 1, 64, 64, 1, 63, 65), (65, 127, 2, 62, 128), (200,), (1,) * 70):
        case = packed_case(library.operator, torch.float32, lengths=lengths, H=1, N=8)
        expected = each_alone(library.operator, case, library.run)
        for name, output in library.run(case).items():
            assert torch.isfinite(output).all(), name
            assert torch.equal(output, expected[name]), (name, lengths)


@pytest.mark.parametrize("library", ["wkv7"], indirect=True)
def test_large_gradients_leave_no_rounding_in_the_decay_gradients_of_later_tokens(library):
    """dw is a running sum along T, started afresh every 64 tokens (see wkv7.cuh)."""
    case = wkv_inputs.make_case(torch.float32, T=129, N=16, raw=8.0)
    case["dy"][:, :60] *= 1e5
    dw, expected = library.run(case)["dw"], reference_gradients(case)["dw"]
    assert relative_error(dw[:, 64:], expected[:, 64:]) < 5e-5


@pytest.mark.parametrize("raw", [-100.0, 100.0])
@pytest.mark.parametrize("library", ["wkv7"], indirect=True)
def test_a_raw_decay_whose_exponential_is_out_of_range_leaves_every_gradient_finite(library, raw):
    case = wkv_inputs.make_case(torch.float32, T=17, H=1, N=16, raw=raw)
    outputs = library.run(case)
    assert all(torch.isfinite(outputs[name]).all() for name in reference_gradients(case))
    assert relative_error(outputs["y"], reference_gradients(case)["y"]) < 1e-5


@pytest.mark.parametrize("raw", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("library", ["wkv6", "wkv5"], indirect=True)
def test_decay_gradients_are_exact_where_hardly_anything_is_kept(library, raw):
    """The decay is 6e-4, 2e-9, 2e-24: a difference of running sums has no correct digit there (see wkv6.cuh)."""
    check(library, MAKE_CASE[library.operator](torch.float32, T=65, H=1, N=16, raw=(raw - 0.1, raw + 0.1)))


@pytest.mark.parametrize("library", ["wkv6", "wkv5"], indirect=True)
def test_a_slow_decay_that_never_changes_keeps_its_accuracy(library):
    """Next to 1 a float32 decay is off by 3e-8, and thousands of equal tokens would add that up (see wkv6.cuh)."""
    case = MAKE_CASE[library.operator](torch.float32, B=1, T=2048, H=1, N=8, raw=(-7.5, -7.5))
    outputs, expected = library.run(case), reference_gradients(case)
    for name, reference in expected.items():
        assert relative_error(outputs[name], reference) < 3e-6, name


def test_a_missing_state_counts_as_zeros(library):
    missing = MAKE_CASE[library.operator](torch.float32, T=9, N=16, states=None)
    zeros = {**missing, "state": torch.zeros(2, 2, 16, 16), "dstate": torch.zeros(2, 2, 16, 16)}
    expected = library.run(zeros)
    for name, output in library.run(missing).items():
        assert torch.equal(output, expected[name]), name


def test_unwanted_states_may_be_null(library):
    case = MAKE_CASE[library.operator](torch.float32, B=1, T=9, N=16)
    expected, (saved, workspace) = library.run(case), library.scratch(case)
    y = poisoned(tuple(case["r"].shape))
    library.call("forward", case, y, None, None)
    assert torch.equal(y, expected["y"])

    library.call("forward", case, y, None, saved)
    gradients = library.gradients(case)
    del gradients["dstate0"]
    library.call("backward", case, saved, case["dy"], case["dstate"], workspace, *gradients.values(), None)
    for name, gradient in gradients.items():
        assert torch.equal(gradient.view_as(expected[name]), expected[name]), name


def test_offsets_are_64_bit(library):
    """The last of 4 x 8388609 heads, in sparse memory: it begins beyond 2^31 elements in tensors and states alike."""
    B, T, H, N = 4, 11, 2**23 + 1, 8
    assert min((B - 1) * T * H * N, (B * H - 1) * N * N) > 2**31

    alone = MAKE_CASE[library.operator](torch.bfloat16, B=1, T=T, H=1, N=N)
    expected = library.run(alone)
    given = {name: in_last_head(tensor, B, H)[0] for name, tensor in alone.items()}
    forward = {name: torch.full_like(expected[name], float("nan")) for name in ("y", "state")}
    outputs = {name: in_last_head(tensor, B, H) for name, tensor in {**forward, **library.gradients(alone)}.items()}
    y, state, *gradients = (whole for whole, _ in outputs.values())
    saved, workspace = (sparse(library.floats(name, B, T, H, N, 0)) for name in ("saved_floats", "workspace_floats"))
    with schedule(library.raw, first=B * H - 1, last=B * H):
        library.call("forward", given, y, state, saved)
        library.call("backward", given, saved, given["dy"], given["dstate"], workspace, *gradients)
    for name, (_, view) in outputs.items():
        assert torch.equal(view.reshape(expected[name].shape), expected[name]), name
    assert workspace[-N * N :].all(), "dS of the last head, kept for other kernels, is not where it belongs"


@pytest.mark.parametrize(
    ("change", "explanation"),
    [
        ({"N": 24}, "head size must be"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"T": 0}, "at least 1"),
        ({"T": 2**31 - 64}, "below 2^31"),
        ({"B": 2**20, "H": 2**20}, "below 2^31"),
        ({"y": None}, "missing"),
        ({"y": 8}, "not aligned"),
        ({"D": 1}, "documents need"),
        ({"tensors": 3}, "tensors, found 3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("operator", CASES)
def test_unusable_arguments_get_an_explanation(operator, change, explanation):
    sizes = {"B": 1, "T": 1, "H": 1, "N": 8, "D": 0}
    sizes |= {key: value for key, value in change.items() if key in sizes}
    inputs = [16] * (6 if operator == "wkv7" else 5)
    tensors = [*inputs, None, change.get("y", 16), None, None][: change.get("tensors")]
    with pytest.raises(ValueError, match=explanation.replace("^", r"\^")):
        launches(operator, "forward", change.get("dtype", "float32"), tuple(sizes.values()), None, tensors)


@pytest.mark.parametrize("operator", ["wkv6", "wkv5"])
def test_more_segments_than_a_launch_has_blocks_get_an_explanation(operator):
    with pytest.raises(ValueError, match=r"below 2\^31"):
        launches(operator, "forward", "float32", (2**26, 4096, 1, 8, 0), None, [16] * 9)


SANITIZED = """
import torch
from rwkv_bone.ops import driver
from tests.ops.packed_inputs import packed_case
from tests.ops.test_cuda_source import MAKE_CASE, ShimLibrary
for operator in MAKE_CASE:
    library = ShimLibrary({folder!r} + "/" + operator + ".so", operator)
    for dtype in (torch.float32, torch.bfloat16):
        cases = [MAKE_CASE[operator](dtype, B=1, T=1, H=1, N=N, states=None) for N in (8, 16, 32, 64, 128)]
        cases += [MAKE_CASE[operator](dtype, B=1, T=9, H=2, N=N) for N in (8, 16, 32, 64, 128)]
        # One token more than a segment, and no more than a tile or a segment.
        cases += [MAKE_CASE[operator](dtype, B=2, T=T, H=2, N=16) for T in (8, 64, 65)]
        cases += [packed_case(operator, dtype, lengths=(1, 64, 65, 9, 3), H=2, N=8)]
        for case in cases:
            assert all(x.isfinite().all() for x in library.run(case).values())
print("all ran")
"""


@pytest.mark.slow
def test_no_kernel_touches_memory_outside_its_tensors(tmp_path):
    """Under AddressSanitizer, with every buffer exactly as large as ops/sizes.py says."""
    sanitize = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for operator in CASES:
        compile_on_shim(source(operator, ELEMENTS, HEAD_SIZES), tmp_path / f"{operator}.so", *sanitize)
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


BROKEN_KERNELS = """
#include "common.cuh"
struct Output { float* values; int64_t unused[3]; };
#define KERNEL(name) WKV_BYTES(name, Output) extern "C" void name(Output p)
KERNEL(barrier_in_a_branch) { if (threadIdx.x < 32) __syncthreads(); }
KERNEL(shuffle_in_a_branch) { if (threadIdx.x < 16) __shfl_xor_sync(0xffffffff, 1.0f, 1); }
KERNEL(step_outside_a_tile) { WKV_SHARED(wkv::Tile<8>, tile); tile.at(wkv::kSteps, 0) = 1.0f; }
KERNEL(no_barrier) {
  WKV_SHARED(wkv::Tile<64>, tile);
  tile.at(0, threadIdx.x) = float(threadIdx.x);
  p.values[threadIdx.x] = tile.at(0, 63 - threadIdx.x);
}
"""


def test_host_shim_reports_broken_kernels(tmp_path):
    library = driver.Driver(str(compile_on_shim(BROKEN_KERNELS, tmp_path / "broken.so")))
    names = ["barrier_in_a_branch", "shuffle_in_a_branch", "step_outside_a_tile", "no_barrier"]
    kernels = library.load(b"", names, device=0)

    def run(name: str, values: torch.Tensor) -> None:
        library.launch(kernels, [Launch(name, 1, 64, values.data_ptr().to_bytes(32, "little"))], device=0, stream=0)

    texts = ["only some threads of a block", "only some threads of a warp", "step < kSteps"]
    for name, expected in zip(names, texts, strict=False):
        with pytest.raises(driver.DriverError, match=f"launching {name} .*{expected}"):
            run(name, torch.empty(64))

    values, reordered = torch.empty(64), torch.empty(64)
    run("no_barrier", values)
    with schedule(library._library, reverse=True):
        run("no_barrier", reordered)
    assert not torch.equal(values, reordered), "a missing barrier must change the result when threads run in reverse"
