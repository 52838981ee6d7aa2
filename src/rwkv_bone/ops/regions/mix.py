"""Token shift and lerps, differentiable. For backward they keep x only where their shares are trained.

Sizes: B batch, T tokens, C channels, M mixes, R rank of a low-rank network, k rows of `last`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions.rebuild import Recipe
from rwkv_bone.ops.regions.twins import widened


def mix(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Sequence[Tensor], op: str
) -> tuple[Tensor, ...]:
    """x + (previous - x) share for each of the shares: x [B, T, C], shares of C numbers each -> as many [B, T, C].

    `previous` is the token before, in the first place of a sequence a row of `last` [k, C] or zeros, as in
    twins.token_shift. op: as in regions.form.
    """
    return _Mix.apply(x, last, cu_seqlens, stacked(shares, x), op)


def mix6(
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Sequence[Tensor],
    hidden: Tensor,
    w2: Tensor,
    op: str,
) -> tuple[Tensor, ...]:
    """The same with shares that depend on the token: to the m-th is added hidden[m] w2[m].

    hidden [M, B T, R], w2 [M, R, C]. For backward it keeps x, and computes what is added to the shares again.
    """
    return _Mix6.apply(x, last, cu_seqlens, stacked(shares, x), hidden, w2, op)


def mix_recipes(
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Sequence[Tensor],
    mixed: Sequence[Tensor],
    op: str,
) -> list[Recipe]:
    """How to make what `mix` gave from x again."""
    last = None if last is None else last.detach()

    def make(share: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: regions.form(op, x).mix_forward(x, last, cu_seqlens, stacked([share], x))[0]

    return [Recipe(made, (x,), make(share)) for made, share in zip(mixed, shares, strict=True)]


def mix6_recipes(
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Sequence[Tensor],
    hidden: Tensor,
    w2: Tensor,
    mixed: Sequence[Tensor],
    op: str,
) -> list[Recipe]:
    """How to make what `mix6` gave from x and `hidden` again."""
    last = None if last is None else last.detach()

    def make(m: int) -> Callable[[Tensor, Tensor], Tensor]:
        def again(x: Tensor, hidden: Tensor) -> Tensor:
            changes = _changes(hidden[m : m + 1], w2[m : m + 1], x)
            return regions.form(op, x).mix6_forward(x, last, cu_seqlens, stacked(shares[m : m + 1], x), changes)[0]

        return again

    return [Recipe(made, (x, hidden), make(m)) for m, made in enumerate(mixed)]


def stacked(shares: Sequence[Tensor], like: Tensor) -> Tensor:
    """[M, C] in at least fp32."""
    return torch.stack([widened(share, like).flatten() for share in shares])


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, op: str
    ) -> tuple[Tensor, ...]:
        trained = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if trained else None, last, cu_seqlens, shares)
        ctx.op = op
        return tuple(regions.form(op, x).mix_forward(x, last, cu_seqlens, shares))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, cu_seqlens, shares = ctx.saved_tensors
        _, need_last, _, need_shares, _ = ctx.needs_input_grad
        carried = len(last) if need_last else 0
        region = regions.form(ctx.op, grads[0])
        dx, dlast, dshares = region.mix_backward(grads, x, last, cu_seqlens, shares, carried, need_shares)
        return dx, dlast.to(last.dtype) if need_last else None, None, dshares if need_shares else None, None


class _Mix6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last: Tensor | None,
        cu_seqlens: Tensor | None,
        shares: Tensor,
        hidden: Tensor,
        w2: Tensor,
        op: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, last, cu_seqlens, shares, hidden, w2)
        ctx.op = op
        return tuple(regions.form(op, x).mix6_forward(x, last, cu_seqlens, shares, _changes(hidden, w2, x)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, last, cu_seqlens, shares, hidden, w2 = ctx.saved_tensors
        _, need_last, _, need_shares, _, need_w2, _ = ctx.needs_input_grad
        carried = len(last) if need_last else 0
        dx, dlast, dshares, dchanges = regions.form(ctx.op, x).mix6_backward(
            grads, x, last, cu_seqlens, shares, _changes(hidden, w2, x), carried, need_shares
        )
        dchanges = dchanges.flatten(1, 2)  # [M, B T, C]
        dhidden = dchanges @ w2.to(x.dtype).transpose(1, 2)
        dw2 = (hidden.transpose(1, 2) @ dchanges).to(w2.dtype) if need_w2 else None
        dlast = dlast.to(last.dtype) if need_last else None
        return dx, dlast, None, dshares if need_shares else None, dhidden, dw2, None


def _changes(hidden: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(hidden, w2.to(x.dtype)).view(len(hidden), *x.shape)
