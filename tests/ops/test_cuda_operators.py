"""PyTorch's operators as they run on a card: which kernels a call takes, in which memory; no GPU is needed.

The kernels run on the host shim, on CPU tensors: everything from the Python call to the arithmetic is the product's.
"""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import build, choice, compiled, cuda, native, select_op, trial
from rwkv_bone.ops.chunked_launches import LENGTHS
from rwkv_bone.ops.reference import wkv7_reference
from rwkv_bone.ops.sizes import chunking
from rwkv_bone.ops.wkv7 import wkv7
from tests.ops import packed_inputs, wkv6_inputs, wkv_inputs
from tests.ops.shim import ShimCalls
from tests.ops.wkv_inputs import relative_error

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


@pytest.fixture
def shim(monkeypatch, request):
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the CUDA source as C++")
    calls = ShimCalls(request.config.cache.mkdir("cuda_shim"))
    monkeypatch.setattr(cuda, "call", calls)
    return calls


def run(operator: str, case: dict, form: str, w0: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """y, state and every gradient of a case, through PyTorch's operator."""
    leaves = {name: case[name].clone().requires_grad_() for name in (*compiled.INPUTS[operator], "state")}
    inputs = {name: leaves[name] for name in compiled.INPUTS[operator]}
    y, state = compiled.run(operator, inputs, leaves["state"], case.get("cu_seqlens"), form, w0)
    gradients = torch.autograd.grad((y, state), tuple(leaves.values()), (case["dy"], case["dstate"]))
    names = (*(f"d{name}" for name in inputs), "dstate0")
    return {"y": y.detach(), "state": state.detach(), **dict(zip(names, gradients, strict=True))}


def apart(case: dict) -> tuple[dict, torch.Tensor]:
    """The case with a decay in r's dtype, and the rest of it, [H, N]."""
    w0 = case["w"][0, 0].clone()
    return {**case, "w": (case["w"] - w0).to(case["r"].dtype)}, w0


@pytest.mark.parametrize(
    ("operator", "form", "dtype"),
    [
        ("wkv7", "cuda-exact", BF16),
        ("wkv7", "cuda-chunked", BF16),
        ("wkv7", "cuda-accurate", FP32),
        ("wkv6", "cuda-chunked", BF16),
        ("wkv5", "cuda-chunked", BF16),
    ],
    ids=str,
)
def test_the_trial_passes_right_kernels_and_finds_wrong_ones(shim, monkeypatch, operator, form, dtype):
    trial.trial(operator, CPU, 64, dtype, form)
    (label,) = choice.labels(form, operator, dtype, 64)
    name = str(dtype).removeprefix("torch.")
    apart = operator == "wkv7" and label != "exact" and dtype == BF16
    assert {unit.dtype for unit, _ in shim.taken} == {name, *([f"{name}w"] if apart else [])}
    assert {unit.label for unit, _ in shim.taken} == {label}
    plain = native.call

    def spoiled(operator, step, *arguments, label):
        plain(operator, step, *arguments, label=label)
        if step == "backward":
            arguments[-2].mul_(1.1)  # the gradient of the last input

    monkeypatch.setattr(native, "call", spoiled)
    with pytest.raises(build.BuildError, match=f"trial call of the {form} kernels gave wrong numbers"):
        trial.trial(operator, CPU, 64, dtype, form)


def test_the_trial_has_work_for_a_whole_card_and_finds_kernels_that_do_not_repeat(shim, monkeypatch):
    """As a race between the threads of a card would show."""
    monkeypatch.setattr(trial, "_heads", lambda device: 3)
    plain, heads, calls = native.call, set(), []

    def count(operator, step, like, *arguments, label):
        plain(operator, step, like, *arguments, label=label)
        heads.add(like.shape[2])
        calls.append(step)
        if len(calls) == 4:  # backward of the second run
            arguments[-2].view(-1)[:1].mul_(1.1)  # of the gradient of the last input

    monkeypatch.setattr(native, "call", count)
    with pytest.raises(build.BuildError, match="trial call of the cuda-chunked kernels gave other numbers when it was"):
        trial.trial("wkv7", CPU, 64, BF16, "cuda-chunked")
    assert heads == {3} and calls == ["forward", "backward"] * 2


def test_a_call_chooses_by_its_sizes_and_backward_chooses_the_same(shim, monkeypatch):
    rule = choice.Rule("wkv7", 64, "chunked32", choice.Range(40, None), choice.Range(1, None), None, "predicted", "")
    monkeypatch.setattr(choice, "table", lambda: (rule,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choice.rules.cache_clear()
    cases = ((39, BF16, "exact", 3e-3), (40, BF16, "chunked32", 1.5e-2), (40, FP32, "exact", 5e-5))
    for T, dtype, label, limit in cases:
        case = wkv_inputs.make_case(dtype, B=1, T=T, H=1)
        expected = wkv_inputs.reference_gradients(case)
        for name, x in run("wkv7", case, "cuda").items():
            assert relative_error(x, expected[name]) < limit, name
        assert [(unit.label, step) for unit, step in shim.taken] == [(label, "forward"), (label, "backward")]
        shim.taken.clear()
    choice.rules.cache_clear()


@pytest.mark.parametrize(("form", "dtype"), [("cuda-exact", BF16), ("cuda-exact", FP32), ("cuda-accurate", FP32)])
def test_a_decay_that_comes_in_two_parts_is_their_sum(shim, form, dtype):
    """Bit for bit: the sum is made in float32, wherever it is made."""
    case, w0 = apart(wkv_inputs.make_case(dtype, B=1, T=35, H=2))
    found, whole = run("wkv7", case, form, w0), run("wkv7", {**case, "w": case["w"].float() + w0}, form)
    assert found["dw"].dtype == dtype and whole["dw"].dtype == FP32
    whole["dw"] = whole["dw"].to(dtype)
    for name, x in found.items():
        assert torch.equal(x, whole[name]), name


def test_chunked_kernels_add_the_parts_of_a_decay_in_float32(shim):
    case, w0 = apart(wkv_inputs.make_case(BF16, B=1, T=35, H=2))
    found, whole = (run("wkv7", c, "cuda-chunked", w) for c, w in ((case, w0), ({**case, "w": case["w"] + w0}, None)))
    assert found["dw"].dtype == BF16 and whole["dw"].dtype == FP32
    whole["dw"] = whole["dw"].bfloat16()
    for name, x in found.items():
        assert torch.equal(x, whole[name]), name


@pytest.mark.parametrize("operator", ["wkv7", "wkv6"])
def test_a_forward_pass_that_saves_nothing_gives_the_same_bits(shim, operator):
    make_case = wkv_inputs.make_case if operator == "wkv7" else wkv6_inputs.make_case
    case = make_case(*(() if operator == "wkv7" else (operator,)), BF16, B=1, T=70, H=1)
    inputs = {name: case[name].requires_grad_() for name in compiled.INPUTS[operator]}
    kept = compiled.run(operator, inputs, case["state"], None, "cuda-chunked")
    with torch.no_grad():
        quiet = compiled.run(operator, inputs, case["state"], None, "cuda-chunked")
    assert all(torch.equal(x, y) for x, y in zip(kept, quiet, strict=True))


@pytest.mark.parametrize("form", ["cuda-exact", "cuda-chunked"])
@pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
def test_the_registered_operators_keep_pytorchs_rules_in_every_form(shim, operator, form):
    case, w0 = packed_inputs.packed_case(operator, BF16, lengths=(5, 34), H=1, N=64), []
    if operator == "wkv7":
        case, *w0 = apart(case)
    inputs = tuple(case[name].requires_grad_() for name in (*compiled.INPUTS[operator], "state"))
    forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
    torch.library.opcheck(forward.default, (*inputs, case["cu_seqlens"], True, form, *w0))


def test_the_public_function_hands_a_constant_part_of_the_decay_on_where_that_saves_something(shim, monkeypatch):
    """As on a card: the form is CUDA's, w is of r's dtype, and w0 is not trained."""
    from rwkv_bone.ops import wkv

    monkeypatch.setattr(wkv, "choose_form", lambda *arguments: "cuda-chunked")
    case, w0 = apart(wkv_inputs.make_case(BF16, B=1, T=33, H=2))
    inputs = {name: case[name] for name in "rwkvab"}
    expected, _ = wkv7_reference(
        **{name: x.double() for name, x in inputs.items() if name != "w"},
        w=inputs["w"].double() + w0.double(),
        state=torch.zeros(1, 2, 64, 64, dtype=torch.float64),
    )
    for given, rest, dtype in (
        (inputs, w0, "bfloat16w"),
        (inputs, w0.clone().requires_grad_(), "bfloat16"),
        ({**inputs, "w": inputs["w"].float()}, w0, "bfloat16"),
    ):
        shim.taken.clear()
        y = wkv7(**given, w0=rest)
        assert [unit.dtype for unit, _ in shim.taken] == [dtype]
        assert relative_error(y.detach(), expected) < 9e-3


# --- on a card ---

CHUNKED = [("cuda-chunked", BF16), ("cuda-chunked64", BF16), ("cuda-accurate", BF16), ("cuda-accurate", FP32)]
# Relative errors against float64: bounds of the design, over all inputs and lengths below.
BOUNDS = {"cuda-chunked": 1.5e-2, "cuda-chunked64": 1.5e-2, "cuda-accurate": 2e-4}

on_a_card = pytest.mark.gpu
every_operator = pytest.mark.parametrize("operator", ["wkv7", "wkv6", "wkv5"])
every_form = pytest.mark.parametrize(("form", "dtype"), CHUNKED, ids=str)


def on_card(case: dict) -> dict:
    return {name: None if x is None else x.cuda() for name, x in case.items()}


def made(operator: str, dtype: torch.dtype, **sizes: int) -> tuple[dict, dict]:
    """(a case, its results in float64)"""
    if operator == "wkv7":
        case = wkv_inputs.make_case(dtype, **sizes)
        return case, wkv_inputs.reference_gradients(case)
    case = wkv6_inputs.make_case(operator, dtype, **sizes)
    return case, wkv6_inputs.reference_gradients(case)


def usable(form: str, operator: str, N: int, dtype: torch.dtype) -> None:
    """Skips where a card has too little shared memory for what no usual run takes; else fails with the reason."""
    try:
        select_op(form, torch.device("cuda"), operator, N, dtype)
    except UserError as problem:
        if (form == "cuda-chunked64" or N == 128) and "bytes of shared memory" in str(problem):
            pytest.skip(str(problem))
        raise


def has_kernels(form: str, N: int) -> bool:
    chunked = chunking(choice.labels(form, "wkv7", BF16, N)[0])
    return chunked.tokens in LENGTHS[chunked.mode].get(N, ())


@on_a_card
@every_operator
@pytest.mark.parametrize(
    ("form", "dtype", "N"),
    [(form, dtype, N) for form, dtype in CHUNKED for N in (32, 64, 128) if has_kernels(form, N)],
    ids=str,
)
def test_chunked_kernels_on_a_card_agree_with_the_reference(operator, form, dtype, N):
    usable(form, operator, N, dtype)
    bound = BOUNDS[form]
    if form == "cuda-accurate" and dtype == BF16:
        bound = 6e-3  # what is returned is rounded to it
    for T in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130):
        case, expected = made(operator, dtype, B=2, T=T, H=3, N=N)
        for name, x in run(operator, on_card(case), form).items():
            assert relative_error(x.cpu(), expected[name]) < bound, (name, T)


@on_a_card
@every_form
@every_operator
def test_each_packed_document_on_a_card_is_what_it_is_alone(operator, form, dtype):
    usable(form, operator, 64, dtype)
    case = on_card(packed_inputs.packed_case(operator, dtype, lengths=(63, 1, 64, 130, 33), H=2, N=64))

    def of(case: dict) -> dict:
        return run(operator, case, form)

    expected = packed_inputs.each_alone(operator, case, of)
    for name, x in of(case).items():
        assert torch.isfinite(x).all(), name
        assert torch.equal(x, expected[name]), name


@on_a_card
@every_form
@every_operator
def test_chunked_kernels_on_a_card_repeat_and_wait_for_nothing(operator, form, dtype):
    usable(form, operator, 64, dtype)
    case, _ = made(operator, dtype, B=2, T=100, H=5)
    case = on_card(case)
    first = run(operator, case, form)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(operator, case, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], again[name]) for name in first)


@on_a_card
@every_operator
def test_a_card_full_of_chunks_gives_what_the_sequential_kernels_give_and_repeats(operator):
    """At the heads of a 2.9B model: 2,560 blocks for each kernel that has one for a chunk and head."""
    usable("cuda-chunked", operator, 64, BF16)
    make = wkv_inputs.make_case if operator == "wkv7" else functools.partial(wkv6_inputs.make_case, operator)
    case = on_card(make(BF16, B=2, T=1024, H=40))
    expected, found, again = (run(operator, case, form) for form in ("cuda-exact", "cuda-chunked", "cuda-chunked"))
    for name, x in found.items():
        assert torch.equal(x, again[name]), f"{name} is not what it was: threads did not wait for each other"
        pairs = [(x, expected[name])]
        if x.shape == case["r"].shape:  # head by head, since one wrong head of many is little in all
            pairs = zip(x.transpose(1, 2).flatten(0, 1), expected[name].transpose(1, 2).flatten(0, 1), strict=True)
        worst = max(relative_error(head.cpu(), right.cpu()) for head, right in pairs)
        assert worst < 2 * BOUNDS["cuda-chunked"], name


@on_a_card
def test_chunked_state_indices_beyond_31_bits_are_right():
    usable("cuda-chunked", "wkv7", 64, BF16)
    B, T, H, N = 4096, 3, 128, 64  # B * H * N * N = 2^31 numbers of the states
    torch.manual_seed(0)
    inputs = {name: 0.1 * torch.randn(1, T, H, N, device="cuda", dtype=BF16) for name in "rkvab"}
    inputs["w"] = torch.randn(1, T, H, N, device="cuda")
    with torch.no_grad():
        one = wkv7(**inputs, output_state=True, op="cuda-chunked")
        many = {name: x.expand(B, T, H, N) for name, x in inputs.items()}
        y, last = wkv7(**many, output_state=True, op="cuda-chunked")
    assert torch.equal(y[-1], one[0][0]) and torch.equal(last[-1], one[1][0])


@on_a_card
def test_the_parts_of_a_decay_on_a_card_are_added_in_float32():
    usable("cuda-chunked", "wkv7", 64, BF16)
    case, w0 = apart(on_card(wkv_inputs.make_case(BF16, B=2, T=70, H=3)))
    found, whole = (run("wkv7", c, "cuda-chunked", w) for c, w in ((case, w0), ({**case, "w": case["w"] + w0}, None)))
    whole["dw"] = whole["dw"].bfloat16()
    for name, x in found.items():
        assert torch.equal(x, whole[name]), name
