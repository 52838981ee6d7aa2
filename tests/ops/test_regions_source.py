"""The regions' CUDA kernels, compiled as C++ on the host shim, agree with float64; no GPU is needed.

They are called as PyTorch's operators, planned and launched by the product's own Python, through a stand-in for the
driver (tests/ops/shim.py). test_cuda_regions.py has the same cases on a GPU; test_planted_regions.py has mistakes that
these checks see.
"""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES
from rwkv_bone.ops.regions import launches
from rwkv_bone.ops.regions.launches import Unit
from tests.ops import region_checks as checks
from tests.ops.region_cases import MIX, MIX6, POST7, REGIONS, make_case
from tests.ops.region_checks import DTYPES, case_of, on_the_shim
from tests.ops.shim import ShimCalls, build_once, compile_on_shim

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


@pytest.fixture
def raw(calls):
    """The library itself."""
    library = ctypes.CDLL(calls.loaded[checks.USUAL[0]][0]._library._name)
    library.shim_argument_bytes.restype = ctypes.c_size_t
    return library


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("region, size", [(region, size) for region in REGIONS for size in checks.sizes(region)])
def test_a_region_equals_its_definition(region, size, dtypes):
    checks.equals_its_definition(region, case_of(region, dtypes, size))


@pytest.mark.parametrize("region", REGIONS)
def test_results_are_the_same_bits_whatever_the_order_of_threads_and_what_else_is_wanted(raw, region):
    size = list(checks.sizes(region))[1] if region not in (MIX, MIX6) else "documents, some carried"
    checks.is_the_same_in_any_order(raw, region, case_of(region, "bf16 with trained parameters", size))


@pytest.mark.parametrize("region", REGIONS)
def test_long_strips_of_tokens_give_what_short_ones_do(region):
    size = list(checks.sizes(region))[1] if region not in (MIX, MIX6) else "documents, some carried"
    checks.strips_do_not_matter(region, case_of(region, "fp32", size))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_first_layers_value_gets_both_parts_of_its_gradient(dtypes):
    checks.first_layer_adds_both_parts(dtypes)


@pytest.mark.parametrize("region", [MIX, MIX6])
def test_each_document_is_what_it_is_alone_bit_for_bit(region):
    checks.documents_are_alone(region)


@pytest.mark.slow
def test_every_head_size_and_every_number_of_mixes_has_its_kernels(calls, tmp_path):
    counts, heads = range(1, launches.LARGEST_M + 1), ("pre7", "post7", "gated_norm")
    units = [Unit(region, dtype, M) for region in (MIX, MIX6) for dtype in ELEMENTS for M in counts]
    units += [Unit(region, dtype, N) for region in heads for dtype in ELEMENTS for N in HEAD_SIZES]
    units = [unit for unit in units if unit not in calls.loaded]
    calls.load(compile_on_shim("".join(unit.source() for unit in units), tmp_path / "all.so", "-O0"), *units)
    for region, dtype, size in units:
        others = dict(M=size, C=24, documents=[3, 1, 30]) if region in (MIX, MIX6) else dict(B=2, T=9, N=size)
        case = make_case(region, *DTYPES["fp32" if dtype == "float32" else "bf16"], **others)
        checks.equals_its_definition(region, case)


@pytest.mark.slow
def test_sums_over_65536_tokens_lose_nothing():
    with checks.longest_strips():
        for region, sizes in ((MIX, dict(M=1, C=64)), (POST7, dict(N=64, H=1))):
            checks.equals_its_definition(region, make_case(region, torch.bfloat16, torch.float32, T=2**16, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 256, 4099, 8200])
def test_the_cross_entropy_of_rows_and_its_gradient_in_their_place(vocabulary, dtype):
    checks.cross_entropy_equals_its_definition(vocabulary, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cross_entropy_of_rows_with_infinite_or_missing_numbers(dtype):
    checks.cross_entropy_of_strange_rows(dtype)


def test_the_cross_entropy_is_the_same_bits_whatever_the_order_of_threads(raw):
    checks.cross_entropy_is_the_same_in_any_order(raw)


def test_every_kernel_takes_as_many_bytes_as_are_packed(raw):
    for unit in checks.USUAL:
        region, dtype, size = unit
        seen = set()
        for step, sizes, count in checks.plans(unit):
            for launch in unit.plan(step, sizes, None, [16] * count):
                assert raw.shim_argument_bytes(launch.kernel.encode()) == len(launch.arguments), launch.kernel
                seen.add(launch.kernel)
        others = {f"{region}_backward_{dtype}_{size}"} if region in launches.TRAINED else set()
        assert seen == set(unit.kernels()) - others


def test_what_no_kernel_can_take_is_refused_by_name():
    def refused(words: str, unit: Unit, step: str, sizes: tuple[int, ...], tensors: list[int | None], offsets=None):
        with pytest.raises(ValueError, match=words):
            unit.plan(step, sizes, offsets, tensors)

    mix, post7, pre7 = Unit("mix", "bfloat16", 1), Unit("post7", "bfloat16", 64), Unit("pre7", "bfloat16", 64)
    given = [16, None, 16, None, 16]
    refused("C a multiple of 8, found", mix, "forward", (1, 5, 12, 0, 1, 0, 0, 0), given)
    refused("M must be 1 to 6 and that of the kernels, found 2", mix, "forward", (1, 5, 16, 0, 2, 0, 0, 0), given)
    refused("documents need a batch of 1 and offsets", mix, "forward", (1, 5, 16, 2, 1, 0, 0, 0), given)
    refused("2 sequences, fewer than carried rows: 3", mix, "forward", (2, 5, 16, 0, 1, 3, 0, 0), given)
    refused("mix forward: last is missing", mix, "forward", (2, 5, 16, 0, 1, 2, 0, 0), given)
    refused("mix forward: x is missing", mix, "forward", (2, 5, 16, 0, 1, 0, 0, 0), [None, *given[1:]])
    refused("shares is not aligned to 16 bytes", mix, "forward", (2, 5, 16, 0, 1, 0, 0, 0), [16, None, 8, None, 16])
    refused("mix forward takes 5 tensors, found 4", mix, "forward", (2, 5, 16, 0, 1, 0, 0, 0), given[:4])
    refused("head size must be one of 8, 16", post7, "forward", (5, 2, 24, 0, 1), [16] * 9)
    refused("tokens and heads must be at least 1", post7, "forward", (0, 2, 64, 0, 1), [16] * 9)
    refused("workspace is missing", post7, "backward", (5, 2, 64, 0, 1), [16] * 17 + [None])
    refused("pv, v_first, v0_bias, v go together", pre7, "forward", (5, 2, 64, 0), [16, 16, None, *[16] * 13])
    refused("dtype must be float32 or bfloat16", Unit("post7", "float16", 64), "forward", (5, 2, 64, 0, 1), [16] * 9)
    rows = Unit("cross_entropy", "float32", 1)
    refused(r"blocks of threads must be 1 to 2\^31", rows, "forward", (0, 5, 0, 1), [16] * 3)


def test_tokens_are_shared_out_by_sizes_alone_and_all_of_them():
    for dtype in ELEMENTS:
        for tokens in (1, 31, 1024, 32768, 2**20):
            for channels, lanes in ((8, 8), (768, 8), (2560, 16), (4096, 32)):
                area = launches._area(tokens, channels, dtype, lanes)
                rows = launches.THREADS // lanes * area.strip
                assert rows * (area.token_blocks - 1) < tokens <= rows * area.token_blocks
                across = lanes * launches.WIDTHS[dtype]
                assert area.blocks == area.token_blocks * -(-channels // across)
    # Small problems on a large card: two blocks for each of its multiprocessors, or more.
    assert launches._area(1024, 1024, "bfloat16", 8).blocks >= 264
