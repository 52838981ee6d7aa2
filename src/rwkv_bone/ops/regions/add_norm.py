"""The residual stream and the LayerNorm of it, differentiable. For backward it keeps the sum alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions import recurrence, twins


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, op: str
) -> tuple[Tensor, Tensor]:
    """(x + branch, LayerNorm of it): x and branch [..., C], weight and bias [C]. op: as in regions.form."""
    if x.dtype != branch.dtype or regions.form(op, x) is twins:  # under autocast they may differ
        total = x + branch
        return total, F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)
    return _AddNorm.apply(x, branch, weight, bias, eps, op)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, op: str
    ) -> tuple[Tensor, Tensor]:
        total, norm = regions.form(op, x).add_norm_forward(x, branch, *recurrence.vectors((weight, bias), x), eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.op = eps, op
        return total, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_norm: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        _, _, need_weight, need_bias, _, _ = ctx.needs_input_grad
        dx, d_weight, d_bias = regions.form(ctx.op, total).add_norm_backward(
            total, *recurrence.vectors((weight,), total), ctx.eps, d_total, d_norm, need_weight or need_bias
        )
        d_weight = recurrence.summed(d_weight, weight, need_weight)
        return dx, dx, d_weight, recurrence.summed(d_bias, weight, need_bias), None, None
