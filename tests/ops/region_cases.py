"""The regions of the step by their definitions: plain formulas on float64, with autograd's gradients.

Nothing here is shared with the forms under test (rwkv_bone/ops/regions). A case is a region on drawn tensors, with what
both of its functions must return.

Sizes: B batch, T tokens, H heads, N head size, C channels, M lerps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 64e-5
MIX, MIX6, RELU_SQUARE, PRE7, FIRST_PRE7, POST7, GATED_NORM = REGIONS = (
    "mix",
    "mix6",
    "relu_square",
    "pre7",
    "pre7 of the first layer",
    "post7",
    "gated_norm",
)


class Case(NamedTuple):
    """What both functions of a region are given, and return."""

    given: dict[str, Tensor]  # activations in their dtype, parameters in theirs
    grads: list[Tensor]  # of the results
    outputs: list[Tensor]  # float64
    gradients: dict[str, Tensor]  # float64, by the name of what they belong to


def previous(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The token before each token of its sequence."""
    B, T, C = x.shape
    bounds = [b * T for b in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    rows, found = x.reshape(B * T, C), []
    for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        carried = last is not None and sequence < len(last)
        found.append(last[sequence : sequence + 1] if carried else torch.zeros_like(rows[:1]))
        found.append(rows[begin : end - 1])
    return torch.cat(found).view(B, T, C)


def mix(x: Tensor, shares: Tensor, last: Tensor | None = None, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    before = previous(x, last, cu_seqlens)
    return [x * (1 - share) + before * share for share in shares]


def mix6(
    x: Tensor, shares: Tensor, changes: Tensor, last: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> list[Tensor]:
    before = previous(x, last, cu_seqlens)
    return [x + (before - x) * (share + change) for share, change in zip(shares, changes, strict=True)]


def relu_square(h: Tensor) -> list[Tensor]:
    return [torch.where(h > 0, h * h, 0.0 * h)]


def pre7(
    N: int,
    pw: Tensor,
    pa: Tensor,
    k0: Tensor,
    v0: Tensor,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    pv: Tensor | None = None,
    v_first: Tensor | None = None,
    v0_bias: Tensor | None = None,
) -> list[Tensor]:
    rate = 1 / (1 + torch.exp(-(a0 + pa)))
    kk = (k0 * k_k).unflatten(-1, (-1, N))
    length = torch.where(kk.square().sum(-1, keepdim=True) > 1e-24, kk.norm(dim=-1, keepdim=True), 1e-12)
    kk = (kk / length).flatten(-2)
    outputs = [w0 + pw, k0 * (1 + (rate - 1) * k_a), -kk, kk * rate]
    if pv is None:
        return outputs
    gate = 1 / (1 + torch.exp(-(v0_bias + pv)))
    return [*outputs, v0 * (1 - gate) + v_first * gate]


def head_norm(y: Tensor, N: int, weight: Tensor, bias: Tensor) -> Tensor:
    heads = y.unflatten(-1, (-1, N))
    heads = heads - heads.mean(-1, keepdim=True)
    return (heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * weight + bias


def post7(
    N: int, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> list[Tensor]:
    share = (r * k * r_k).unflatten(-1, (-1, N)).sum(-1, keepdim=True)
    bonus = (share * v.unflatten(-1, (-1, N))).flatten(-2)
    return [(head_norm(y, N, ln_weight, ln_bias) + bonus) * g]


def gated_norm(N: int, y: Tensor, gate: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> list[Tensor]:
    return [head_norm(y, N, ln_weight, ln_bias) * gate / (1 + torch.exp(-gate))]


def make_case(
    region: str,
    dtype: torch.dtype,
    parameters: torch.dtype,
    *,
    B: int = 1,
    T: int = 9,
    H: int = 2,
    N: int = 64,
    M: int = 6,
    C: int | None = None,
    documents: list[int] | None = None,
    carried: int = 0,
    seed: int = 0,
) -> Case:
    """documents: their lengths, which make B 1 and T their sum; carried: rows of `last`; C: H N unless it is given."""
    draw = torch.Generator().manual_seed(seed)
    if documents:
        B, T = 1, sum(documents)
    C = C or H * N

    def activation(scale: float = 1.0) -> Tensor:
        return (torch.randn(B, T, C, generator=draw, dtype=torch.float64) * scale).to(dtype)

    def parameter(scale: float = 0.5, around: float = 0.0, *rows: int) -> Tensor:
        return (torch.randn(*rows, C, generator=draw, dtype=torch.float64) * scale + around).to(parameters)

    offsets = torch.tensor([0, *documents]).cumsum(0) if documents else None
    last = torch.randn(carried, C, generator=draw, dtype=torch.float64).to(dtype) if carried else None
    others: dict = {}
    function: Callable
    if region in (MIX, MIX6):
        given = {"x": activation(), "shares": parameter(0.3, 0.5, M)}
        if region == MIX6:
            given["changes"] = torch.stack([activation(0.2) for _ in range(M)])
        if last is not None:
            given["last"] = last
        function, others = (mix if region == MIX else mix6), {"cu_seqlens": offsets}
    elif region == RELU_SQUARE:
        given, function = {"h": activation()}, relu_square
    elif region in (PRE7, FIRST_PRE7):
        given = {name: activation() for name in ("pw", "pa", "k0", "v0")}
        given |= {"w0": parameter(2, -2), "a0": parameter(), "k_k": parameter(0.2, 0.8), "k_a": parameter(0.2, 1.0)}
        # A head that is all zeros has no direction to normalise, and another is too short.
        given["k0"][0, T // 2, :N] = 0
        given["k0"][-1, -1, -N:] *= 1e-15
        if region == PRE7:
            given |= {"pv": activation(), "v_first": activation(), "v0_bias": parameter()}
        function, others = pre7, {"N": N}
    else:
        names = ("y", "r", "k", "v", "g") if region == POST7 else ("y", "gate")
        given = {name: activation() for name in names}
        # Groups whose variance is of the size of eps, and below.
        given["y"][0, 0] *= 0.02
        given["y"][0, -1, :N] = 0.25
        given |= {"r_k": parameter()} if region == POST7 else {}
        given |= {"ln_weight": parameter(0.2, 1.0), "ln_bias": parameter()}
        function, others = (post7 if region == POST7 else gated_norm), {"N": N}
    leaves = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    outputs = function(**leaves, **others)
    grads = [activation() for _ in outputs]
    used = {name: x for name, x in leaves.items() if region != FIRST_PRE7 or name != "v0"}
    found = torch.autograd.grad(outputs, list(used.values()), [g.double() for g in grads])
    return Case(given | others, grads, [x.detach() for x in outputs], dict(zip(used, found, strict=True)))
