"""Bone (DiSHA; `miss` in Hugging Face PEFT): one block D [r, out], repeated along the inputs.

    W'[o, j] = W[o, j] + D[j mod r, o]

Written on the side of the activations it costs about r/in of the frozen linear, and no tensor has the weight's size:

    y  = x W^T + S D        S[t, k] = sum over blocks b of x[t, b r + k]
    dD = S^T g              g = dL/dy
    dx = g W + tile(g D^T)

r need not divide in_features: the last block is then cut short. The same function and tensor as RWKV-PEFT's BoneLinear
(2024-11-28 on) and PEFT's default MiSS; it is a LoRA of rank r whose A is a frozen row of identities.

Sizes: T tokens, r block size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.adapters.blocks import fold, tile_add_, token_chunks
from rwkv_bone.adapters.layer import AdapterLinear, compute_dtype, weight_grads


class BoneFunction(torch.autograd.Function):
    """x [T, in], weight [out, in], bias [out] or None, bone [r, out] -> y [T, out]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor) -> Tensor:
        sums = fold(x, bone.shape[0])  # [T, r]
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(sums, bone.to(x.dtype))
        ctx.save_for_backward(sums, weight, bias, bone, x if ctx.needs_input_grad[1] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        sums, weight, bias, bone, x = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad
        grad_x = grad_bone = None
        if need_x:
            grad_x = g @ weight.to(g.dtype)
            tile_add_(grad_x, g @ bone.to(g.dtype).t())
        if need_bone:
            grad_bone = torch.zeros_like(bone, dtype=compute_dtype(bone))
            # A product of bf16 matrices is bf16; sums of a few of them in fp32 keep what one product would round away.
            for rows in token_chunks(g, 8):
                grad_bone += sums[rows].t() @ g[rows]
        return grad_x, *weight_grads(g, x, weight, bias, (need_weight, need_bias)), grad_bone


class BoneLinear(AdapterLinear):
    """y = x (W + tile(D^T))^T + bias, with D = `bone` [r, out]."""

    function = BoneFunction

    @staticmethod
    def bone_shape(in_features: int, out_features: int, r: int) -> tuple[int, int]:
        return r, out_features

    @staticmethod
    def merged(weight: Tensor, bone: Tensor) -> Tensor:
        dtype = compute_dtype(weight, bone)
        return tile_add_(weight.to(dtype, copy=True), bone.t().to(dtype)).to(weight.dtype)
