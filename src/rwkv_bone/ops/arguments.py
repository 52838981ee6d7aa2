"""What every WKV operator asks of its arguments, before any form of it runs.

Sizes: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from rwkv_bone.errors import UserError
from rwkv_bone.ops import select_op

CUDA_HEAD_SIZES = (8, 16, 32, 64, 128)
ANY_DTYPE = ("w", "u", "state")  # computed with in float32 whatever they come as


def check(operator: str, *, r: Tensor, state: Tensor | None, per_head: Sequence[str] = (), **others: Tensor) -> None:
    """Raises UserError naming the first argument that does not fit r [B, T, H, N] in shape, device or dtype.

    Of the others, those in `per_head` must be [H, N], the rest like r; the state, if there is one, [B, H, N, N].
    """
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(f"{operator}: r must be [B, T, H, N] with no size 0, found {list(r.shape)}")
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UserError(f"{operator}: r must be float32, bfloat16 or float64, found {r.dtype}")
    like, (B, _, H, N) = list(r.shape), r.shape
    shapes = {name: (x, [H, N] if name in per_head else like) for name, x in others.items()}
    if state is not None:
        shapes["state"] = (state, [B, H, N, N])
    for name, (x, expected) in shapes.items():
        if list(x.shape) != expected:
            raise UserError(f"{operator}: {name} must be {expected} to fit r {like}, found {list(x.shape)}")
        if x.device != r.device:
            raise UserError(f"{operator}: {name} must be on {r.device} like r, found it on {x.device}")
        if name not in ANY_DTYPE and x.dtype != r.dtype:
            raise UserError(f"{operator}: {name} must be {r.dtype} like r, found {x.dtype}")


# Building and loading are not for torch.compile to trace.
@assume_constant_result
def choose_form(operator: str, op: str, device_type: str, float64: bool, N: int) -> str:
    """The form of the operator that takes such arguments: see select_op. Raises UserError if `op` cannot take them."""
    if float64 and op == "auto":
        return "torch"
    form, _ = select_op(op, torch.device(device_type), operator)
    if form in ("cpu", "cuda"):
        if float64:
            raise UserError(f"--op {form} takes float32 and bfloat16, found float64: use --op torch")
        if form == "cpu" and N % 8 or form == "cuda" and N not in CUDA_HEAD_SIZES:
            takes = "a multiple of 8" if form == "cpu" else f"one of {', '.join(map(str, CUDA_HEAD_SIZES))}"
            raise UserError(f"--op {form} needs a head size that is {takes}, found {N}: use --op torch")
    return form
