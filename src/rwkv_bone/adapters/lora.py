"""LoRA and PiSSA: a low-rank product B A beside the frozen weight, A [r, in], B [out, r].

    W' = W + s B A                 s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    y  = x W^T + s h B^T           h = x A^T [T, r]
    dB = s g^T h                   g = dL/dy
    dA = gh^T x                    gh = s g B [T, r]
    dx = g W + gh A

LoRA starts from B = 0 and a random A. PiSSA starts from the r principal components of W, s B0 A0, and subtracts them
from the base: y = x (W - s B0 A0)^T + s x A^T B^T. Here the base stays as it is, and the same function is written as

    W' = W + s (B A - B0 A0) = W + s (B (A - A0) + (B - B0) A0)

This is a LoRA of rank 2r with the factors A2 = [A - A0; A0] and B2 = [B, B - B0], and A and B have LoRA's gradients. It
equals PiSSA, and in half precision it is more exact. A base W - s B0 A0 would be rounded once more. A and B stay close
to A0 and B0, so rounding them would lose most of what was learnt; their differences are taken in fp32, are exactly
zero at the start, and only then rounded. A0 and B0 are stored with the adapter (`init_lora_A`, `init_lora_B`): nothing
has to compute them a second time.

Sizes: T tokens, r rank, k = r or 2r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.adapters.blockwise import token_product
from rwkv_bone.adapters.layer import AdapterLinear, Tensors, compute_dtype, weight_grads, weight_of
from rwkv_bone.adapters.settings import AdapterSettings
from rwkv_bone.errors import UserError

# Up to this size of its smaller dimension a weight is decomposed exactly, beyond it by random projections.
EXACT_SVD = 512
OVERSAMPLING, ITERATIONS = 8, 8


def factor_a(a: Tensor, a0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A2 [k, in] in dtype: with `factor_b`, B2 A2 = B A - B0 A0, or = B A without A0 and B0."""
    # Each part is rounded before they are joined, so that nothing of A2's size is there in fp32.
    return a.to(dtype) if a0 is None else torch.cat([(a - a0).to(dtype), a0.to(dtype)])


def factor_b(b: Tensor, b0: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """s B2 [out, k] in dtype."""
    parts = [b] if b0 is None else [b, b - b0]
    scaled = [(part * scale).to(dtype) for part in parts]
    return scaled[0] if b0 is None else torch.cat(scaled, dim=1)


def low_rank(x: Tensor, a2: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(x A2^T [T, k], h [T, r], which is for backward)."""
    inner = x @ a2.t()
    return inner, inner if inner.shape[1] == r else inner[:, :r] + inner[:, r:]


def low_rank_backward(
    g: Tensor, x: Tensor, h: Tensor, b2: Tensor, scale: float, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(s g B2 [T, k], dA or None, dB or None), given s B2."""
    r = h.shape[1]
    grad_inner = g @ b2
    grad_a = token_product(grad_inner[:, :r], x) if need_a else None
    grad_b = token_product(g, h).mul_(scale) if need_b else None
    return grad_inner, grad_a, grad_b


class LowRankFunction(torch.autograd.Function):
    """x [T, in], weight [out, in], bias or None, scale, A [r, in], B [out, r], A0, B0 or None -> y [T, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
    ) -> Tensor:
        inner, h = low_rank(x, factor_a(a, a0, x.dtype), len(a))
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(inner, factor_b(b, b0, scale, x.dtype).t())
        ctx.save_for_backward(x, h, weight, bias, a, b, a0, b0)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, bias, a, b, a0, b0 = ctx.saved_tensors
        need_x, need_weight, need_bias, _, need_a, need_b, _, _ = ctx.needs_input_grad
        b2 = factor_b(b, b0, ctx.scale, g.dtype)
        grad_inner, grad_a, grad_b = low_rank_backward(g, x, h, b2, ctx.scale, need_a, need_b)
        del b2
        grad_x = (g @ weight.to(g.dtype)).addmm_(grad_inner, factor_a(a, a0, g.dtype)) if need_x else None
        grads = weight_grads(g, x, weight, bias, (need_weight, need_bias))
        return grad_x, *grads, None, grad_a, grad_b, None, None


class LowRankUpdateFunction(torch.autograd.Function):
    """y [T, out], which any projection made of x; x [T, in], then as above -> y + s x A2^T B2^T."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        scale: float,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
    ) -> Tensor:
        inner, h = low_rank(x, factor_a(a, a0, x.dtype), len(a))
        ctx.save_for_backward(x, h, a, b, a0, b0)
        ctx.scale = scale
        return torch.addmm(y, inner, factor_b(b, b0, scale, x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b, a0, b0 = ctx.saved_tensors
        need_y, need_x, _, need_a, need_b, _, _ = ctx.needs_input_grad
        b2 = factor_b(b, b0, ctx.scale, g.dtype)
        grad_inner, grad_a, grad_b = low_rank_backward(g, x, h, b2, ctx.scale, need_a, need_b)
        grad_x = grad_inner @ factor_a(a, a0, g.dtype) if need_x else None
        return g if need_y else None, grad_x, None, grad_a, grad_b, None, None


class LoraLinear(AdapterLinear):
    """y = x W^T + bias + s dropout(x) A^T B^T, with A = `lora_A` [r, in] and B = `lora_B` [out, r]."""

    parameter_names = ("lora_A", "lora_B")
    r_flag = "lora_r"

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (settings.r, in_features), "lora_B": (out_features, settings.r)}

    def initialise(self, generator: torch.Generator | None) -> None:
        # Drawn on the CPU, so that a device does not change the numbers.
        lora_a = self.tensors()["lora_A"]
        drawn = torch.empty(lora_a.shape)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        lora_a.copy_(drawn)

    @staticmethod
    def forward_fused(
        x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, settings: AdapterSettings
    ) -> Tensor:
        return LowRankFunction.apply(x, weight, bias, settings.scale, *_in_order(tensors))

    @staticmethod
    def forward_wrapped(
        base: Callable[[Tensor], Tensor], x: Tensor, tensors: Tensors, settings: AdapterSettings, dropout: float
    ) -> Tensor:
        return LowRankUpdateFunction.apply(base(x), F.dropout(x, dropout), settings.scale, *_in_order(tensors))

    @staticmethod
    def merged(weight: Tensor, tensors: Tensors, settings: AdapterSettings) -> Tensor:
        dtype = compute_dtype(weight, *tensors.values())
        a, b, a0, b0 = _in_order(tensors)
        a2, b2 = factor_a(a, a0, dtype), factor_b(b, b0, 1.0, dtype)
        return torch.addmm(weight.to(dtype), b2, a2, alpha=settings.scale).to(weight.dtype)


class PissaLinear(LoraLinear):
    """LoRA that starts from the principal components A0, B0 of W: y = x (W + s (B A - B0 A0))^T + bias."""

    frozen_names = ("init_lora_A", "init_lora_B")
    needs_weight = True

    @staticmethod
    def shapes(in_features: int, out_features: int, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        shapes = LoraLinear.shapes(in_features, out_features, settings)
        return {**shapes, **{f"init_{name}": shape for name, shape in shapes.items()}}

    def initialise(self, generator: torch.Generator | None) -> None:
        weight = weight_of(self if self.base is None else self.base, torch.float32)
        u, s, v = principal_components(weight, self.settings.r, generator)
        root = (s / self.settings.scale).sqrt()
        for name, tensor in (("lora_A", root[:, None] * v), ("lora_B", u * root)):
            getattr(self, name).copy_(tensor)
            getattr(self, f"init_{name}").copy_(tensor)

    @classmethod
    def check(cls, in_features: int, out_features: int, settings: AdapterSettings, name: str = "") -> None:
        super().check(in_features, out_features, settings, name)
        if settings.r > min(in_features, out_features):
            raise UserError(
                f"--lora_r {settings.r}: the weight of {name or 'a layer'}, {out_features} x {in_features}, has "
                f"{min(in_features, out_features)} principal components: use no more"
            )


def principal_components(weight: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, r], S [r], V [r, in]): the r largest singular values of weight [out, in]; approximate if it is large."""
    if min(weight.shape) <= EXACT_SVD:
        with _one_thread():
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :r], s[:r], v[:r]
    seed = int(torch.randint(2**31, (), generator=generator))
    # svd_lowrank draws from the global generator, whose state is put back afterwards.
    with _one_thread(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, min(r + OVERSAMPLING, *weight.shape), ITERATIONS)
    return u[:, :r], s[:r], v[:, :r].t()


@contextmanager
def _one_thread() -> Iterator[None]:
    """On the CPU a decomposition has other last bits, and even signs, with every other number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_order(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(A, B, A0 or None, B0 or None)"""
    return tensors["lora_A"], tensors["lora_B"], tensors.get("init_lora_A"), tensors.get("init_lora_B")
