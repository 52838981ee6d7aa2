"""WKV operators, each in several forms with one meaning, and the choice between the forms.

    reference   the recurrence step by step: the definition (ops/reference.py)
    torch       chunked PyTorch, on any device (ops/chunked.py, ops/chunked6.py)
    cpu         C++ for the processor (cuda/cpu/)
    cuda        CUDA (cuda/)

The last two are compiled on first use and tried once before anything relies on them.
"""

from __future__ import annotations

import functools

import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.driver import DriverError
from rwkv_bone.ops.launches import HEAD_SIZES

CHOICES = ("auto", "cuda", "cpu", "torch", "reference")
CPU_LEVELS = ("portable vectors", "AVX2", "AVX-512")


def select_op(
    op: str, device: torch.device, operator: str = "wkv7", N: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[str, str]:
    """(the form to use for head size N and this dtype, one sentence for the user).

    Builds the kernel if there is one to build, and tries it. "auto" takes the fastest form that works and says what is
    in the way if that is a slow one. An explicit choice that cannot be had raises UserError.
    """
    return _select(op, device, operator, N, dtype)


@functools.cache
def _select(op: str, device: torch.device, operator: str, N: int, dtype: torch.dtype) -> tuple[str, str]:
    if op not in CHOICES:
        raise UserError(f"--op: expected one of {', '.join(CHOICES)}, found {op!r}")
    kind = device.type
    if op == "torch":
        return "torch", f"{operator}: chunked PyTorch on {kind}, as asked"
    if op == "reference":
        return "reference", f"{operator}: the reference loop on {kind}, as asked; slow, meant for tests"
    if op == "auto" and kind not in ("cpu", "cuda"):
        return "torch", f"{operator}: chunked PyTorch, since there is no compiled kernel for {kind}"
    if op != "auto" and op != kind:
        raise UserError(f"--op {op} needs the model on {op}, but it is on {kind}: use --op auto")
    if problem := _problem(kind, device, operator, N, dtype):
        if op == "auto":
            return "torch", f"{operator}: chunked PyTorch, slower than the compiled {kind} kernel: {problem}"
        raise UserError(f"--op {op} is not possible: {problem}: use --op torch")
    if kind == "cpu":
        return "cpu", f"{operator}: C++ kernel with {CPU_LEVELS[native.library(operator).wkv_get_level()]}"
    return "cuda", f"{operator}: CUDA kernel on {torch.cuda.get_device_name(device)}"


def _problem(kind: str, device: torch.device, operator: str, N: int, dtype: torch.dtype) -> str:
    """Why the compiled kernel cannot be used, in words; nothing if it can."""
    from rwkv_bone.ops.trial import trial  # which imports the operators, and they this module

    if kind == "cpu" and N % 8 or kind == "cuda" and N not in HEAD_SIZES:
        wanted = "a multiple of 8" if kind == "cpu" else f"one of {', '.join(map(str, HEAD_SIZES))}"
        return f"the head size must be {wanted}, found {N}"
    try:
        trial(operator, device, N, dtype)
    except (BuildError, DriverError, torch.AcceleratorError) as problem:
        return str(problem)
    return ""
