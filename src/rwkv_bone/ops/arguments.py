"""What every WKV operator asks of its arguments, before any form of it runs.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rwkv_bone.errors import UserError
from rwkv_bone.ops import select_op
from rwkv_bone.ops.register import constant

ANY_DTYPE = ("w", "w0", "u", "state")  # computed with in float32 whatever they come as


def check(
    operator: str,
    *,
    r: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    per_head: Sequence[str] = (),
    **others: Tensor,
) -> None:
    """Raises UserError naming the first argument that does not fit r [B, T, H, N] in shape, device or dtype.

    Of the others, those in `per_head` must be [H, N], the rest like r; the state, if there is one, [B, H, N, N], or
    [D, H, N, N] with `cu_seqlens`.
    """
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(f"{operator}: r must be [B, T, H, N] with no size 0, found {list(r.shape)}")
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UserError(f"{operator}: r must be float32, bfloat16 or float64, found {r.dtype}")
    like, (_, _, H, N) = list(r.shape), r.shape
    if cu_seqlens is not None:
        _check_documents(operator, r, cu_seqlens)
    shapes = {name: (x, [H, N] if name in per_head else like) for name, x in others.items()}
    if state is not None:
        shapes["state"] = (state, [sequences(r, cu_seqlens), H, N, N])
    for name, (x, expected) in shapes.items():
        if list(x.shape) != expected:
            raise UserError(f"{operator}: {name} must be {expected} to fit r {like}, found {list(x.shape)}")
        if x.device != r.device:
            raise UserError(f"{operator}: {name} must be on {r.device} like r, found it on {x.device}")
        if name not in ANY_DTYPE and x.dtype != r.dtype:
            raise UserError(f"{operator}: {name} must be {r.dtype} like r, found {x.dtype}")


def sequences(r: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states there are: B, or D with packed documents."""
    return r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _check_documents(operator: str, r: Tensor, cu_seqlens: Tensor) -> None:
    B, T = r.shape[:2]
    if B != 1:
        raise UserError(f"{operator}: with cu_seqlens all documents are in one row, B = 1, found r {list(r.shape)}")
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise UserError(
            f"{operator}: cu_seqlens must be int64 [documents + 1], found {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != r.device:
        raise UserError(f"{operator}: cu_seqlens must be on {r.device} like r, found it on {cu_seqlens.device}")
    # Looking at values on a GPU would wait for it, and torch.compile has none to look at.
    if cu_seqlens.device.type == "cpu" and not is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != T or any(a >= b for a, b in zip(offsets, offsets[1:], strict=False)):
            found = ", ".join(map(str, offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]))
            raise UserError(f"{operator}: cu_seqlens must rise from 0 to the number of tokens {T}, found {found}")


@constant
def choose_form(operator: str, op: str, device_type: str, dtype: torch.dtype, N: int) -> str:
    """The form of the operator that takes such arguments: see select_op. Raises UserError if `op` cannot take them."""
    if dtype == torch.float64:
        if op not in ("auto", "torch", "reference"):
            raise UserError(f"--op {op} takes float32 and bfloat16, found float64: use --op torch")
        dtype, op = torch.float32, "torch" if op == "auto" else op
    return select_op(op, torch.device(device_type), operator, N, dtype)[0]
