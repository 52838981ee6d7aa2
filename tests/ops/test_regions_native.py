"""The compiled regions of the step against their definitions in float64, on the sizes that hurt."""

import functools

import pytest
import torch

from rwkv_bone.ops import native
from rwkv_bone.ops.regions import compiled
from tests.ops import region_cases
from tests.ops.region_cases import EPS, FIRST_PRE7, MIX, MIX6, POST7, PRE7, REGIONS, RELU_SQUARE, Case

FP32, BF16 = torch.float32, torch.bfloat16
# Of the activations and of the parameters.
DTYPES = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "bf16 with trained parameters": (BF16, FP32)}
LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
SIZES = {
    "one token": dict(T=1, H=1, N=8),
    "the usual head": dict(B=2, T=35, H=3, N=64),
    "half the usual head": dict(B=2, T=33, H=2, N=32),
    "a head of no power of two": dict(B=1, T=70, H=2, N=24),
    "a head of one AVX vector": dict(B=3, T=5, H=5, N=8),
    "a large head": dict(T=3, H=1, N=160),
}
# For the regions that see the token before.
SHIFTS = {
    "one token": dict(T=1, C=8, M=1),
    "one lerp": dict(B=2, T=67, C=64, M=1),
    "six": dict(B=3, T=34, C=72),
    "two of no whole vector": dict(B=2, T=5, C=13, M=2),
    "carried": dict(B=3, T=33, C=24, M=4, carried=3),
    "documents": dict(documents=[1, 31, 1, 1, 40, 2], C=40),
    "documents at the edges of tiles": dict(documents=[32, 32, 1, 31, 64], C=16, M=5),
    "documents, some carried": dict(documents=[3, 1, 29, 33, 1], C=48, M=3, carried=2),
    "documents, all carried": dict(documents=[1, 1, 62], C=16, M=1, carried=3),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every number that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=LEVELS.values(), ids=LEVELS)
def level(request):
    """Makes the C++ kernels use one instruction set."""
    library = native.library(compiled.LIBRARY)
    if library.wkv_set_level(request.param) != request.param:
        pytest.skip("this processor lacks the instruction set, AVX2 or AVX-512")
    yield
    library.wkv_set_level(-1)


def forward(region: str, case: Case) -> list[torch.Tensor]:
    """The results, in the order of the definition's."""
    given = case.given
    if region in (MIX, MIX6):
        arguments = [given["x"], given.get("last"), given["cu_seqlens"], given["shares"]]
        if region == MIX:
            return list(compiled.mix_forward(*arguments))
        return list(compiled.mix6_forward(*arguments, given["changes"]))
    if region == RELU_SQUARE:
        return [compiled.relu_square_forward(given["h"])]
    if region in (PRE7, FIRST_PRE7):
        names = ("pw", "pa", "pv", "k0", "v0", "v_first", "w0", "a0", "v0_bias", "k_k", "k_a", "N")
        w, k, v, a, b = compiled.pre7_forward(*map(given.get, names), True)
        assert w.dtype == FP32
        return [w, k, a, b, *([v] if region == PRE7 else [])]
    if region == POST7:
        return [compiled.post7_forward(**given, eps=EPS)]
    return [compiled.gated_norm_forward(**given, eps=EPS)]


def backward(region: str, case: Case, want: bool = True) -> dict[str, torch.Tensor]:
    """The gradients by the names of what they belong to; those of parameters only if they are wanted."""
    given, grads = case.given, case.grads
    if region in (MIX, MIX6):
        last, offsets, shares = given.get("last"), given["cu_seqlens"], given["shares"]
        carried = 0 if last is None else len(last)
        x = given["x"]
        if region == MIX:
            x, last = (x, last) if want else (None, None)
            found = compiled.mix_backward(grads, x, last, offsets, shares, carried, want)
            names = ("x", "last", "shares")
        else:
            found = compiled.mix6_backward(grads, x, last, offsets, shares, given["changes"], carried, want)
            names = ("x", "last", "shares", "changes")
    elif region == RELU_SQUARE:
        names, found = ("h",), (compiled.relu_square_backward(given["h"], grads[0]),)
    elif region in (PRE7, FIRST_PRE7):
        # What comes from the bonus is a part of the whole.
        dw, dk, da, db, *rest = grads
        dv = rest[0] if rest else torch.zeros_like(dk)
        halves = [(g.float() * 0.75).to(g.dtype) for g in (dk, dv)]
        others = [(g.float() - half.float()).to(g.dtype) for g, half in zip((dk, dv), halves, strict=True)]
        names = ("pa", "pv", "k0", "v0", "v_first", "a0", "v0_bias", "k_k", "k_a", "N")
        arguments = [*map(given.get, names), dw, halves[0], halves[1], da, db, *others, want]
        names = ("pw", "pa", "pv", "k0", "v0", "v_first", "w0", "a0", "v0_bias", "k_k", "k_a")
        found = compiled.pre7_backward(*arguments)
    elif region == POST7:
        names = ("y", "r", "k", "v", "g", "r_k", "ln_weight", "ln_bias")
        found = compiled.post7_backward(**given, eps=EPS, dz=grads[0], want=want)
    else:
        names = ("y", "gate", "ln_weight", "ln_bias")
        found = compiled.gated_norm_backward(**given, eps=EPS, dz=grads[0], want=want)
    return {name: x for name, x in zip(names, found, strict=True) if x.numel()}


def assert_equals(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Right but for float32's rounding inside, and one rounding at the end."""
    inside = 4e-6 * (1 + expected.abs().amax(-1, keepdim=True))
    # Half of bfloat16's last place.
    at_the_end = 0.0 if found.dtype == FP32 else 2.0 ** (expected.abs().frexp().exponent.double() - 9)
    assert found.shape == expected.shape and not found.isnan().any(), name
    excess = ((found.double() - expected).abs() - at_the_end) / inside
    assert excess.max().item() <= 1, f"{name}: off by {excess.max().item():.1f} times what is allowed"


@functools.cache
def case_of(region: str, dtypes: str, size: str) -> Case:
    sizes = SHIFTS[size] if region in (MIX, MIX6) else SIZES[size]
    return region_cases.make_case(region, *DTYPES[dtypes], **sizes)


ALL = [(region, size) for region in REGIONS for size in (SHIFTS if region in (MIX, MIX6) else SIZES)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("region, size", ALL)
def test_a_region_equals_its_definition_with_every_instruction_set(level, region, size, dtypes):
    case = case_of(region, dtypes, size)
    for i, (found, expected) in enumerate(zip(forward(region, case), case.outputs, strict=True)):
        assert_equals(found, expected, f"result {i}")
    found = backward(region, case)
    expected = dict(case.gradients)
    if region == FIRST_PRE7:
        expected["v0"] = torch.zeros_like(expected["k0"])
    assert set(found) == set(expected)
    for name, x in found.items():
        assert_equals(x, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("region", REGIONS)
def test_gradients_of_parameters_that_nobody_wants_change_nothing_else(region):
    for dtypes in DTYPES:
        case = case_of(region, dtypes, "documents, some carried" if region in (MIX, MIX6) else "the usual head")
        everything, parts = backward(region, case), backward(region, case, want=False)
        activations = {name for name, x in everything.items() if x.dim() > 2 or name == "last"}
        assert set(parts) == activations
        for name, x in parts.items():
            assert x.equal(everything[name]), name


def test_the_decay_is_made_only_if_it_is_wanted():
    case = case_of(PRE7, "bf16", "the usual head")
    names = ("pw", "pa", "pv", "k0", "v0", "v_first", "w0", "a0", "v0_bias", "k_k", "k_a", "N")
    w, *others = compiled.pre7_forward(*map(case.given.get, names), False)
    assert w.numel() == 0
    for x, expected in zip(others, compiled.pre7_forward(*map(case.given.get, names), True)[1:], strict=True):
        assert x.equal(expected)


def test_a_decay_gradient_in_the_activations_dtype_is_taken_too():
    case = case_of(PRE7, "bf16", "the usual head")
    narrow = case._replace(grads=[case.grads[0], *case.grads[1:]])
    wide = case._replace(grads=[case.grads[0].float(), *case.grads[1:]])
    for a, b in zip(backward(PRE7, narrow).values(), backward(PRE7, wide).values(), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("region", REGIONS)
def test_no_bit_depends_on_the_number_of_threads(region):
    """The sizes make several tiles in a block, and a last block and tile that are not full."""
    sizes = dict(documents=[1500, 1, 2999], C=16) if region in (MIX, MIX6) else dict(T=4500, H=2, N=8)
    case = region_cases.make_case(region, BF16, FP32, **sizes)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append([*forward(region, case), *backward(region, case).values()])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_sum_over_very_many_tokens_loses_nothing():
    """Added up one after the other, this many float32 numbers are off by more than 1e-5."""
    T, C = 65536, 8
    draw = torch.Generator().manual_seed(0)
    y, gate, dz = (torch.rand(1, T, C, generator=draw) + 0.5 for _ in range(3))
    ones = torch.ones(C)
    *_, d_bias = compiled.gated_norm_backward(y, gate, ones, ones, C, EPS, dz, True)
    gate, dz = gate.double(), dz.double()
    exact = (dz * gate * torch.sigmoid(gate)).sum((0, 1))
    assert ((d_bias - exact) / exact).abs().max().item() < 5e-7
    _, _, d_shares = compiled.mix_backward([dz.float()], y, None, None, ones[None] / 2, 0, True)
    before = torch.cat([torch.zeros(1, 1, C), y[:, :-1]], dim=1).double()
    exact, size = (dz * (before - y)).sum((0, 1)), (dz * (before - y)).abs().sum((0, 1))
    assert ((d_shares[0] - exact) / size).abs().max().item() < 1e-7


def test_what_is_not_a_number_stays_so_and_does_not_spread():
    h = torch.tensor([1.5, float("nan"), float("inf"), -float("inf"), -0.0, -2.0] + [3.0] * 30)
    for dtype in (FP32, BF16):
        expected = torch.relu(h.to(dtype)).square()
        assert torch.equal(compiled.relu_square_forward(h.to(dtype)).nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    # Every bit of this one is set: adding to it, as rounding does, makes it a zero.
    shares = torch.full((24,), -1, dtype=torch.int32).view(FP32)[None]
    (out,) = compiled.mix_forward(torch.ones(1, 2, 24, dtype=BF16), None, None, shares)
    assert out.isnan().all()
    x = torch.ones(1, 70, 24)
    x[0, 40, 3] = float("nan")
    for out in compiled.mix_forward(x, None, None, torch.full((2, 24), 0.5)):
        assert out.isnan().nonzero().tolist() == [[0, 40, 3], [0, 41, 3]]
    dx, _, _ = compiled.mix_backward([x], None, None, None, torch.full((1, 24), 0.5), 0, False)
    assert dx.isnan().nonzero().tolist() == [[0, 39, 3], [0, 40, 3]]


@pytest.mark.parametrize("region", REGIONS)
def test_what_a_region_is_given_is_left_as_it_is_and_may_be_laid_out_anyhow(region):
    case = case_of(region, "bf16", "documents, some carried" if region in (MIX, MIX6) else "the usual head")
    expected = [*forward(region, case), *backward(region, case).values()]

    def scattered(x):
        """The same numbers, not contiguous."""
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0] if isinstance(x, torch.Tensor) else x

    other = Case({name: scattered(x) for name, x in case.given.items()}, [*map(scattered, case.grads)], [], {})
    before = [x.clone() for x in (*other.given.values(), *other.grads) if isinstance(x, torch.Tensor)]
    assert all(map(torch.equal, expected, [*forward(region, other), *backward(region, other).values()]))
    after = [x for x in (*other.given.values(), *other.grads) if isinstance(x, torch.Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("region", REGIONS)
def test_a_trace_without_data_knows_every_shape_and_dtype(region):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = case_of(region, "bf16", "documents, some carried" if region in (MIX, MIX6) else "the usual head")
    real = [*forward(region, case), *backward(region, case).values()]
    with FakeTensorMode() as mode:

        def fake(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        traced = Case({name: fake(x) for name, x in case.given.items()}, [*map(fake, case.grads)], [], {})
        found = [*forward(region, traced), *backward(region, traced).values()]
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in found]


def test_impossible_sizes_get_an_explanation():
    x = torch.ones(1, 4, 24)
    row = torch.ones(24)
    with pytest.raises(RuntimeError, match="region_gated_norm_forward failed on cpu .*head size a multiple of 8"):
        compiled.gated_norm_forward(x, x, row, row, 12, EPS)
    with pytest.raises(RuntimeError, match="region_mix_forward failed on cpu .*offsets that rise"):
        compiled.mix_forward(x, None, torch.tensor([0, 3, 3, 4]), row[None])
    with pytest.raises(RuntimeError, match="region_mix_forward failed on cpu .*every size"):
        compiled.mix_forward(x, None, None, torch.ones(7, 24))


def test_the_trial_finds_working_regions_and_says_what_is_wrong_with_others(monkeypatch):
    cpu = torch.device("cpu")
    problem = compiled.problem.__wrapped__
    for dtype in (FP32, BF16):
        assert [problem(cpu, dtype, N) for N in (1, 8, 64)] == [""] * 3
    assert problem(cpu, BF16, 12) == "the head size must be a multiple of 8 and at most 1024, found 12"
    assert problem(torch.device("mps"), BF16, 64) == "there are none for mps"
    right = compiled.post7_backward
    monkeypatch.setattr(compiled, "post7_backward", lambda *given: (*right(*given)[1::-1], *right(*given)[2:]))
    assert "a trial call of post7_backward gave wrong numbers" in problem(cpu, BF16, 64)
    assert problem(cpu, BF16, 1) == ""


def test_without_a_compiler_the_trial_says_so(monkeypatch):
    monkeypatch.setattr(native, "library", functools.cache(native.library.__wrapped__))
    monkeypatch.setattr("shutil.which", lambda *arguments, **others: None)
    assert "no C++ compiler was found" in compiled.problem.__wrapped__(torch.device("cpu"), BF16, 64)
