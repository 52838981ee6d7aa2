"""relu(h)^2, differentiable. For backward it keeps h alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions.rebuild import Recipe


def relu_square(h: Tensor, op: str) -> Tensor:
    """relu(h)^2, of any shape. op: as in regions.form."""
    return _ReluSquare.apply(h, op)


def relu_square_recipe(h: Tensor, made: Tensor, op: str) -> Recipe:
    """How to make what `relu_square` gave from h again."""
    return Recipe(made, (h,), lambda h: regions.form(op, h).relu_square_forward(h))


class _ReluSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, op: str) -> Tensor:
        ctx.save_for_backward(h)
        ctx.op = op
        return regions.form(op, h).relu_square_forward(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return regions.form(ctx.op, h).relu_square_backward(h, g), None
