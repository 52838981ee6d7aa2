"""Bat, the row form of RWKV-PEFT: one block D_b [r, r] for each block b of inputs. D is [in/r, r, r].

With W cut into r x r blocks W_ab (outputs a, inputs b):

    W'_ab = W_ab + W_ab D_b + D_b

W' is never built. Applied to the activations instead, the update costs about r/out of the frozen linear, and no tensor
has the weight's size:

    z_b  = x_b D_b^T,   s = sum over b of z_b
    y    = (x + z) W^T + tile(s)
    gu   = g W          g = dL/dy
    gz_b = gu_b + sum over blocks a of g_a
    dx_b = gu_b + gz_b D_b
    dD_b = gz_b^T x_b

Around a projection that can only be called, base(u) = u W^T, it is base(x + z) + tile(s).

This is not Hugging Face PEFT's `bat`, which has a block for each block of outputs (`bat_col.py`). On a square weight
both have a tensor of the same shape, but they are different functions, and neither can be converted into the other.

Sizes: T tokens, r block size. Blocked activations are [in/r, T, r], views of [T, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from rwkv_bone.adapters.blockwise import block_view, fold, tile_add_, token_chunks
from rwkv_bone.adapters.layer import AdapterLinear, Tensors, check_block, compute_dtype, weight_grads
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.errors import UserError

# Some batched products copy their operands. For a chunk of the tokens that copy is small.
TOKEN_CHUNKS = 24


def rotate(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """(x + z [T, in], s [T, r]) of the formulas above, allocating one tensor of the size of x and no other."""
    return _rotate_op(x, bone) if is_compiling() else _chunked_rotate(x, bone)


def rotate_backward_(grad: Tensor, grad_sums: Tensor, x: Tensor, bone: Tensor, need_bone: bool) -> Tensor | None:
    """Turn gu [T, in] into dx in place, given the gradient [T, r] of s, and return dD [in/r, r, r] if it is needed."""
    backward = _rotate_backward_op if is_compiling() else _chunked_rotate_backward
    grad_bone = backward(grad, grad_sums, x, bone, need_bone)
    return grad_bone if need_bone else None


def _chunked_rotate(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    r = bone.shape[1]
    transposed = bone.to(x.dtype).transpose(1, 2)
    rotated, sums = _empty_rotate(x, bone)
    for rows in token_chunks(x, TOKEN_CHUNKS):
        # All steps of one chunk before the next chunk: it is then still in the cache.
        torch.bmm(block_view(x[rows], r), transposed, out=block_view(rotated[rows], r))
        sums[rows] = fold(rotated[rows], r)
        rotated[rows] += x[rows]
    return rotated, sums


def _chunked_rotate_backward(grad: Tensor, grad_sums: Tensor, x: Tensor, bone: Tensor, need_bone: bool) -> Tensor:
    r, block_weights = bone.shape[1], bone.to(grad.dtype)
    grad_bone = _empty_rotate_backward(grad, grad_sums, x, bone, need_bone).zero_()
    for rows in token_chunks(grad, TOKEN_CHUNKS):
        part = block_view(grad[rows], r)
        # A contiguous copy, which `part + sums` would not be: bf16 products of strided batches take twice as long.
        # The copy comes first and the sum after it, since one operation that does both is far slower.
        grad_z = part.clone(memory_format=torch.contiguous_format)
        grad_z += grad_sums[rows]
        if need_bone:
            grad_bone += grad_z.transpose(1, 2) @ block_view(x[rows], r)
        part.baddbmm_(grad_z, block_weights)
    return grad_bone


# Operators of their own for torch.compile, which refuses a product into a view and would unroll the loops over tokens.
_rotate_op = torch.library.custom_op("rwkv_bone::bat_rotate", _chunked_rotate, mutates_args=())
_rotate_backward_op = torch.library.custom_op(
    "rwkv_bone::bat_rotate_backward", _chunked_rotate_backward, mutates_args=("grad",)
)


@_rotate_op.register_fake
def _empty_rotate(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], bone.shape[1])


@_rotate_backward_op.register_fake
def _empty_rotate_backward(grad: Tensor, grad_sums: Tensor, x: Tensor, bone: Tensor, need_bone: bool) -> Tensor:
    return bone.new_empty(bone.shape if need_bone else 0, dtype=compute_dtype(bone))


class BatFunction(torch.autograd.Function):
    """x [T, in], weight [out, in], bias [out] or None, bone [in/r, r, r] -> y [T, out]. Keeps only x for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, bone)
        rotated, sums = rotate(x, bone)
        y = F.linear(rotated, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return tile_add_(y, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad
        grad_x = grad_bone = None
        if need_x or need_bone:
            grad_x = g @ weight.to(g.dtype)
            grad_bone = rotate_backward_(grad_x, fold(g, bone.shape[1]), x, bone, need_bone)
        rotated = rotate(x, bone)[0] if need_weight else None
        grads = weight_grads(g, rotated, weight, bias, (need_weight, need_bias))
        return grad_x if need_x else None, *grads, grad_bone


class RotateFunction(torch.autograd.Function):
    """x [T, in], bone [in/r, r, r] -> (x + z [T, in], s [T, r]). Keeps only x for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, bone)
        return rotate(x, bone)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bone = ctx.saved_tensors
        grad_x = g.clone()
        grad_bone = rotate_backward_(grad_x, grad_sums, x, bone, ctx.needs_input_grad[1])
        return grad_x if ctx.needs_input_grad[0] else None, grad_bone


class BatLinear(AdapterLinear):
    """y = x W'^T + bias, with D = `bone` [in/r, r, r]. r must divide in_features and out_features."""

    parameter_names = ("bone",)

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        return {"bone": (in_features // settings.r, settings.r, settings.r)}

    @staticmethod
    def forward_fused(
        x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings
    ) -> Tensor:
        return BatFunction.apply(x, weight, bias, tensors["bone"])

    @staticmethod
    def forward_wrapped(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        rotated, sums = RotateFunction.apply(x, tensors["bone"])
        return (base(rotated).unflatten(1, (-1, settings.r)) + sums[:, None]).flatten(1)

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        dtype, r = compute_dtype(weight, tensors["bone"]), settings.r
        old, d = weight.to(dtype), tensors["bone"].to(dtype)
        new = block_view(old, r).baddbmm(block_view(old, r), d)  # [in/r, out, r]
        new.unflatten(1, (-1, r)).add_(d[:, None])
        return new.transpose(0, 1).reshape(weight.shape).to(weight.dtype)

    @classmethod
    def check(cls, in_features: int, out_features: int, settings: AdapterSettings, name: str = "") -> None:
        super().check(in_features, out_features, settings, name)
        check_block(in_features, settings.r, name)
        if in_features % settings.r or out_features % settings.r:
            common = math.gcd(in_features, out_features)
            best = max(size for size in range(1, min(settings.r, common) + 1) if common % size == 0)
            raise UserError(
                f"--bone_r {settings.r} does not divide both sizes of {name or 'a layer'}, {in_features} inputs and "
                f"{out_features} outputs, as {settings.kind} needs: use --bone_r {best}, or --bone_mode bone, which "
                "takes any r"
            )
