"""Bat by columns, Hugging Face PEFT's `bat`: one block D_a [r, r] for each block a of outputs. D is [out/r, r, r].

    W'_ab = W_ab + W_ab D_a + D_a        W cut into r x r blocks W_ab (outputs a, inputs b)

Each block of outputs multiplies the inputs by another D_a, so there is no cheap form on the activations as the other
bat has. W' is built for a few blocks of outputs at a time, used, dropped, and built again in backward: no tensor has
the weight's size, and nothing but x is kept for backward.

    y_a   = x W'_a^T
    dx    = sum over a of g_a W'_a                  g = dL/dy
    dD_a  = sum over b of (W_ab + I)^T dW'_ab       dW'_a = g_a^T x, also a few blocks at a time

It takes about 1.5 times as long as the frozen linear alone, since dW' is a product of the weight's size.

A quantised projection must give its weight here, not only be called (`weight_of`): the weight is dequantised once in
forward and once in backward, and dropped each time.

Sizes: T tokens, r block size. Rows of W that belong to n blocks of outputs are [n, r in/r, r], a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from rwkv_bone.adapters.bat import BatLinear
from rwkv_bone.adapters.layer import Projection, Tensors, compute_dtype, weight_grads, weight_of
from rwkv_bone.adapters.settings import AdapterSettings

CHUNK_BLOCKS, CHUNK_ROWS = 8, 512  # W' is built for 8 blocks of outputs at a time, or for 512 rows if those are more


def row_chunks(bone: Tensor) -> Iterator[tuple[slice, slice]]:
    """(blocks of outputs, their rows of the weight) of each chunk."""
    count, r, _ = bone.shape
    step = max(CHUNK_BLOCKS, CHUNK_ROWS // r)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), slice(start * r, stop * r)


def effective(rows: Tensor, d: Tensor) -> Tensor:
    """Rows of W' from the same rows of W, [n r, in], and the blocks d [n, r, r] of their n blocks of outputs."""
    old = rows.reshape(len(d), -1, d.shape[1])
    new = torch.baddbmm(old, old, d)
    new.view(len(d), d.shape[1], -1, d.shape[1]).add_(d[:, :, None])
    return new.view(rows.shape)


class BatColFunction(torch.autograd.Function):
    """x [T, in], weight [out, in] or a quantised projection, bias [out] or None, bone [out/r, r, r] -> y [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Projection, bias: Tensor | None, bone: Tensor) -> Tensor:
        ctx.base = None
        ctx.save_for_backward(x, weight if isinstance(weight, Tensor) else None, bias, bone)
        if not isinstance(weight, Tensor):
            ctx.base, weight = weight, weight_of(weight, x.dtype)
        chunks = (
            (rows, effective(weight[rows].to(x.dtype), bone[part].to(x.dtype))) for part, rows in row_chunks(bone)
        )
        if is_compiling():  # which refuses a product into a view
            y = torch.cat([x @ new.t() for _, new in chunks], dim=1)
        else:
            y = x.new_empty(len(x), len(weight))
            for rows, new in chunks:
                torch.mm(x, new.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad
        if ctx.base is not None:
            weight = weight_of(ctx.base, g.dtype)
        grad_x = torch.zeros_like(x) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bone = torch.empty_like(bone, dtype=compute_dtype(bone)) if need_bone else None
        for part, rows in row_chunks(bone):
            d, old = bone[part].to(g.dtype), weight[rows].to(g.dtype)
            if grad_x is not None:
                grad_x.addmm_(g[:, rows], effective(old, d))
            if grad_weight is None and grad_bone is None:
                continue
            grad_new = (g[:, rows].t() @ x).view(len(d), -1, d.shape[1])
            if grad_bone is not None:
                grad_bone[part] = old.reshape(grad_new.shape).transpose(1, 2) @ grad_new
                grad_bone[part] += grad_new.view(len(d), d.shape[1], -1, d.shape[1]).sum(dim=2)
            if grad_weight is not None:
                grad_weight[rows] = torch.baddbmm(grad_new, grad_new, d.transpose(1, 2)).view(old.shape)
        _, grad_bias = weight_grads(g, None, weight, bias, (False, need_bias))
        return grad_x, grad_weight, grad_bias, grad_bone


class BatColLinear(BatLinear):
    """y = x W'^T + bias, with D = `bone` [out/r, r, r]. r must divide in_features and out_features."""

    needs_weight = True

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        return {"bone": (out_features // settings.r, settings.r, settings.r)}

    @staticmethod
    def forward_fused(
        x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings
    ) -> Tensor:
        return BatColFunction.apply(x, weight, bias, tensors["bone"])

    @staticmethod
    def forward_wrapped(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        return BatColFunction.apply(x, base, getattr(base, "bias", None), tensors["bone"])

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        dtype = compute_dtype(weight, tensors["bone"])
        return effective(weight.to(dtype), tensors["bone"].to(dtype)).to(weight.dtype)
