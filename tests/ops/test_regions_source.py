"""The regions' CUDA kernels, compiled as C++ on the host shim, agree with float64; no GPU is needed.

They are called as PyTorch's operators, planned and launched by the product's own Python, through a stand-in for the driver
(tests/ops/shim.py). test_cuda_regions.py has the same cases on a GPU.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES
from rwkv_bone.ops.regions import launches
from rwkv_bone.ops.regions.launches import Unit
from tests.ops import region_checks as checks
from tests.ops.region_cases import MIX, MIX6, REGIONS, RELU_SQUARE, make_case
from tests.ops.region_checks import DTYPES, case_of, longest_strips, on_the_shim, results
from tests.ops.shim import ShimCalls, build_once

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the CUDA source as C++")


@pytest.fixture(scope="module")
def calls(request):
    folder = request.config.cache.mkdir("cuda_shim")
    calls = ShimCalls(folder)
    # Together: each of them alone takes half a second.
    calls.load(build_once("".join(unit.source() for unit in checks.USUAL), folder, "regions"), *checks.USUAL)
    return calls


@pytest.fixture(autouse=True)
def shim(calls):
    with on_the_shim(calls):
        yield


ALL = [(region, size) for region in REGIONS for size in checks.sizes(region)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("region, size", ALL)
def test_a_region_equals_its_definition(region, size, dtypes):
    case = case_of(region, dtypes, size)
    checks.equals_its_definition(region, case)
    with longest_strips():
        checks.equals_its_definition(region, case)


