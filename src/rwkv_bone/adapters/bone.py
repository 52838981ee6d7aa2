"""Bone (DiSHA; `miss` in Hugging Face PEFT): one block D [r, out], repeated along the inputs.

    W'[o, j] = W[o, j] + D[j mod r, o]

W' is never built. Applied to the activations instead, the update costs about r/in of the frozen linear, and no tensor
has the weight's size:

    y  = x W^T + S D        S[t, k] = sum over blocks b of x[t, b r + k]
    dD = S^T g              g = dL/dy
    dx = g W + tile(g D^T)

r need not divide in_features: the last block is then shorter. Function and tensor are those of RWKV-PEFT's BoneLinear
(since 2024-11-28) and of PEFT's default MiSS. Bone is also a LoRA of rank r, whose A is a frozen row of identities.

Sizes: T tokens, r block size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.adapters.blockwise import fold, tile_add_, token_product
from rwkv_bone.adapters.layer import AdapterLinear, Tensors, check_block, compute_dtype, weight_grads
from rwkv_bone.adapters.settings import AdapterSettings


class BoneFunction(torch.autograd.Function):
    """x [T, in], weight [out, in], bias [out] or None, bone [r, out] -> y [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor) -> Tensor:
        sums = fold(x, bone.shape[0])  # [T, r]
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(sums, bone.to(x.dtype))
        ctx.save_for_backward(sums, weight, bias, bone, x if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        sums, weight, bias, bone, x = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad
        grad_x = grad_bone = None
        if need_x:
            grad_x = g @ weight.to(g.dtype)
            tile_add_(grad_x, g @ bone.to(g.dtype).t())
        if need_bone:
            grad_bone = token_product(sums, g)
        return grad_x, *weight_grads(g, x, weight, bias, (need_weight, need_bias)), grad_bone


class BoneUpdateFunction(torch.autograd.Function):
    """y [T, out], which any projection made of x [T, in], and bone [r, out] -> y + S D."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, bone: Tensor) -> Tensor:
        sums = fold(x, bone.shape[0])
        ctx.save_for_backward(sums, bone)
        ctx.in_features = x.shape[1]
        return torch.addmm(y, sums, bone.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        sums, bone = ctx.saved_tensors
        need_y, need_x, need_bone = ctx.needs_input_grad
        grad_x = None
        if need_x:
            grad_x = tile_add_(g.new_zeros(len(g), ctx.in_features), g @ bone.to(g.dtype).t())
        return g if need_y else None, grad_x, token_product(sums, g) if need_bone else None


class BoneLinear(AdapterLinear):
    """y = x (W + tile(D^T))^T + bias, with D = `bone` [r, out]."""

    parameter_names = ("bone",)
    keeps_input = False

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        return {"bone": (settings.r, out_features)}

    @staticmethod
    def forward_fused(
        x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings
    ) -> Tensor:
        return BoneFunction.apply(x, weight, bias, tensors["bone"])

    @staticmethod
    def forward_wrapped(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        return BoneUpdateFunction.apply(base(x), x, tensors["bone"])

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        bone = tensors["bone"]
        dtype = compute_dtype(weight, bone)
        tile = bone.t().to(dtype).contiguous()  # in the order in which it is read, again for every block
        return tile_add_(weight.to(dtype, copy=True), tile).to(weight.dtype)

    @staticmethod
    def for_outputs(tensors: Tensors, outputs: slice) -> Tensors | None:
        return {"bone": tensors["bone"][:, outputs]}

    @classmethod
    def check(cls, in_features: int, out_features: int, settings: AdapterSettings, name: str = "") -> None:
        super().check(in_features, out_features, settings, name)
        check_block(in_features, settings.r, name)
