"""Every form of the RWKV-7 operator against the float64 reference, on the inputs that hurt."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_bone.errors import UserError
from rwkv_bone.ops import native
from rwkv_bone.ops.chunked import wkv7_chunked
from rwkv_bone.ops.reference import wkv7_reference
from rwkv_bone.ops.wkv7 import wkv7
from tests.ops import wkv_abi
from tests.ops.wkv_inputs import INPUTS, cases, make_case, reference_gradients, relative_error

CASES = cases()
LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
ROUNDED = ("y", "dr", "dk", "dv", "da", "db")  # what is returned in the inputs' dtype
FORMS = ["cpu", "torch", pytest.param("cuda-exact", marks=pytest.mark.gpu)]
KERNELS = ["cpu", pytest.param("cuda-exact", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def problem(name: str, dtype: torch.dtype):
    case = CASES[name](dtype)
    return case, reference_gradients(case)


def limit(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.bfloat16 and name in ROUNDED:
        return 3e-3
    return 1e-5 if name in ("y", "state") else 5e-5


def assert_agrees(found: dict, expected: dict, dtype: torch.dtype) -> None:
    for name, x in found.items():
        error = relative_error(x, expected[name])
        assert error <= limit(name, dtype), f"{name}: relative error {error:.1e}"


def place(case: dict, op: str) -> dict:
    device = "cuda" if op.startswith("cuda") else "cpu"
    return {name: None if x is None else x.to(device) for name, x in case.items()}


def run(case: dict, op: str) -> dict:
    """y, state and every gradient of sum(y * dy) + sum(state * dstate) through the public function."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in INPUTS}
    names = [f"d{name}" for name in INPUTS]
    if case["state"] is not None:
        leaves["state"] = case["state"].detach().clone().requires_grad_()
        names.append("dstate0")
    y, last = wkv7(**leaves, output_state=True, op=op)
    outputs, upstream = ([y], [case["dy"]])
    if case["dstate"] is not None:
        outputs, upstream = [y, last], [case["dy"], case["dstate"]]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    assert y.dtype == case["r"].dtype and last.dtype == case["w"].dtype
    return {"y": y, "state": last, **dict(zip(names, grads, strict=True))}


@pytest.fixture
def level(request):
    """Makes the C++ kernel use one instruction set."""
    library = native.library("wkv7")
    if library.wkv_set_level(request.param) != request.param:
        pytest.skip("this processor lacks the instruction set, AVX2 or AVX-512")
    yield wkv_abi.Library(library._name, "wkv7")
    library.wkv_set_level(-1)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_cpp_kernel_agrees_with_the_reference_at_every_instruction_set(name, dtype, level):
    case, expected = problem(name, dtype)
    # Through the C interface, where every output is filled with NaN first.
    assert_agrees(level.run(case), expected, dtype)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_public_function_agrees_with_the_reference(name, dtype, op):
    case, expected = problem(name, dtype)
    assert_agrees(run(place(case, op), op), expected, dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_chunked_form_agrees_with_the_reference_in_float64(name):
    case, expected = problem(name, torch.float64)
    assert_agrees(run(case, "auto"), expected, torch.float64)


def test_the_reference_form_is_the_reference():
    case, expected = problem("length_17", torch.bfloat16)
    found = run(case, "reference")
    assert_agrees({name: x for name, x in found.items() if name != "dw"}, expected, torch.bfloat16)


@pytest.mark.parametrize("chunk", [2, 16])
def test_the_chunked_form_passes_gradcheck(chunk):
    case = make_case(torch.float64, B=1, T=5, H=1, N=3)
    tensors = tuple(case[name].requires_grad_() for name in (*INPUTS, "state"))

    def operator(r, w, k, v, a, b, state):
        return wkv7_chunked(r=r, w=w, k=k, v=v, a=a, b=b, state=state, chunk=chunk)

    assert torch.autograd.gradcheck(operator, tensors)


def test_the_reference_follows_its_formula_step_by_step():
    case = make_case(torch.float64, B=1, T=3, H=1, N=4)
    S = case["state"][0, 0]
    y, last = wkv7_reference(**{name: case[name] for name in (*INPUTS, "state")})
    for t in range(3):
        r, w, k, v, a, b = (case[name][0, t, 0] for name in INPUTS)
        decay = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * torch.sigmoid(w))
        S = S @ torch.diag(decay) + torch.outer(S @ a, b) + torch.outer(v, k)
        torch.testing.assert_close(y[0, t, 0], S @ r)
    torch.testing.assert_close(last[0, 0], S)


@pytest.mark.parametrize("op", FORMS)
def test_two_halves_with_the_state_carried_equal_the_whole(op):
    case = place(make_case(torch.float32, T=50), op)
    inputs = {name: case[name] for name in INPUTS}
    y, last = wkv7(**inputs, state=case["state"], output_state=True, op=op)
    first, state = wkv7(**{n: x[:, :19] for n, x in inputs.items()}, state=case["state"], output_state=True, op=op)
    second, end = wkv7(**{n: x[:, 19:] for n, x in inputs.items()}, state=state, output_state=True, op=op)
    assert relative_error(torch.cat([first, second], dim=1), y) < 1e-6
    assert relative_error(end, last) < 1e-6


@pytest.mark.parametrize("op", KERNELS)
def test_the_same_input_gives_the_same_bits_twice(op):
    case = place(make_case(torch.float32, B=3, T=70, H=5), op)
    one, other = run(case, op), run(case, op)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_number_of_threads_does_not_change_a_bit():
    case = make_case(torch.float32, B=2, H=3)
    one = run(case, "cpu")
    torch.set_num_threads(2)
    two = run(case, "cpu")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("op", FORMS)
def test_non_contiguous_and_misaligned_inputs_are_understood(op):
    case = place(make_case(torch.bfloat16, T=20), op)
    plain = run(case, op)
    odd = dict(case)
    for name in ("r", "v"):
        odd[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    # Contiguous, but two bytes off any alignment.
    storage = torch.empty(case["k"].numel() + 1, dtype=torch.bfloat16, device=case["k"].device)
    odd["k"] = storage[1:].view(case["k"].shape).copy_(case["k"])
    odd["state"] = case["state"].mT.contiguous().mT
    y, last = wkv7(**{name: odd[name] for name in (*INPUTS, "state")}, output_state=True, op=op)
    assert torch.equal(y, plain["y"]) and torch.equal(last, plain["state"])


@pytest.mark.parametrize("op", FORMS)
def test_expanded_gradients_are_understood(op):
    case = place(make_case(torch.float32, T=20), op)
    leaves = {name: case[name].clone().requires_grad_() for name in INPUTS}
    (by_sum,) = torch.autograd.grad(wkv7(**leaves, op=op).sum(), leaves["k"])
    y = wkv7(**leaves, op=op)
    (by_ones,) = torch.autograd.grad(y, leaves["k"], torch.ones_like(y))
    assert torch.equal(by_sum, by_ones)


@pytest.mark.parametrize("op", FORMS)
def test_a_loss_on_the_state_alone_and_on_one_input_alone_works(op):
    case = place(make_case(torch.float32, T=20), op)
    full = {name: case[name] for name in (*INPUTS, "state")}
    full["state"] = case["state"].clone().requires_grad_()
    _, last = wkv7(**full, output_state=True, op=op)
    (alone,) = torch.autograd.grad(last, full["state"], case["dstate"])
    reference = reference_gradients({**case, "dy": torch.zeros_like(case["dy"])})
    assert relative_error(alone, reference["dstate0"]) < 5e-5


@pytest.mark.parametrize("op", KERNELS)
def test_nothing_is_saved_when_no_gradient_is_wanted(op, monkeypatch):
    case = place(make_case(torch.float32, T=20), op)
    inputs = {name: case[name].requires_grad_() for name in INPUTS}
    wkv7(**inputs, op=op)  # tries the kernel, with calls of its own
    kept, plain = [], native.call
    # After y and the last state comes what forward leaves for backward.
    saved = 4 + len(INPUTS) + 3
    monkeypatch.setattr(
        native, "call", lambda *args, **label: kept.append(args[saved] is not None) or plain(*args, **label)
    )
    with torch.no_grad():
        quiet = wkv7(**inputs, op=op)
    assert torch.equal(wkv7(**inputs, op=op), quiet) and kept == [False, True]


@pytest.mark.parametrize("op", FORMS)
def test_activation_checkpointing_gives_the_same_gradients(op):
    case = place(make_case(torch.float32, T=40), op)

    def layer(r, w, k, v, a, b, state):
        return wkv7(r=r, w=w, k=k, v=v, a=a, b=b, state=state, output_state=True, op=op)

    def gradients(call):
        leaves = [case[name].clone().requires_grad_() for name in (*INPUTS, "state")]
        return torch.autograd.grad(call(*leaves), leaves, (case["dy"], case["dstate"]))

    plain = gradients(layer)
    again = gradients(lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("op", FORMS)
def test_autocast_changes_only_the_inputs_type(op):
    case = place(make_case(torch.float32, T=40), op)
    half = {n: x.bfloat16() if n in "rkvab" else x for n, x in case.items() if n not in ("dy", "dstate")}
    expected = wkv7(**half, output_state=True, op=op)
    leaves = {name: case[name].clone().requires_grad_() for name in (*INPUTS, "state")}
    mixed = {**leaves, "k": leaves["k"].bfloat16()}  # as after an autocast projection
    with torch.autocast(case["r"].device.type, dtype=torch.bfloat16):
        found = wkv7(**mixed, output_state=True, op=op)
        (found[0].float().sum() + found[1].sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())


@pytest.mark.parametrize("op", FORMS)
def test_torch_compile_takes_the_operator_whole(op):
    case = place(make_case(torch.float32, T=20, H=1), op)

    def layer(**inputs):
        y, last = wkv7(**inputs, output_state=True, op=op)
        return y.sin().sum() + last.square().sum()

    def gradients(call):
        leaves = {name: case[name].clone().requires_grad_() for name in (*INPUTS, "state")}
        return torch.autograd.grad(call(**leaves), tuple(leaves.values()))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(layer), gradients(compiled), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("op", KERNELS)
def test_the_registered_operators_keep_pytorchs_rules(op):
    case = place(make_case(torch.float32, T=20, H=1), op)
    inputs = tuple(case[name].requires_grad_() for name in (*INPUTS, "state"))
    torch.library.opcheck(torch.ops.rwkv_bone.wkv7_forward.default, (*inputs, None, True, op, None))


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS, indirect=True)
def test_the_cpp_kernel_adds_a_constant_part_of_the_decay_itself(level):
    """w in bfloat16 and w0 in float32 give the bits of their float32 sum; only w's gradient is rounded."""
    case = make_case(torch.bfloat16, T=130, H=3, N=16)
    w, w0 = case["w"].bfloat16(), torch.linspace(-6, -1, 3 * 16).view(3, 16)
    found, expected = level.run({**case, "w": w, "w0": w0}), level.run({**case, "w": w.float() + w0})
    assert found["dw"].dtype == torch.bfloat16
    expected["dw"] = expected["dw"].bfloat16()
    assert all(map(torch.equal, found.values(), expected.values()))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["cpu", "torch", "reference"])
def test_a_constant_part_of_the_decay_is_added_in_float32(op, dtype, trained):
    if op == "cpu" and dtype == torch.float64:
        pytest.skip("the C++ kernels have no float64")
    case = make_case(dtype, B=2, T=20, N=16)
    w0 = torch.linspace(-3, 2, 32).view(2, 16).to(torch.promote_types(dtype, torch.float32))
    whole, parts = ({name: case[name].clone().requires_grad_() for name in INPUTS} for _ in range(2))
    with torch.no_grad():
        parts["w"] = parts["w"].to(dtype).requires_grad_()
        whole["w"] = (parts["w"].to(w0.dtype) + w0).requires_grad_()
    w0.requires_grad_(trained)
    expected, found = wkv7(**whole, op=op), wkv7(**parts, w0=w0, op=op)
    assert torch.equal(found, expected)
    for y in (expected, found):
        y.backward(case["dy"])
    for name in INPUTS:
        assert parts[name].grad.dtype == dtype
        assert torch.equal(parts[name].grad, whole[name].grad.to(dtype)), name
    if trained:
        torch.testing.assert_close(w0.grad, whole["w"].grad.sum((0, 1)))
    else:
        assert w0.grad is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"r": (2, 20, 64)}, r"r must be \[B, T, H, N\]"),
        ({"r": (2, 0, 2, 64)}, "no size 0"),
        ({"k": (2, 19, 2, 64)}, r"k must be \[2, 20, 2, 64\] .* found \[2, 19, 2, 64\]"),
        ({"state": (2, 64, 64)}, r"state must be \[2, 2, 64, 64\]"),
        ({"v": torch.bfloat16}, "v must be torch.float32 like r, found torch.bfloat16"),
        ({"r": torch.float16}, "r must be float32, bfloat16 or float64"),
        ({"b": "meta"}, "b must be on cpu like r"),
        ({"w0": (2, 20, 2, 64)}, r"w0 must be \[2, 64\] to fit r"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_was_expected(change, sentence):
    tensors = {name: torch.zeros(2, 20, 2, 64) for name in INPUTS} | {"state": torch.zeros(2, 2, 64, 64)}
    for name, value in change.items():
        tensors[name] = torch.zeros(value) if isinstance(value, tuple) else tensors[name].to(value)
    with pytest.raises(UserError, match=sentence):
        wkv7(**tensors)


def test_a_kernel_refuses_what_it_cannot_do_and_names_the_way_out():
    def inputs(N, dtype):
        return {name: torch.zeros(1, 2, 1, N, dtype=dtype) for name in INPUTS}

    with pytest.raises(UserError, match="multiple of 8, found 12: use --op torch"):
        wkv7(**inputs(12, torch.float32), op="cpu")
    with pytest.raises(UserError, match="found float64: use --op torch"):
        wkv7(**inputs(8, torch.float64), op="cpu")
    assert wkv7(**inputs(12, torch.float32), op="torch").shape == (1, 2, 1, 12)


def test_the_c_interface_reports_a_bad_size_instead_of_crashing():
    x = torch.zeros(1, 1, 1, 12)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        native.call("wkv7", "forward", x, None, x, x, x, x, x, x, None, x, None, None, None)


@pytest.mark.gpu
def test_state_indices_beyond_31_bits_are_right():
    # B * H * N * N = 2^31 state elements, and a T that ends inside a segment.
    B, T, H, N = 4096, 3, 128, 64
    torch.manual_seed(0)
    inputs = {name: torch.randn(1, T, H, N, device="cuda", dtype=torch.bfloat16) * 0.1 for name in INPUTS}
    one = wkv7(**inputs, output_state=True, op="cuda")
    many = {name: x.expand(B, T, H, N) for name, x in inputs.items()}
    y, last = wkv7(**many, output_state=True, op="cuda")
    assert torch.equal(y[-1], one[0][0]) and torch.equal(last[-1], one[1][0])


@pytest.mark.gpu
def test_the_kernel_runs_on_the_current_stream():
    case = place(make_case(torch.float32), "cuda")
    expected = run(case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: None if x is None else x.clone() for name, x in case.items()}
        found = run(late, "cuda")
    stream.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
