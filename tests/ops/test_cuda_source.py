"""The CUDA source, compiled as C++ on the host shim, agrees with the float64 reference; no GPU is needed.

`cuda/shim/cuda_runtime.h` says what the shim can find. The same inputs run on a real GPU
under the `gpu` mark.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.ops import wkv7_abi
from tests.ops.wkv_inputs import cases, make_case, reference_gradients, relative_error

CUDA = Path(__file__).resolve().parents[2] / "cuda"
COMPILE = ["g++", "-x", "c++", "-std=c++17", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
SHARED = ["-O2", "-shared", "-fPIC"]
MAP_NORESERVE = 0x4000  # Linux; the mmap module of Python 3.10 does not name it
FLOAT32_OUTPUTS = ("state", "dw", "dstate0")  # whatever the dtype of the rest

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")


def compile_on_shim(source: Path, target: Path, *flags: str) -> Path:
    command = [*COMPILE, *flags, f"-I{CUDA / 'shim'}", f"-I{CUDA}", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module")
def library(request):
    """wkv7.cu on the shim, compiled once per content."""
    sources = [CUDA / "wkv7.cu", CUDA / "common.h", CUDA / "shim" / "cuda_runtime.h"]
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    path = request.config.cache.mkdir("wkv7_shim") / f"{name}.so"
    if not path.exists():
        compile_on_shim(sources[0], path.with_suffix(".partial"), *SHARED).rename(path)
    return wkv7_abi.load(path)


@contextmanager
def schedule(library, *, first: int = 0, last: int = 2**31, reverse: bool = False) -> Iterator[None]:
    """Run only blocks [first, last) of every launch, and the threads of a block in reverse order."""
    library.shim_schedule(wkv7_abi.SIZE(first), wkv7_abi.SIZE(last), int(reverse))
    try:
        yield
    finally:
        library.shim_schedule(wkv7_abi.SIZE(0), wkv7_abi.SIZE(2**31), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", cases())
def test_cuda_source_matches_float64_reference(library, name, dtype):
    case = cases()[name](dtype)
    outputs, expected = wkv7_abi.run(library, case), reference_gradients(case)
    for output, reference in expected.items():
        limit = 1e-5 if output in ("y", "state") else 5e-5
        if dtype == torch.bfloat16 and output not in FLOAT32_OUTPUTS:
            limit = 3e-3
        error = relative_error(outputs[output], reference)
        assert error < limit, f"{output}: relative error {error:.1e}, limit {limit:.0e}"


@pytest.mark.parametrize("N", [8, 16, 32, 64, 128])
def test_results_repeat_bit_for_bit_whatever_the_order_of_threads(library, N):
    case = make_case(torch.bfloat16, T=21, H=2, N=N)
    first, again = wkv7_abi.run(library, case), wkv7_abi.run(library, case)
    with schedule(library, reverse=True):
        reordered = wkv7_abi.run(library, case)
    for name, output in first.items():
        assert torch.equal(output, again[name]), name
        assert torch.equal(output, reordered[name]), f"{name} depends on the order of threads: a barrier is missing"


def test_large_gradients_leave_no_rounding_in_the_decay_gradients_of_later_tokens(library):
    """dw is a running sum along T, started afresh every 64 tokens (see wkv7.cu)."""
    case = make_case(torch.float32, T=129, N=16, raw=8.0)
    case["dy"][:, :60] *= 1e5
    dw, expected = wkv7_abi.run(library, case)["dw"], reference_gradients(case)["dw"]
    assert relative_error(dw[:, 64:], expected[:, 64:]) < 5e-5


def test_a_missing_state_counts_as_zeros(library):
    missing = make_case(torch.float32, T=9, N=16, states=None)
    zeros = {**missing, "state": torch.zeros(2, 2, 16, 16), "dstate": torch.zeros(2, 2, 16, 16)}
    expected = wkv7_abi.run(library, zeros)
    for name, output in wkv7_abi.run(library, missing).items():
        assert torch.equal(output, expected[name]), name


def test_unwanted_states_may_be_null(library):
    case = make_case(torch.float32, T=9, N=16)
    problem, expected = wkv7_abi.problem(case), wkv7_abi.run(library, case)
    y = wkv7_abi.poisoned(case["r"].shape)
    wkv7_abi.check(library, library.wkv7_forward(*problem, y.data_ptr(), None, None, 0, None))
    assert torch.equal(y, expected["y"])

    saved, workspace = wkv7_abi.scratch(library, case)
    wkv7_abi.check(library, library.wkv7_forward(*problem, y.data_ptr(), None, saved.data_ptr(), 0, None))
    gradients = {name: torch.full_like(y, float("nan")) for name in ("dr", "dw", "dk", "dv", "da", "db")}
    given = (saved, case["dy"], case["dstate"], workspace, *gradients.values())
    wkv7_abi.check(library, library.wkv7_backward(*problem, *map(wkv7_abi.pointer, given), None, 0, None))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_offsets_are_64_bit(library):
    """The last of 4 x 262145 heads, in sparse memory: it begins beyond 2^31 elements in tensors and states alike."""
    B, T, H, N = 4, 49, 2**18 + 1, 64
    assert min((B - 1) * T * H * N, (B * H - 1) * N * N) > 2**31

    def sparse(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)

    def in_last_head(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A large tensor, and the view of its last head, which holds `tensor` ([1, T, 1, N] or [1, 1, N, N])."""
        is_state = tensor.shape[1] == 1
        shape = (B, H, N, N) if is_state else (B, T, H, N)
        whole = sparse(math.prod(shape), tensor.dtype).view(shape)
        view = whole[-1:, -1:] if is_state else whole[-1:, :, -1:]
        view.copy_(tensor)
        return whole, view

    alone = make_case(torch.bfloat16, B=1, T=T, H=1, N=N)
    expected = wkv7_abi.run(library, alone)
    given = {name: in_last_head(tensor)[0] for name, tensor in alone.items()}
    outputs = {name: in_last_head(torch.full_like(tensor, float("nan"))) for name, tensor in expected.items()}
    y, state, *gradients = (whole.data_ptr() for whole, _ in outputs.values())
    saved = sparse(library.wkv7_saved_floats(B, T, H, N))
    workspace = sparse(library.wkv7_workspace_floats(B, T, H, N))
    problem = wkv7_abi.problem(given)
    scratch = (saved, given["dy"], given["dstate"], workspace)
    with schedule(library, first=B * H - 1, last=B * H):
        wkv7_abi.check(library, library.wkv7_forward(*problem, y, state, saved.data_ptr(), 0, None))
        backward = (*problem, *map(wkv7_abi.pointer, scratch), *gradients)
        wkv7_abi.check(library, library.wkv7_backward(*backward, 0, None))
    for name, (_, view) in outputs.items():
        assert torch.equal(view, expected[name]), name
    assert workspace[-N * N :].all(), "the last head's dS, kept for backward_decay_kernel, is not where it belongs"


@pytest.mark.parametrize(
    ("change", "explanation"),
    [
        ({"N": 24}, "head size must be"),
        ({"dtype": 2}, "dtype must be"),
        ({"T": 0}, "at least 1"),
        ({"B": 2**20, "H": 2**20}, "below 2^31"),
        ({"y": None}, "missing"),
        ({"y": 8}, "not aligned"),
    ],
    ids=str,
)
def test_unusable_arguments_get_an_explanation(library, change, explanation):
    case = make_case(torch.float32, B=1, T=1, H=1, N=8, states=None)
    sizes = {"dtype": 0, "B": 1, "T": 1, "H": 1, "N": 8}
    sizes.update({key: value for key, value in change.items() if key in sizes})
    y = torch.empty(1, 1, 1, 8).data_ptr() if "y" not in change else change["y"]
    code = library.wkv7_forward(*sizes.values(), *wkv7_abi.problem(case)[5:], y, None, None, 0, None)
    assert code < 0
    assert explanation in library.wkv7_error(code).decode()


def test_no_kernel_touches_memory_outside_its_tensors(tmp_path):
    sanitize = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_on_shim(CUDA / "shim" / "sanitize.cpp", tmp_path / "sanitize", *sanitize)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


BROKEN_KERNELS = """
#include "common.h"
struct Output { float* values; };
__global__ void barrier_in_a_branch(Output) { if (threadIdx.x < 32) __syncthreads(); }
__global__ void shuffle_in_a_branch(Output) { if (threadIdx.x < 16) __shfl_xor_sync(0xffffffff, 1.0f, 1); }
__global__ void step_outside_a_tile(Output) { WKV_SHARED(wkv::Tile<8>, tile); tile.at(wkv::kSteps, 0) = 1.0f; }
__global__ void no_barrier(Output p) {
  WKV_SHARED(wkv::Tile<64>, tile);
  tile.at(0, threadIdx.x) = float(threadIdx.x);
  p.values[threadIdx.x] = tile.at(0, 63 - threadIdx.x);
}
extern "C" int run(int i, float* values) {
  void (*const kernels[])(Output) = {barrier_in_a_branch, shuffle_in_a_branch, step_outside_a_tile, no_barrier};
  return wkv::launch(kernels[i], 1, 64, nullptr, Output{values});
}
extern "C" const char* text(int code) { return cudaGetErrorString(cudaError_t(code)); }
"""


def test_host_shim_reports_broken_kernels(tmp_path):
    (tmp_path / "broken.cu").write_text(BROKEN_KERNELS)
    library = wkv7_abi.ctypes.CDLL(str(compile_on_shim(tmp_path / "broken.cu", tmp_path / "broken.so", *SHARED)))
    library.run.argtypes = [wkv7_abi.INT, wkv7_abi.POINTER]
    library.text.restype = wkv7_abi.ctypes.c_char_p

    texts = ["only some threads of a block", "only some threads of a warp", "step < kSteps"]
    for i, expected in enumerate(texts):
        code = library.run(i, None)
        assert code != 0
        assert expected in library.text(code).decode()

    values, reordered = torch.empty(64), torch.empty(64)
    assert library.run(3, values.data_ptr()) == 0
    with schedule(library, reverse=True):
        assert library.run(3, reordered.data_ptr()) == 0
    assert not torch.equal(values, reordered), "a missing barrier must change the result when threads run in reverse"
