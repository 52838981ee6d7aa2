"""WKV operators, each in several forms with one meaning, and the choice between the forms.

    reference       the recurrence step by step: the definition (ops/reference.py)
    torch           chunked PyTorch, on any device (ops/chunked.py, ops/chunked6.py)
    cpu             C++ for the processor (cuda/cpu/)
    cuda            CUDA (cuda/): per call whichever of the next two is faster (ops/choice.py)
    cuda-exact      CUDA, sequential in time, in float32
    cuda-chunked    CUDA with tensor cores, whose operands are rounded to bfloat16
    cuda-accurate   the same with three products for one, which are as good as float32's in most places

All but the first two are compiled on first use and tried once before anything relies on them.
"""

from __future__ import annotations

import functools

import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import choice, native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.driver import DriverError
from rwkv_bone.ops.launches import HEAD_SIZES
from rwkv_bone.ops.sizes import chunking

CHOICES = ("auto", "cuda", "cuda-exact", "cuda-chunked", "cuda-accurate", "cpu", "torch", "reference")
CPU_LEVELS = ("portable vectors", "AVX2", "AVX-512")
# The chunked kernels of one length, for tests and benchmarks; understood like the others.
LENGTHS = ("cuda-chunked32", "cuda-chunked64")


def select_op(
    op: str, device: torch.device, operator: str = "wkv7", N: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """(the form to use for head size N and this dtype, one sentence for the user).

    Builds the kernels if there are any to build, and tries them. "auto" takes the fastest form that works and says what
    is in the way if that is a slow one; "cuda" falls back to "cuda-exact" in the same way. Another explicit choice that
    cannot be had raises UserError.
    """
    return _select(op, device, operator, N, dtype)


@functools.cache
def _select(op: str, device: torch.device, operator: str, N: int, dtype: torch.dtype) -> tuple[str, str]:
    if op not in CHOICES + LENGTHS:
        raise UserError(f"--op: expected one of {', '.join(CHOICES)}, found {op!r}")
    kind = device.type
    if op == "torch":
        return "torch", f"{operator}: chunked PyTorch on {kind}, as asked"
    if op == "reference":
        return "reference", f"{operator}: the reference loop on {kind}, as asked; slow, meant for tests"
    if op == "auto" and kind not in ("cpu", "cuda"):
        return "torch", f"{operator}: chunked PyTorch, since there is no compiled kernel for {kind}"
    wanted = kind if op == "auto" else op.split("-")[0]
    if wanted != kind:
        raise UserError(f"--op {op} needs the model on {wanted}, but it is on {kind}: use --op auto")
    if op not in ("auto", "cpu", "cuda", "cuda-exact"):
        return _chunked(op, device, operator, N, dtype)
    if problem := _sequential_problem(device, operator, N, dtype):
        if op == "auto":
            return "torch", f"{operator}: chunked PyTorch, slower than the compiled {kind} kernel: {problem}"
        raise UserError(f"--op {op} is not possible: {problem}: use --op torch")
    if kind == "cpu":
        return "cpu", f"{operator}: C++ kernel with {CPU_LEVELS[native.library(operator).wkv_get_level()]}"
    asked = ("cuda-exact", "sequential, as asked")
    form, kernels = asked if op == "cuda-exact" else _fastest(device, operator, N, dtype)
    return form, f"{operator}: CUDA kernels on {torch.cuda.get_device_name(device)}: {kernels}"


def _fastest(device: torch.device, operator: str, N: int, dtype: torch.dtype) -> tuple[str, str]:
    """("cuda" or "cuda-exact", which kernels that means), on a device where the sequential kernels work."""
    if dtype not in choice.DTYPES["chunked"]:
        return "cuda", f"sequential, since the numbers are {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if obstacle := choice.obstacle("chunked", N, capability):
        return "cuda", f"sequential: {obstacle}"
    for label in dict.fromkeys(rule.kernels for rule in choice.rules(operator, N, capability)):
        if chunking(label) and (problem := _trial_problem(device, operator, N, dtype, f"cuda-{label}")):
            return "cuda-exact", f"sequential, slower than those for tensor cores: {problem}"
    return "cuda", choice.describe(operator, N, capability, torch.cuda.get_device_name(device))


def _chunked(op: str, device: torch.device, operator: str, N: int, dtype: torch.dtype) -> tuple[str, str]:
    """What select_op returns for an explicit choice of chunked kernels."""
    chunked = chunking(choice.labels(op, operator, dtype, N)[0])
    assert chunked
    if dtype not in choice.DTYPES[chunked.mode]:
        found = str(dtype).removeprefix("torch.")
        raise UserError(f"--op {op} takes bfloat16, found {found}: use --op cuda-accurate or --op cuda-exact")
    problem = choice.obstacle(chunked.mode, N, torch.cuda.get_device_capability(device), chunked.tokens)
    if problem := problem or _trial_problem(device, operator, N, dtype, op):
        raise UserError(f"--op {op} is not possible: {problem}: use --op cuda-exact")
    products = "one product" if chunked.mode == "chunked" else "three products"
    kernels = f"tensor cores in chunks of {chunked.tokens} tokens, {products} each, as asked"
    return op, f"{operator}: CUDA kernels on {torch.cuda.get_device_name(device)}: {kernels}"


def _sequential_problem(device: torch.device, operator: str, N: int, dtype: torch.dtype) -> str:
    """Why the device's sequential kernels cannot be used, in words; nothing if they can."""
    kind = device.type
    if kind == "cpu" and N % 8 or kind == "cuda" and N not in HEAD_SIZES:
        wanted = "a multiple of 8" if kind == "cpu" else f"one of {', '.join(map(str, HEAD_SIZES))}"
        return f"the head size must be {wanted}, found {N}"
    return _trial_problem(device, operator, N, dtype, "cpu" if kind == "cpu" else "cuda-exact")


def _trial_problem(device: torch.device, operator: str, N: int, dtype: torch.dtype, form: str) -> str:
    from rwkv_bone.ops.trial import trial  # which imports the operators, and they this module

    try:
        trial(operator, device, N, dtype, form)
    except (BuildError, DriverError, torch.AcceleratorError) as problem:
        return str(problem)
    return ""
