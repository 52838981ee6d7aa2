"""The compiled regions and the cross-entropy's rows on a GPU: the cases of test_regions_source.py, and what a card
alone can show."""

from __future__ import annotations

import pytest
import torch

from rwkv_bone.ops.regions import compiled, form, problem, twins
from tests.ops import region_checks as checks
from tests.ops.region_cases import MIX, MIX6, REGIONS, make_case
from tests.ops.region_checks import DTYPES, case_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every number that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("N", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_passes_and_a_run_takes_the_compiled_regions(dtype, N):
    assert not problem("cuda", dtype, N)
    x = torch.zeros(1, 1, 64, device=CUDA, dtype=dtype)
    assert form("cuda", x, N) is compiled and form("torch", x, N) is twins


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("region, size", [(region, size) for region in REGIONS for size in checks.sizes(region)])
def test_a_region_equals_its_definition(region, size, dtypes):
    checks.equals_its_definition(region, case_of(region, dtypes, size, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("region", REGIONS)
def test_a_region_is_right_and_repeats_its_bits_where_it_fills_the_card(region, dtype):
    """With documents of all lengths, and carried rows."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (40,), generator=draw).tolist()
    sizes = dict(documents=lengths, C=2048, carried=7) if region in (MIX, MIX6) else dict(B=2, T=4001, H=32)
    case = checks.moved(make_case(region, dtype, torch.float32, **sizes), "cuda")
    checks.equals_its_definition(region, case)
    checks.is_the_same(checks.results(region, case), checks.results(region, case))


@pytest.mark.parametrize("region", [MIX, MIX6])
def test_each_document_is_what_it_is_alone_bit_for_bit(region):
    checks.documents_are_alone(region, "cuda")


def test_the_first_layers_value_gets_both_parts_of_its_gradient():
    checks.first_layer_adds_both_parts("bf16", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 256, 4099, 65536])
def test_the_cross_entropy_of_rows_and_its_gradient_in_their_place(vocabulary, dtype):
    checks.cross_entropy_equals_its_definition(vocabulary, dtype, "cuda")
    checks.cross_entropy_of_strange_rows(dtype, "cuda")


def test_no_call_waits_for_the_card():
    """Nor for the offsets of documents, which lie on it."""
    case = case_of(MIX, "bf16", "documents, some carried", "cuda")
    checks.results(MIX, case)  # compiled, and tried
    torch.cuda.set_sync_debug_mode("error")
    try:
        checks.results(MIX, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_regions_reach_beyond_31_bits_of_elements():
    C, T = 4096, 2**19 + 8  # 2^31 elements and some
    x = torch.zeros(1, T, C, device=CUDA, dtype=torch.bfloat16)
    x[0, -3:] = torch.randn(3, C, device=CUDA)
    shares = torch.rand(1, C, device=CUDA)
    (found,) = compiled.mix_forward(x, None, None, shares)
    (expected,) = twins.mix_forward(x[:, -3:], x[:, -4], None, shares)
    assert torch.equal(found[:, -3:], expected)
    assert torch.equal(compiled.relu_square_forward(x)[0, -3:], twins.relu_square_forward(x[0, -3:]))
