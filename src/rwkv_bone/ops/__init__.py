"""WKV operators, each in several forms with one meaning, and the choice between the forms.

    reference   the recurrence step by step: the definition (ops/reference.py)
    torch       chunked PyTorch, on any device (ops/chunked.py, ops/chunked6.py)
    cpu         C++ for the processor (cuda/cpu/)
    cuda        CUDA (cuda/)

The last two are compiled on first use.
"""

from __future__ import annotations

import functools

import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError

CHOICES = ("auto", "cuda", "cpu", "torch", "reference")
CPU_LEVELS = ("portable vectors", "AVX2", "AVX-512")


@functools.cache
def select_op(op: str, device: torch.device, operator: str = "wkv7") -> tuple[str, str]:
    """(the form to use, one sentence for the user). Builds the kernel if there is one to build.

    "auto" takes the fastest form that works and says what is missing if that is a slow one. An explicit choice that
    cannot be had raises UserError.
    """
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
    try:
        library = native.library(operator, kind)
    except BuildError as problem:
        if op == "auto":
            return "torch", f"{operator}: chunked PyTorch, slower than the compiled {kind} kernel: {problem}"
        raise UserError(f"--op {op} is not possible: {problem}") from problem
    if kind == "cpu":
        return "cpu", f"{operator}: C++ kernel with {CPU_LEVELS[library.wkv_get_level()]}"
    return "cuda", f"{operator}: CUDA kernel on {torch.cuda.get_device_name(device)}"
