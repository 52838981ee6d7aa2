"""The projection of one row by the matrix-vector product in C++, against PyTorch's product of many rows."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.ops import linear as module
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.linear import linear
from tests.live_bytes import LiveBytes

LEVELS = ("portable", "avx2", "avx512")
# Fewer numbers than a vector, whole vectors, four of them, and all of these with a rest.
SIZES = [(1, 1), (3, 7), (5, 33), (17, 64), (16, 127), (33, 256), (7, 299), (300, 768)]


@pytest.fixture(params=LEVELS)
def level(request):
    try:
        library = native.library("gemv")
    except BuildError as problem:
        pytest.skip(str(problem))
    if library.wkv_set_level(LEVELS.index(request.param)) < 0:
        pytest.skip("this processor lacks the instructions")
    yield library
    library.wkv_set_level(-1)


def sample(m: int, n: int, dtype: torch.dtype, shape=()):
    generator = torch.Generator().manual_seed(m + n)
    x = torch.randn(*shape, n, generator=generator).to(dtype)
    return x, torch.randn(m, n, generator=generator).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_one_row_is_the_product_rounded_once(level, dtype, m, n):
    x, weight = sample(m, n, dtype, (1, 1))
    exact, scale = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    found = linear(x, weight)
    assert found.shape == (1, 1, m) and found.dtype == dtype
    # fp32's own error grows with the terms of a sum; bf16 adds half of its last place.
    place = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() - place * exact.abs() <= 3e-7 * scale).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beside_the_matrix_and_the_row_is_read(level, dtype):
    """NaN around them would come through, also where a vector is read in pieces."""
    for m, n in SIZES:
        x, weight = sample(m, n, dtype)
        padded_x, padded = (
            torch.full((n + 64,), torch.nan, dtype=dtype),
            torch.full((m * n + 64,), torch.nan, dtype=dtype),
        )
        padded_x[32 : 32 + n], padded[32 : 32 + m * n] = x, weight.flatten()
        found = linear(padded_x[32 : 32 + n], padded[32 : 32 + m * n].view(m, n))
        assert torch.equal(found, linear(x, weight)) and found.isfinite().all()


@torch.no_grad()
def test_a_row_does_not_depend_on_the_number_of_threads():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = sample(1001, 257, dtype)  # large enough for several threads
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(linear(x, weight))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_only_one_row_without_gradients_takes_it(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "_gemv", lambda x, weight: taken.append(x.shape) or F.linear(x, weight))
    x, weight = sample(5, 33, torch.float32, (1, 1))
    other = (torch.cat([x, x]), torch.cat([x, x], dim=1), x.double(), x.half())
    for given in other:
        with torch.no_grad():
            torch.testing.assert_close(linear(given, weight), F.linear(given, weight.to(given.dtype)))
    linear(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert x.grad is not None and weight.grad is not None and not taken
    with torch.no_grad():
        linear(x, weight)
        linear(x, weight.T.contiguous().T)  # which lies in memory in another way
        torch.compile(linear, backend="eager", fullgraph=True)(x, weight)
    assert taken == [x.shape]


@torch.no_grad()
def test_without_a_compiler_one_row_has_the_same_product(monkeypatch):
    def fail(name):
        raise BuildError("no C++ compiler was found")

    x, weight = sample(300, 768, torch.float32, (1, 1))
    expected = linear(x, weight)
    monkeypatch.setattr(native, "library", fail)
    monkeypatch.setattr(module, "_gemv_works", module._gemv_works.__wrapped__)
    torch.testing.assert_close(linear(x, weight), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_weight_of_another_type_is_cast_and_not_kept():
    x, weight = sample(300, 768, torch.float32, (1, 1))
    expected = linear(x.bfloat16(), weight.bfloat16())
    with LiveBytes() as live:
        assert torch.equal(linear(x.bfloat16(), weight), expected)
    assert live.peak < 1.1 * weight.nbytes / 2
