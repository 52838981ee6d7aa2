"""The regions' CUDA kernels, compiled as C++ on the host shim, agree with float64; no GPU is needed.

They are planned and launched by the product's own Python, through a stand-in for the driver (tests/ops/shim.py).
"""

from __future__ import annotations

import ctypes
import shutil
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.ops import cuda
from rwkv_bone.ops.regions import compiled
from tests.ops import region_cases as cases
from tests.ops.shim import ShimCalls, schedule

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")


@pytest.fixture(scope="module")
def calls(request):
    return ShimCalls(request.config.cache.mkdir("cuda_shim"))


@pytest.fixture
def operators(monkeypatch, calls):
    """The functions of ops/regions/compiled.py on CPU tensors, run by CUDA's kernels on the shim; results begin as NaN."""
    monkeypatch.setattr(compiled, "_run", compiled._launch)
    monkeypatch.setattr(cuda, "call", calls)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    names = [f"{region}_{step}" for region in cases.NAMES for step in ("forward", "backward")]
    return SimpleNamespace(**{name: getattr(compiled, f"_{name}") for name in names})


def poisoned(x, *shape, dtype=None):
    """Tensor.new_empty, filled with NaN."""
    return x.new_full(*shape, torch.nan, dtype=dtype) if isinstance(shape[0], (tuple, list, torch.Size)) else x.new_full(
        shape, torch.nan, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("region", cases.NAMES)
def test_agree(operators, region, dtype):
    cases.check(cases.make(region, dtype), operators)
