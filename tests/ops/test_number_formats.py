"""The few functions on single numbers that the kernels are built on: the exponential, and rounding to bfloat16.

They are called one by one, over their whole range: in a whole operator their last bits disappear among others.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops.build import CPU_FLAGS, SOURCES
from tests.ops.shim import compile_on_shim

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the kernels' sources")

# What levels.h compiles once per instruction set, and a C interface to it.
PROBE = """
static void exponentials(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(out + i, exp(load(x + i)));
}
static void rounded(const float* x, uint16_t* out, int64_t n) { write_row(BFLOAT16, out, 0, n, x); }
"""
PROBE_CALLS = """
#define KERNEL_HEADER "probe.h"
#include "levels.h"
#define CALL(function, Out)                                                           \\
    extern "C" void probe_##function(const float* x, Out* out, int64_t n) {           \\
        if (chosen_level == AVX512) return avx512::function(x, out, n);               \\
        if (chosen_level == AVX2) return avx2::function(x, out, n);                   \\
        portable::function(x, out, n);                                                \\
    }
CALL(exponentials, float)
CALL(rounded, uint16_t)
"""
SHIM_CALL = """
#include "common.cuh"
extern "C" void probe_rounded(const float* x, wkv::BFloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) wkv::assign(out[i], x[i]);
}
"""


@pytest.fixture(scope="module")
def cpu(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.h").write_text(PROBE)
    (folder / "probe.cpp").write_text(PROBE_CALLS)
    command = ["g++", *CPU_FLAGS, f"-I{folder}", f"-I{SOURCES / 'cpu'}", str(folder / "probe.cpp")]
    subprocess.run([*command, "-o", str(folder / "probe.so")], check=True)
    return ctypes.CDLL(str(folder / "probe.so"))


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def at_level(request, cpu):
    if cpu.wkv_set_level(request.param) == -1:
        pytest.skip("this processor lacks the instructions")
    yield cpu
    cpu.wkv_set_level(-1)


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_on_shim(SHIM_CALL, tmp_path_factory.mktemp("shim") / "probe.so")))


def applied(function: Callable, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(x)))
    return out


def test_the_exponential_of_the_cpp_kernels_is_right_to_its_last_bit_over_its_whole_range(at_level):
    # Even over all arguments, dense around 0, and dense in one period of the reduction, where the series is longest.
    pieces = [torch.linspace(-87, 87, 2**18), torch.linspace(-1, 1, 2**16), torch.linspace(0.3, 0.4, 2**16)]
    x = torch.cat([*pieces, torch.tensor([0.0, -0.0, 87.0, -87.0, 1e-30, -1e-30] + [0.0] * 10)])
    found, exact = applied(at_level.probe_exponentials, x, torch.float32), x.double().exp()
    error = ((found.double() - exact) / exact).abs()
    # Half a bit is 6e-8, and the last term of the series is worth 1.7e-7.
    assert error.max() < 1.4e-7
    assert error.mean() < 4e-8


def test_the_exponential_has_limits_and_keeps_nan(at_level):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([88.0, 1e30, inf, -88.0, -1e30, -inf, nan, -nan] * 2)
    found = applied(at_level.probe_exponentials, x, torch.float32)
    most, least = torch.tensor(87.0).exp(), torch.tensor(-87.0).exp()
    torch.testing.assert_close(found[:6], torch.stack([most] * 3 + [least] * 3), rtol=3e-7, atol=0)
    assert found[6:8].isnan().all()


def every_way_to_round() -> Tensor:
    """For each of the 65,536 upper halves of a float32: a tie, its neighbours, and what is exact."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] + lower).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def same_numbers(found: Tensor, x: Tensor) -> None:
    found, expected = found.view(torch.bfloat16), x.to(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    wrong = (found.view(torch.int16) != expected.view(torch.int16)) & ~nan
    assert not wrong.any(), f"{int(wrong.sum())} of {len(x)} differ, the first is {x[wrong][0]}"


def test_the_cpp_kernels_round_to_bfloat16_as_pytorch_does(at_level):
    x = every_way_to_round()
    same_numbers(applied(at_level.probe_rounded, x, torch.int16), x)


def test_the_cuda_kernels_round_to_bfloat16_as_pytorch_does(shim):
    x = every_way_to_round()
    same_numbers(applied(shim.probe_rounded, x, torch.int16), x)
