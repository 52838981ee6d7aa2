"""The step between the projections, a region at a time: what is done to activations where no matrix is multiplied.

A region is a pair of plain functions on tensors, forward and backward, which know nothing of autograd. There are two
forms of each, with one signature and one meaning:

    twins.py      PyTorch, any dtype, any device: the definition
    compiled.py   C++ for the processor, CUDA for a GPU: one pass over the memory; float32 and bfloat16

mix.py, relu_square.py, gated_norm.py and time_mix7.py make autograd functions of them, which keep for backward as
little as they can.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rwkv_bone.ops.regions import compiled, twins

PLAIN = ("torch", "reference")  # forms of the WKV operators that are PyTorch, whose regions are so too


def form(op: str, x: Tensor, N: int = 1) -> ModuleType:
    """The module, `compiled` or `twins`, for activations like x in heads of N channels, in a model whose --op is `op`.

    Compiled regions are compared with their twins once before anything relies on them.
    """
    if op in PLAIN or problem(x.device.type, x.dtype, N):
        return twins
    return compiled


def obstacle(op: str, device_type: str, dtype: torch.dtype, N: int) -> str:
    """What the user should know, in words that follow those about `op`: nothing if the compiled regions are taken."""
    if op in PLAIN:
        return ""
    reason = problem(device_type, dtype, 1) or problem(device_type, dtype, N)
    return f"; PyTorch between the projections, slower than the kernels: {reason}" if reason else ""


def problem(device_type: str, dtype: torch.dtype, N: int) -> str:
    """Why the compiled regions cannot be used for such a model, in words; nothing if they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return compiled.problem(torch.device(device_type), dtype, N)


# Building and loading are not for torch.compile to trace: see ops/arguments.py.
vars(problem)["_dynamo_marked_constant"] = True
