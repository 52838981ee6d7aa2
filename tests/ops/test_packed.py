"""Packed documents: every operator in every form gives what it gives for each document alone.

Bit for bit where a form walks token by token; to rounding where it works in chunks, whose products may be summed in
another order beside other documents.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from rwkv_bone.errors import UserError
from rwkv_bone.ops import native
from rwkv_bone.ops.reference import each_document, wkv6_reference, wkv7_reference
from rwkv_bone.ops.wkv6 import wkv5, wkv6
from rwkv_bone.ops.wkv7 import wkv7
from tests.ops import wkv_abi
from tests.ops.packed_inputs import SHARED, each_alone, packed_case
from tests.ops.wkv_inputs import relative_error

FUNCTIONS = {"wkv7": wkv7, "wkv6": wkv6, "wkv5": wkv5}
GPU = pytest.param("cuda-exact", marks=pytest.mark.gpu)
SEQUENTIAL = ["reference", "cpu", GPU]

each_operator = pytest.mark.parametrize("operator", FUNCTIONS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(operator: str, case: dict[str, Tensor], op: str) -> dict[str, Tensor]:
    """y, state and every gradient of sum(y * dy) + sum(state * dstate) through the public function."""
    names = [*wkv_abi.INPUTS[operator], "state"]
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    y, last = FUNCTIONS[operator](**leaves, cu_seqlens=case.get("cu_seqlens"), output_state=True, op=op)
    grads = torch.autograd.grad((y, last), tuple(leaves.values()), (case["dy"], case["dstate"]))
    outputs = ("y", "state", *(f"d{name}" for name in wkv_abi.INPUTS[operator]), "dstate0")
    return dict(zip(outputs, (y.detach(), last.detach(), *grads), strict=True))


def place(case: dict[str, Tensor], op: str) -> dict[str, Tensor]:
    return {name: x.to("cuda" if op.startswith("cuda") else "cpu") for name, x in case.items()}


def take_shared(operator: str, results: dict[str, Tensor]) -> list[Tensor]:
    """Takes out the gradients of what all documents share: autograd sums them in an order of its own."""
    return [results.pop(f"d{name}") for name in SHARED[operator]]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.isfinite(x).all(), name
        assert torch.equal(x, expected[name]), f"{name} differs by {relative_error(x, expected[name]):.1e}"


@pytest.mark.parametrize("op", SEQUENTIAL)
@each_dtype
@each_operator
def test_each_document_is_what_it_is_alone_bit_for_bit(operator, dtype, op):
    case = place(packed_case(operator, dtype), op)
    found, expected = run(operator, case, op), each_alone(operator, case, functools.partial(run, operator, op=op))
    if op == "reference":
        for x, y in zip(take_shared(operator, found), take_shared(operator, expected), strict=True):
            assert relative_error(x, y) < 1e-6
    assert_equal(found, expected)


@pytest.mark.parametrize("op", ["torch", pytest.param("torch on cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_operator
def test_the_chunked_form_agrees_with_each_document_alone(operator, dtype, op):
    case = packed_case(operator, dtype)
    # The float64 reference: a document that saw another's state would not be off by rounding.
    wide = {name: x if name == "cu_seqlens" else x.double() for name, x in case.items()}
    expected = each_alone(operator, wide, functools.partial(run, operator, op="reference"))
    found = run(operator, place(case, op.removeprefix("torch on ")), "torch")
    for name, x in found.items():
        limit = 1e-5 if name in ("y", "state") else 5e-5
        if dtype == torch.bfloat16 and name not in ("state", "dw", "du", "dstate0"):
            limit = 3e-3
        assert relative_error(x, expected[name]) <= (1e-12 if dtype == torch.float64 else limit), name


@pytest.mark.parametrize("op", ["torch", *SEQUENTIAL])
@pytest.mark.parametrize("T", [1, 64, 65])
@each_operator
def test_a_single_document_is_a_batch_of_one(operator, T, op):
    case = place(packed_case(operator, torch.float32, lengths=(T,)), op)
    plain = {name: x for name, x in case.items() if name != "cu_seqlens"}
    found, expected = run(operator, case, op), run(operator, plain, op)
    if op == "torch":
        for x, y in zip(take_shared(operator, found), take_shared(operator, expected), strict=True):
            assert relative_error(x, y) < 1e-6
    assert_equal(found, expected)


@pytest.mark.parametrize("op", ["torch", *SEQUENTIAL])
@each_operator
def test_documents_without_a_state_start_from_zeros(operator, op):
    case = place(packed_case(operator, torch.float32, lengths=(3, 33, 1)), op)
    inputs = {name: case[name] for name in wkv_abi.INPUTS[operator]}
    call = functools.partial(FUNCTIONS[operator], **inputs, cu_seqlens=case["cu_seqlens"], output_state=True, op=op)
    for none, zeros in zip(call(), call(state=torch.zeros_like(case["state"])), strict=True):
        assert torch.equal(none, zeros)


@pytest.mark.parametrize("op", ["torch", "cpu", GPU])
@each_operator
def test_a_document_hears_nothing_of_the_others(operator, op):
    """Not even infinities and NaN: nothing of another document is multiplied by zero."""
    case = place(packed_case(operator, torch.float32, lengths=(9, 40, 31)), op)
    clean = run(operator, case, op)
    for name in ("k", "v", "dy"):
        case[name][:, 9:49] = float("nan")
    case["state"][1], case["dstate"][1] = float("inf"), float("nan")
    found = run(operator, case, op)
    for name, x in found.items():
        if name in ("state", "dstate0"):
            assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name
        elif name.removeprefix("d") not in SHARED[operator]:
            assert torch.equal(x[:, :9], clean[name][:, :9]), name
            assert torch.equal(x[:, 49:], clean[name][:, 49:]), name


@each_operator
def test_every_division_of_a_few_tokens_is_right(operator):
    """All 64 ways to cut 7 tokens into documents, in chunks of 32 and in the C++ kernel."""
    whole = packed_case(operator, torch.float32, lengths=(1,) * 7, H=1, N=8)
    for mask in range(64):
        cuts = [0, *(i + 1 for i in range(6) if mask >> i & 1), 7]
        case = {**whole, "cu_seqlens": torch.tensor(cuts)}
        for name in ("state", "dstate"):
            case[name] = whole[name][: len(cuts) - 1]
        kernel, chunked = run(operator, case, "cpu"), run(operator, case, "torch")
        for name in kernel:
            assert relative_error(chunked[name], kernel[name].double()) < 5e-5, (cuts, name)
        if mask % 9 == 0:
            assert_equal(kernel, each_alone(operator, case, functools.partial(run, operator, op="cpu")))


@each_operator
def test_the_reference_passes_gradcheck(operator):
    case = packed_case(operator, torch.float64, lengths=(2, 1, 2), H=1, N=2)
    names = [*wkv_abi.INPUTS[operator], "state"]
    recurrence = wkv7_reference if operator == "wkv7" else wkv6_reference

    def packed(*tensors):
        return each_document(recurrence, cu_seqlens=case["cu_seqlens"], **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(packed, tuple(case[name].requires_grad_() for name in names))


@each_operator
def test_the_number_of_threads_does_not_change_a_bit(operator):
    case = packed_case(operator, torch.float32)
    one = run(operator, case, "cpu")
    torch.set_num_threads(2)
    assert_equal(run(operator, case, "cpu"), one)


@each_dtype
@each_operator
def test_the_cpp_kernel_fills_every_output(operator, dtype):
    """Through the C interface, where outputs and what is saved start as NaN."""
    case = packed_case(operator, dtype)
    library = wkv_abi.Library(native.library(operator)._name, operator)
    assert_equal(library.run(case), each_alone(operator, case, library.run))


@pytest.mark.parametrize(("operator", "op"), [("wkv7", "torch"), ("wkv7", "cpu"), ("wkv6", "cpu")])
def test_torch_compile_takes_the_operator_whole(operator, op):
    case = place(packed_case(operator, torch.float32, lengths=(2, 3), H=1, N=8), op)

    def layer(cu_seqlens, **inputs):
        y, last = FUNCTIONS[operator](**inputs, cu_seqlens=cu_seqlens, output_state=True, op=op)
        return y.sin().sum() + last.square().sum()

    def gradients(call):
        leaves = {name: case[name].clone().requires_grad_() for name in (*wkv_abi.INPUTS[operator], "state")}
        return torch.autograd.grad(call(case["cu_seqlens"], **leaves), tuple(leaves.values()))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x, y in zip(gradients(layer), gradients(compiled), strict=True):
        assert relative_error(x, y.double()) < 1e-6


@pytest.mark.parametrize("op", ["cpu", GPU])
@each_operator
def test_the_registered_operators_keep_pytorchs_rules(operator, op):
    case = place(packed_case(operator, torch.float32, lengths=(5, 9), H=1, N=8), op)
    inputs = tuple(case[name].requires_grad_() for name in (*wkv_abi.INPUTS[operator], "state"))
    forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
    constants = [None] if operator == "wkv7" else []  # w0
    torch.library.opcheck(forward.default, (*inputs, case["cu_seqlens"], True, op, *constants))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"r": (2, 10, 2, 8)}, r"B = 1, found r \[2, 10, 2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32)}, r"int64 .* found torch.int32 \[3\]"),
        ({"cu_seqlens": torch.tensor([[0, 4, 10]])}, r"int64 \[documents \+ 1\], found torch.int64 \[1, 3\]"),
        ({"cu_seqlens": torch.tensor([10])}, r"found torch.int64 \[1\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 10], device="meta")}, "cu_seqlens must be on cpu like r"),
        ({"cu_seqlens": torch.tensor([1, 4, 10])}, "rise from 0 to the number of tokens 10, found 1, 4, 10"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "tokens 10, found 0, 4, 9"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 10])}, "found 0, 4, 4, 10"),
        ({"cu_seqlens": torch.tensor([0, 9, 4, 10])}, "found 0, 9, 4, 10"),
        ({"state": (1, 2, 8, 8)}, r"state must be \[2, 2, 8, 8\] .* found \[1, 2, 8, 8\]"),
    ],
    ids=str,
)
@each_operator
def test_a_wrong_argument_is_named_with_what_was_expected(operator, change, sentence):
    tensors = packed_case(operator, torch.float32, lengths=(4, 6), N=8)
    tensors = {name: tensors[name] for name in (*wkv_abi.INPUTS[operator], "state", "cu_seqlens")}
    for name, value in change.items():
        tensors[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=rf"{operator}: .*{sentence}"):
        FUNCTIONS[operator](**tensors, op="torch")


@pytest.mark.parametrize("offsets", [(0, 4, 9), (1, 10), (0, 4, 4, 10), (0, 12, 10)])
@each_operator
def test_the_c_interface_reports_bad_offsets_instead_of_crashing(operator, offsets):
    case = packed_case(operator, torch.float32, lengths=(10,), N=8)
    inputs, offsets = (case[name] for name in wkv_abi.INPUTS[operator]), torch.tensor(offsets)
    w0 = [None] if operator == "wkv7" else []
    with pytest.raises(RuntimeError, match="offsets that rise from 0 to the number of tokens"):
        native.call(operator, "forward", case["r"], offsets, *inputs, None, case["dy"], None, None, *w0)


@pytest.mark.gpu
@each_operator
def test_the_kernel_waits_for_nothing_on_the_gpu(operator):
    case = place(packed_case(operator, torch.float32), "cuda")
    run(operator, case, "cuda")  # built and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operator, case, "cuda")
        run(operator, case, "torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")
