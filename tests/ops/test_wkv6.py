"""Every form of the RWKV-6 and RWKV-5 operators against the float64 reference, on the inputs that hurt."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv_bone.errors import UserError
from rwkv_bone.ops import native
from rwkv_bone.ops.chunked6 import wkv6_chunked
from rwkv_bone.ops.reference import wkv6_reference
from rwkv_bone.ops.wkv6 import wkv5, wkv6
from tests.ops import wkv_abi
from tests.ops.wkv6_inputs import INPUTS, OPERATORS, cases, make_case, reference_gradients
from tests.ops.wkv_inputs import relative_error

FUNCTIONS = {"wkv6": wkv6, "wkv5": wkv5}
CASES = {operator: cases(operator) for operator in OPERATORS}
PROBLEMS = [(operator, name) for operator in OPERATORS for name in CASES[operator]]
LEVELS = {"portable": 0, "AVX2": 1, "AVX-512": 2}
LEAVES = (*INPUTS, "state")
ROUNDED = ("y", "dr", "dk", "dv")  # what is returned in the inputs' dtype
FORMS = ["cpu", "torch", pytest.param("cuda-exact", marks=pytest.mark.gpu)]
KERNELS = ["cpu", pytest.param("cuda-exact", marks=pytest.mark.gpu)]
both = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def problem(operator: str, name: str, dtype: torch.dtype):
    case = CASES[operator][name](dtype)
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


def part(operator: str, case: dict, tokens: slice) -> dict:
    """The inputs of some tokens; what is the same for all of them stays whole."""
    whole = ("u",) if operator == "wkv6" else ("u", "w")
    return {name: case[name] if name in whole else case[name][:, tokens] for name in INPUTS}


def run(operator: str, case: dict, op: str) -> dict:
    """y, state and every gradient of sum(y * dy) + sum(state * dstate) through the public function."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in INPUTS}
    names = [f"d{name}" for name in INPUTS]
    if case["state"] is not None:
        leaves["state"] = case["state"].detach().clone().requires_grad_()
        names.append("dstate0")
    y, last = FUNCTIONS[operator](**leaves, output_state=True, op=op)
    outputs, upstream = ([y], [case["dy"]])
    if case["dstate"] is not None:
        outputs, upstream = [y, last], [case["dy"], case["dstate"]]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    assert y.dtype == case["r"].dtype and last.dtype == case["w"].dtype
    return {"y": y, "state": last, **dict(zip(names, grads, strict=True))}


@pytest.fixture
def level(request, operator):
    """The operator's C++ library, made to use one instruction set."""
    library = native.library(operator)
    if library.wkv_set_level(request.param) != request.param:
        pytest.skip("this processor lacks the instruction set, AVX2 or AVX-512")
    yield wkv_abi.Library(library._name, operator)
    library.wkv_set_level(-1)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "name"), PROBLEMS)
def test_the_cpp_kernel_agrees_with_the_reference_at_every_instruction_set(operator, name, dtype, level):
    case, expected = problem(operator, name, dtype)
    # Through the C interface, where every output is filled with NaN first.
    assert_agrees(level.run(case), expected, dtype)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "name"), PROBLEMS)
def test_the_public_function_agrees_with_the_reference(operator, name, dtype, op):
    case, expected = problem(operator, name, dtype)
    assert_agrees(run(operator, place(case, op), op), expected, dtype)


@pytest.mark.parametrize(("operator", "name"), PROBLEMS)
def test_the_chunked_form_agrees_with_the_reference_in_float64(operator, name):
    case, expected = problem(operator, name, torch.float64)
    assert_agrees(run(operator, case, "auto"), expected, torch.float64)


@both
def test_the_reference_form_is_the_reference(operator):
    case, expected = problem(operator, "length_17", torch.bfloat16)
    found = run(operator, case, "reference")
    assert_agrees({name: x for name, x in found.items() if name not in ("dw", "du")}, expected, torch.bfloat16)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_the_chunked_form_passes_gradcheck(chunk):
    case = make_case("wkv6", torch.float64, B=1, T=5, H=1, N=3)
    tensors = tuple(case[name].requires_grad_() for name in LEAVES)

    def operator(r, w, k, v, u, state):
        return wkv6_chunked(r=r, w=w, k=k, v=v, u=u, state=state, chunk=chunk)

    assert torch.autograd.gradcheck(operator, tensors)


@both
def test_the_reference_follows_its_formula_step_by_step(operator):
    case = make_case(operator, torch.float64, B=1, T=3, H=1, N=4)
    S, u = case["state"][0, 0], case["u"][0]
    y, last = wkv6_reference(**{name: case[name] for name in LEAVES})
    for t in range(3):
        r, k, v = (case[name][0, t, 0] for name in "rkv")
        w = case["w"][0, t, 0] if operator == "wkv6" else case["w"][0]
        torch.testing.assert_close(y[0, t, 0], (S + torch.outer(v, u * k)) @ r)
        S = S @ torch.diag(torch.exp(-torch.exp(w))) + torch.outer(v, k)
    torch.testing.assert_close(last[0, 0], S)


@pytest.mark.parametrize("op", FORMS)
@both
def test_rwkv5_is_rwkv6_with_the_same_decay_everywhere(operator, op):
    case = place(make_case("wkv5", torch.float32, B=3, T=40), op)
    if operator == "wkv6":
        case["w"] = case["w"].expand_as(case["r"])
    expected = reference_gradients(place(case, "cpu"))
    assert_agrees(run(operator, case, op), expected, torch.float32)


@pytest.mark.parametrize("op", FORMS)
@both
def test_pieces_with_the_state_carried_equal_the_whole_in_gradients_too(operator, op):
    wkv, cuts = FUNCTIONS[operator], (0, 19, 20, 50)
    case = place(make_case(operator, torch.float32, T=cuts[-1]), op)
    whole = run(operator, case, op)
    leaves = {name: case[name].clone().requires_grad_() for name in LEAVES}
    state, outputs = leaves["state"], []
    for start, end in zip(cuts, cuts[1:], strict=False):
        y, state = wkv(**part(operator, leaves, slice(start, end)), state=state, output_state=True, op=op)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    grads = torch.autograd.grad((y, state), tuple(leaves.values()), (case["dy"], case["dstate"]))
    for name, x in zip(whole, (y, state, *grads), strict=True):
        assert relative_error(x, whole[name]) < 1e-6, name


@pytest.mark.parametrize("op", FORMS)
@both
def test_a_sequence_may_be_longer_than_4096(operator, op):
    case = make_case(operator, torch.float32, B=1, T=4100, H=1, N=8)
    assert_agrees(run(operator, place(case, op), op), long_reference(operator), torch.float32)


@functools.cache
def long_reference(operator: str) -> dict:
    return reference_gradients(make_case(operator, torch.float32, B=1, T=4100, H=1, N=8))


@pytest.mark.parametrize("op", FORMS)
@both
def test_every_sequence_of_a_batch_sees_its_own_state_only(operator, op):
    case = place(make_case(operator, torch.float32, B=3, T=20), op)
    together = run(operator, case, op)
    for row in range(3):
        whole = ("u",) if operator == "wkv6" else ("u", "w")
        alone = run(operator, {n: x if n in whole else x[row : row + 1] for n, x in case.items()}, op)
        for name in ("y", "state", "dr", "dk", "dv", "dstate0"):
            assert relative_error(together[name][row : row + 1], alone[name].double()) < 1e-6, name


@pytest.mark.parametrize("op", FORMS)
@both
def test_one_state_for_the_whole_batch_gets_the_sum_of_the_gradients(operator, op):
    case = place(make_case(operator, torch.float32, B=3, T=20), op)
    tuned = case["state"][0].clone().requires_grad_()
    inputs = {name: case[name] for name in INPUTS}
    y, last = FUNCTIONS[operator](**inputs, state=tuned.expand(3, -1, -1, -1), output_state=True, op=op)
    (grad,) = torch.autograd.grad((y, last), tuned, (case["dy"], case["dstate"]))
    expected = reference_gradients(place({**case, "state": tuned.expand(3, -1, -1, -1)}, "cpu"))["dstate0"].sum(0)
    assert relative_error(grad, expected.to(grad.device)) < 5e-5


@pytest.mark.parametrize("op", KERNELS)
@both
def test_the_same_input_gives_the_same_bits_twice(operator, op):
    case = place(make_case(operator, torch.float32, B=3, T=70, H=5), op)
    one, other = run(operator, case, op), run(operator, case, op)
    assert all(torch.equal(one[name], other[name]) for name in one)


@both
def test_the_number_of_threads_does_not_change_a_bit(operator):
    case = make_case(operator, torch.float32, B=2, H=3)
    one = run(operator, case, "cpu")
    torch.set_num_threads(2)
    two = run(operator, case, "cpu")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("op", FORMS)
@both
def test_non_contiguous_and_misaligned_inputs_are_understood(operator, op):
    case = place(make_case(operator, torch.bfloat16, T=20), op)
    plain = run(operator, case, op)
    odd = dict(case)
    for name in ("r", "v"):
        odd[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    # Contiguous, but two bytes off any alignment.
    storage = torch.empty(case["k"].numel() + 1, dtype=torch.bfloat16, device=case["k"].device)
    odd["k"] = storage[1:].view(case["k"].shape).copy_(case["k"])
    for name in ("u", "state"):
        odd[name] = case[name].mT.contiguous().mT
    y, last = FUNCTIONS[operator](**{name: odd[name] for name in LEAVES}, output_state=True, op=op)
    assert torch.equal(y, plain["y"]) and torch.equal(last, plain["state"])


@pytest.mark.parametrize("op", FORMS)
@both
def test_expanded_gradients_are_understood(operator, op):
    case = place(make_case(operator, torch.float32, T=20), op)
    wkv, leaves = FUNCTIONS[operator], {name: case[name].clone().requires_grad_() for name in INPUTS}
    (by_sum,) = torch.autograd.grad(wkv(**leaves, op=op).sum(), leaves["k"])
    y = wkv(**leaves, op=op)
    (by_ones,) = torch.autograd.grad(y, leaves["k"], torch.ones_like(y))
    assert torch.equal(by_sum, by_ones)


@pytest.mark.parametrize("op", FORMS)
@both
def test_a_loss_on_the_state_alone_and_on_one_input_alone_works(operator, op):
    case = place(make_case(operator, torch.float32, T=20), op)
    full = {name: case[name] for name in LEAVES}
    full["state"] = case["state"].clone().requires_grad_()
    _, last = FUNCTIONS[operator](**full, output_state=True, op=op)
    (alone,) = torch.autograd.grad(last, full["state"], case["dstate"])
    reference = reference_gradients(place({**case, "dy": torch.zeros_like(case["dy"])}, "cpu"))
    assert relative_error(alone, reference["dstate0"]) < 5e-5


@pytest.mark.parametrize("op", KERNELS)
@both
def test_nothing_is_saved_when_no_gradient_is_wanted(operator, op, monkeypatch):
    case = place(make_case(operator, torch.float32, T=20), op)
    wkv, inputs = FUNCTIONS[operator], {name: case[name].requires_grad_() for name in INPUTS}
    wkv(**inputs, op=op)  # tries the kernel, with calls of its own
    kept, plain = [], native.call
    # The last argument of forward is what it leaves for backward.
    monkeypatch.setattr(
        native, "call", lambda *args, **label: kept.append(args[-1] is not None) or plain(*args, **label)
    )
    with torch.no_grad():
        quiet = wkv(**inputs, op=op)
    assert torch.equal(wkv(**inputs, op=op), quiet) and kept == [False, True]


@pytest.mark.parametrize("op", FORMS)
@both
def test_activation_checkpointing_gives_the_same_gradients(operator, op):
    case = place(make_case(operator, torch.float32, T=40), op)

    def layer(r, w, k, v, u, state):
        return FUNCTIONS[operator](r=r, w=w, k=k, v=v, u=u, state=state, output_state=True, op=op)

    def gradients(call):
        leaves = [case[name].clone().requires_grad_() for name in LEAVES]
        return torch.autograd.grad(call(*leaves), leaves, (case["dy"], case["dstate"]))

    plain = gradients(layer)
    again = gradients(lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("op", FORMS)
@both
def test_autocast_changes_only_the_inputs_type(operator, op):
    wkv, case = FUNCTIONS[operator], place(make_case(operator, torch.float32, T=40), op)
    half = {name: case[name].bfloat16() if name in "rkv" else case[name] for name in LEAVES}
    expected = wkv(**half, output_state=True, op=op)
    leaves = {name: case[name].clone().requires_grad_() for name in LEAVES}
    mixed = {**leaves, "k": leaves["k"].bfloat16()}  # as after an autocast projection
    with torch.autocast(case["r"].device.type, dtype=torch.bfloat16):
        found = wkv(**mixed, output_state=True, op=op)
        (found[0].float().sum() + found[1].sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())


@pytest.mark.parametrize("op", FORMS)
@both
def test_torch_compile_takes_the_operator_whole(operator, op):
    case = place(make_case(operator, torch.float32, T=20, H=1), op)

    def layer(**inputs):
        y, last = FUNCTIONS[operator](**inputs, output_state=True, op=op)
        return y.sin().sum() + last.square().sum()

    def gradients(call):
        leaves = {name: case[name].clone().requires_grad_() for name in LEAVES}
        return torch.autograd.grad(call(**leaves), tuple(leaves.values()))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(layer), gradients(compiled), strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize("op", KERNELS)
@both
def test_the_registered_operators_keep_pytorchs_rules(operator, op):
    case = place(make_case(operator, torch.float32, T=20, H=1), op)
    inputs = tuple(case[name].requires_grad_() for name in LEAVES)
    forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
    torch.library.opcheck(forward.default, (*inputs, None, True, op))


@pytest.mark.parametrize(
    ("operator", "change", "sentence"),
    [
        ("wkv6", {"r": (2, 20, 64)}, r"wkv6: r must be \[B, T, H, N\]"),
        ("wkv6", {"r": (2, 0, 2, 64)}, "no size 0"),
        ("wkv6", {"k": (2, 19, 2, 64)}, r"k must be \[2, 20, 2, 64\] .* found \[2, 19, 2, 64\]"),
        ("wkv6", {"w": (2, 64)}, r"wkv6: w must be \[2, 20, 2, 64\] .* found \[2, 64\]"),
        ("wkv5", {"w": (2, 20, 2, 64)}, r"wkv5: w must be \[2, 64\] .* found \[2, 20, 2, 64\]"),
        ("wkv5", {"u": (128,)}, r"u must be \[2, 64\] .* found \[128\]"),
        ("wkv6", {"state": (2, 64, 64)}, r"state must be \[2, 2, 64, 64\]"),
        ("wkv6", {"v": torch.bfloat16}, "v must be torch.float32 like r, found torch.bfloat16"),
        ("wkv6", {"r": torch.float16}, "r must be float32, bfloat16 or float64"),
        ("wkv5", {"u": "meta"}, "u must be on cpu like r"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_was_expected(operator, change, sentence):
    tensors = {name: torch.zeros(2, 20, 2, 64) for name in "rkv"}
    tensors |= {"w": torch.zeros(2, 20, 2, 64) if operator == "wkv6" else torch.zeros(2, 64)}
    tensors |= {"u": torch.zeros(2, 64), "state": torch.zeros(2, 2, 64, 64)}
    for name, value in change.items():
        tensors[name] = torch.zeros(value) if isinstance(value, tuple) else tensors[name].to(value)
    with pytest.raises(UserError, match=sentence):
        FUNCTIONS[operator](**tensors)


@both
def test_a_kernel_refuses_what_it_cannot_do_and_names_the_way_out(operator):
    def inputs(N, dtype):
        case = make_case(operator, dtype, B=1, T=2, H=1, N=N)
        return {name: case[name] for name in INPUTS}

    wkv = FUNCTIONS[operator]
    with pytest.raises(UserError, match="multiple of 8, found 12: use --op torch"):
        wkv(**inputs(12, torch.float32), op="cpu")
    with pytest.raises(UserError, match="found float64: use --op torch"):
        wkv(**inputs(8, torch.float64), op="cpu")
    assert wkv(**inputs(12, torch.float32), op="torch").shape == (1, 2, 1, 12)


@both
def test_the_c_interface_reports_a_bad_size_instead_of_crashing(operator):
    x = torch.zeros(1, 1, 1, 12)
    with pytest.raises(RuntimeError, match=f"{operator}_forward failed .*multiple of 8"):
        native.call(operator, "forward", x, None, x, x, x, x, x, None, x, None, None)


@pytest.mark.gpu
@both
def test_state_indices_beyond_31_bits_are_right(operator):
    # B * H * N * N = 2^31 state elements, and a T that ends inside a segment.
    B, T, H, N = 4096, 3, 128, 64
    case = place(make_case(operator, torch.bfloat16, B=1, T=T, H=H, N=N), "cuda")
    inputs, wkv = {name: case[name] for name in INPUTS}, FUNCTIONS[operator]
    one = wkv(**inputs, output_state=True, op="cuda")
    many = {name: x.expand(B, T, H, N) if x.dim() == 4 else x for name, x in inputs.items()}
    y, last = wkv(**many, output_state=True, op="cuda")
    assert torch.equal(y[-1], one[0][0]) and torch.equal(last[-1], one[1][0])


@pytest.mark.gpu
@both
def test_the_kernel_runs_on_the_current_stream(operator):
    case = place(make_case(operator, torch.float32), "cuda")
    expected = run(operator, case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: None if x is None else x.clone() for name, x in case.items()}
        found = run(operator, late, "cuda")
    stream.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
