"""Bat, the row form of RWKV-PEFT: one block D_b [r, r] for each block b of inputs. D is [in/r, r, r].

With W cut into r x r blocks W_ab (outputs a, inputs b):

    W'_ab = W_ab + W_ab D_b + D_b

Written on the side of the activations it costs about r/out of the frozen linear, and no tensor has the weight's size:

    z_b  = x_b D_b^T,   s = sum over b of z_b
    y    = (x + z) W^T + tile(s)
    gu   = g W          g = dL/dy
    gz_b = gu_b + sum over blocks a of g_a
    dx_b = gu_b + gz_b D_b
    dD_b = gz_b^T x_b

Not Hugging Face PEFT's `bat`, whose blocks follow the outputs: on square weights its tensor has the same shape and
computes something else, and no exact conversion exists.

Sizes: T tokens, r block size. Blocked activations are [in/r, T, r], views of [T, in].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.adapters.blocks import blocks, fold, tile_add_, token_chunks
from rwkv_bone.adapters.layer import AdapterLinear, compute_dtype, weight_grads
from rwkv_bone.errors import UserError

# Some batched products copy their operands: in chunks, those copies are small.
TOKEN_CHUNKS = 24


def rotate(x: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """(x + z [T, in], s [T, r]) of the formulas above, with one new activation and no other of that size."""
    r = bone.shape[1]
    transposed = bone.to(x.dtype).transpose(1, 2)
    rotated, sums = x.new_empty(x.shape), x.new_empty(x.shape[0], r)
    for rows in token_chunks(x, TOKEN_CHUNKS):
        # All of a chunk at once, while it is in the cache.
        torch.bmm(blocks(x[rows], r), transposed, out=blocks(rotated[rows], r))
        sums[rows] = fold(rotated[rows], r)
        rotated[rows] += x[rows]
    return rotated, sums


class BatFunction(torch.autograd.Function):
    """x [T, in], weight [out, in], bias [out] or None, bone [in/r, r, r] -> y [T, out]. Saves x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, bone)
        rotated, sums = rotate(x, bone)
        y = F.linear(rotated, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return tile_add_(y, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, bias, bone = ctx.saved_tensors
        need_x, need_weight, need_bias, need_bone = ctx.needs_input_grad
        grad_x = grad_bone = None
        if need_x or need_bone:
            r, block_weights = bone.shape[1], bone.to(g.dtype)
            grad_x = g @ weight.to(g.dtype)
            sums = fold(g, r)
            grad_bone = torch.zeros_like(bone, dtype=compute_dtype(bone))
            for rows in token_chunks(g, TOKEN_CHUNKS):
                part = blocks(grad_x[rows], r)
                # Contiguous, which `part + sums` would not be: bf16 products of strided batches are twice as slow. In
                # two steps, since adding and rearranging in one is far slower than both.
                grad_z = part.clone(memory_format=torch.contiguous_format)
                grad_z += sums[rows]
                if need_bone:
                    grad_bone += grad_z.transpose(1, 2) @ blocks(x[rows], r)
                part.baddbmm_(grad_z, block_weights)
        rotated = rotate(x, bone)[0] if need_weight else None
        grads = weight_grads(g, rotated, weight, bias, (need_weight, need_bias))
        return grad_x if need_x else None, *grads, grad_bone if need_bone else None


class BatLinear(AdapterLinear):
    """y = x W'^T + bias, with D = `bone` [in/r, r, r]. r must divide in_features and out_features."""

    function = BatFunction

    @staticmethod
    def bone_shape(in_features: int, out_features: int, r: int) -> tuple[int, int, int]:
        return in_features // r, r, r

    @classmethod
    def check(cls, in_features: int, out_features: int, r: int, name: str = "") -> None:
        super().check(in_features, out_features, r, name)
        if in_features % r or out_features % r:
            common = math.gcd(in_features, out_features)
            best = max(size for size in range(1, min(r, common) + 1) if common % size == 0)
            raise UserError(
                f"--bone_r {r} does not divide both sizes of {name or 'a layer'}, {in_features} inputs and "
                f"{out_features} outputs, as bat needs: use --bone_r {best}, or --bone_mode bone, which takes any r"
            )

    @staticmethod
    def merged(weight: Tensor, bone: Tensor) -> Tensor:
        dtype, r = compute_dtype(weight, bone), bone.shape[1]
        old, d = weight.to(dtype), bone.to(dtype)
        new = blocks(old, r).baddbmm(blocks(old, r), d)  # [in/r, out, r]
        new.unflatten(1, (-1, r)).add_(d[:, None])
        return new.transpose(0, 1).reshape(weight.shape).to(weight.dtype)
