"""The regions in PyTorch: the definition that the compiled ones are compared with. Any dtype, any device.

Arithmetic is in float32, in float64 for float64, and its results are rounded once. A forward function can also be
differentiated by autograd. A backward function takes the gradients of the results first or last, as named, returns new
tensors, and writes into nothing that it is given. The gradients of parameters are at least float32. What is not
wanted, or not there, comes back as a tensor of 0 elements.

Activations are [B, T, C], C = H N; parameters are vectors [C], in any floating-point dtype.

Sizes: B batch, T tokens, C channels, H heads, N head size, M mixes, D documents, k rows of `last`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHORTEST = 1e-12  # the removal key is divided by its length, or by this


def token_shift(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [B, T, C] moved one token on: each token's place holds the token before it.

    In the first place of a sequence is its row of `last` [B, C], or zeros. Packed, x is [1, T, C] and `last` [k, C] has
    a row for each of the first k documents; the others begin with zeros.
    """
    if cu_seqlens is None:
        first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
        return torch.cat([first, x[:, :-1]], dim=1)
    starts = cu_seqlens[:-1]
    if last is None:
        return x.roll(1, dims=1).index_fill_(1, starts, 0)
    return x.roll(1, dims=1).index_copy_(1, starts, with_zeros(last.to(x.dtype), len(starts))[None])


def token_shift_backward(g: Tensor, cu_seqlens: Tensor | None, carried: int) -> tuple[Tensor, Tensor]:
    """(dx [B, T, C], dlast [carried, C]) for the gradient g of token_shift's result."""
    starts = _starts(g, cu_seqlens)
    first = g.flatten(0, 1)[starts[:carried]]
    if cu_seqlens is None:
        return torch.cat([g[:, 1:], torch.zeros_like(g[:, :1])], dim=1), first
    # The first token of a document is the successor of none.
    return g.index_fill(1, starts, 0).roll(-1, dims=1), first


def mix_forward(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor) -> list[Tensor]:
    """Token shift and M lerps: shares [M, C] of the previous token -> M tensors x + (previous - x) share."""
    wide, shares = widened(x), widened(shares, x)
    delta = token_shift(x, last, cu_seqlens) - wide
    return [(wide + delta * share).to(x.dtype) for share in shares]


def mix_backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlast [carried, C], dshares [M, C]); x and last are read for `want_shares` only."""
    first, shares = grads[0], widened(shares, grads[0])
    total, to_previous = _sums(grads, shares)
    dx, dlast = token_shift_backward(to_previous, cu_seqlens, carried)
    dx = (dx + (total - to_previous)).to(first.dtype)
    if not want_shares:
        return dx, dlast, dlast.new_empty(0)
    assert x is not None
    delta = token_shift(x, last, cu_seqlens) - widened(x)
    return dx, dlast, torch.stack([over_tokens(widened(g) * delta) for g in grads])


def mix6_forward(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, changes: Tensor
) -> list[Tensor]:
    """The same with shares [M, C] + changes [M, B, T, C]: RWKV-6's shares depend on the token."""
    wide, shares = widened(x), widened(shares, x)
    delta = token_shift(x, last, cu_seqlens) - wide
    return [(wide + delta * (share + change)).to(x.dtype) for share, change in zip(shares, changes, strict=True)]


def mix6_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    changes: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dlast [carried, C], dshares [M, C], dchanges [M, B, T, C])"""
    total, to_previous = _sums(grads, [a + b for a, b in zip(widened(shares, x), changes, strict=True)])
    dx, dlast = token_shift_backward(to_previous, cu_seqlens, carried)
    delta = token_shift(x, last, cu_seqlens) - widened(x)
    dchanges = [widened(g) * delta for g in grads]
    dshares = torch.stack([over_tokens(d) for d in dchanges]) if want_shares else dlast.new_empty(0)
    return (dx + (total - to_previous)).to(x.dtype), dlast, dshares, torch.stack([d.to(x.dtype) for d in dchanges])


def relu_square_forward(h: Tensor) -> Tensor:
    """relu(h)^2, of any shape."""
    return torch.relu(h).square()


def relu_square_backward(h: Tensor, g: Tensor) -> Tensor:
    """2 relu(h) g"""
    return torch.relu(h) * 2 * g  # doubling is exact: this too is rounded once


def pre7_forward(
    pw: Tensor,
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    want_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What RWKV-7's operator takes besides r: (w, k, v, a, b).

    pw, pa, pv      what the low-rank networks give for decay, in-context learning rate and value mix
    k0, v0          key and value as the projections give them; v_first is the first layer's v0

        w = w0 + pw                              at least float32; empty unless `want_w`
        rate = sigmoid(a0 + pa)                  the in-context learning rate: how much of what is stored under a key
                                                 the new value replaces, from 0 to 1
        k = k0 (1 + (rate - 1) k_a)              the smaller the rate, the weaker the key under which the value goes in
        kk = k0 k_k / |k0 k_k| in each head      the removal key: what is removed, no more than is there
        a = -kk, b = kk rate
        v = v0 + (v_first - v0) sigmoid(v0_bias + pv)    empty without pv: it is v0
    """
    rate, removal, _ = _rate_and_removal(pa, k0, a0, k_k, N)
    k = widened(k0) * (1 + (rate - 1) * widened(k_a, k0))
    w, v = pw.new_empty(0), pw.new_empty(0)
    if want_w:
        w = widened(w0, pw) + pw
    if pv is not None:
        assert v_first is not None and v0_bias is not None
        gate = torch.sigmoid(widened(v0_bias, pv) + pv)
        v = (v0 + (widened(v_first) - v0) * gate).to(v0.dtype)
    dtype = k0.dtype
    return w, k.to(dtype), v, -removal.to(dtype), (removal * rate).to(dtype)


def pre7_backward(
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    dw: Tensor,
    dk: Tensor,
    dv: Tensor,
    da: Tensor,
    db: Tensor,
    dk_bonus: Tensor,
    dv_bonus: Tensor,
    want: bool,
) -> tuple[Tensor, ...]:
    """(dpw, dpa, dpv, dk0, dv0, dv_first, d_w0, d_a0, d_v0_bias, d_k_k, d_k_a), the last five only if they are wanted.

    dw to db are the operator's gradients; dk_bonus and dv_bonus those of post7, which uses k and v as well.
    """
    dtype = k0.dtype
    rate, removal, length = _rate_and_removal(pa, k0, a0, k_k, N)
    k0, k_k, k_a = widened(k0), widened(k_k, k0), widened(k_a, k0)
    dw, dk, dv, db = widened(dw), widened(dk) + dk_bonus, widened(dv) + dv_bonus, widened(db)

    # Through the removal key, whose length is one: nothing of the gradient's part along it comes through.
    d_removal = db * rate - da
    along = _over_head(d_removal * removal, N) * (length >= SHORTEST)
    d_scaled = (d_removal - removal * along) / length.clamp_min(SHORTEST)  # of k0 k_k
    d_rate = db * removal + dk * k0 * k_a
    dpa = d_rate * rate * (1 - rate)
    dk0 = dk * (1 + (rate - 1) * k_a) + d_scaled * k_k

    empty = k0.new_empty(0)
    dpv = dv_first = empty
    dv0 = dv
    if pv is not None:
        assert v_first is not None and v0_bias is not None
        gate = torch.sigmoid(widened(v0_bias, pv) + pv)
        dv_first = dv * gate
        dv0 = dv - dv_first
        dpv = dv_first * (1 - gate) * (widened(v_first) - v0)
    results = [x.to(dtype) for x in (dw, dpa, dpv, dk0, dv0, dv_first)]
    if not want:
        return *results, *[empty] * 5
    trained = (dw, dpa, dpv, d_scaled * k0, dk * k0 * (rate - 1))
    return *results, *(over_tokens(x) if x.numel() else empty for x in trained)


def post7_forward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    N: int,
    eps: float,
) -> Tensor:
    """(norm(y) + bonus) g.

    norm(y): GroupNorm of each head. The bonus is the current token's own value once more, past norm and state, as much
    as r, k and r_k agree: (sum over a head of r k r_k) v.
    """
    normal, _ = _normalized(y, N, eps)
    agreement = _over_head(widened(r) * k * widened(r_k, r), N)
    return ((normal * widened(ln_weight, y) + widened(ln_bias, y) + agreement * v) * g).to(y.dtype)


def post7_backward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    N: int,
    eps: float,
    dz: Tensor,
    want: bool,
) -> tuple[Tensor, ...]:
    """(dy, dr, dk, dv, dg, d_r_k, d_ln_weight, d_ln_bias), the last three only if they are wanted."""
    r_k, ln_weight, ln_bias = (widened(p, y) for p in (r_k, ln_weight, ln_bias))
    normal, scale = _normalized(y, N, eps)
    r_, k_, v_, dz = (widened(x) for x in (r, k, v, dz))
    agreement = _over_head(r_ * k_ * r_k, N)
    dg = dz * (normal * ln_weight + ln_bias + agreement * v_)
    d_sum = dz * g
    d_agreement = _over_head(d_sum * v_, N)
    dy = _normalized_backward(d_sum * ln_weight, normal, scale, N)
    gradients = (dy, d_agreement * k_ * r_k, d_agreement * r_ * r_k, d_sum * agreement, dg)
    results = [x.to(y.dtype) for x in gradients]
    trained = (d_agreement * r_ * k_, d_sum * normal, d_sum)
    return *results, *(over_tokens(x) if want else dz.new_empty(0) for x in trained)


def gated_norm_forward(y: Tensor, gate: Tensor, ln_weight: Tensor, ln_bias: Tensor, N: int, eps: float) -> Tensor:
    """norm(y) silu(gate), with GroupNorm of each head: RWKV-5 and 6."""
    normal, _ = _normalized(y, N, eps)
    open_ = widened(gate) * torch.sigmoid(widened(gate))
    return ((normal * widened(ln_weight, y) + widened(ln_bias, y)) * open_).to(y.dtype)


def gated_norm_backward(
    y: Tensor, gate: Tensor, ln_weight: Tensor, ln_bias: Tensor, N: int, eps: float, dz: Tensor, want: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, dgate, d_ln_weight, d_ln_bias), the last two only if they are wanted."""
    ln_weight, ln_bias = widened(ln_weight, y), widened(ln_bias, y)
    normal, scale = _normalized(y, N, eps)
    g, dz = widened(gate), widened(dz)
    share = torch.sigmoid(g)
    d_norm = dz * g * share
    dgate = dz * (normal * ln_weight + ln_bias) * share * (1 + g * (1 - share))
    dy = _normalized_backward(d_norm * ln_weight, normal, scale, N)
    trained = (over_tokens(x) if want else dz.new_empty(0) for x in (d_norm * normal, d_norm))
    d_weight, d_bias = trained
    return dy.to(y.dtype), dgate.to(gate.dtype), d_weight, d_bias


def widened(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in float32; in float64 if `like` is float64 (`like` is x itself unless given)."""
    return x.to(torch.promote_types((x if like is None else like).dtype, torch.float32))


def with_zeros(rows: Tensor, count: int) -> Tensor:
    """rows [k, ...] -> [count, ...], filled up with zeros at the end."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def over_tokens(x: Tensor) -> Tensor:
    """[B, T, C] -> [C]"""
    return x.sum(dim=(0, 1))


def _starts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence begins in the rows of x [B, T, C] flattened."""
    B, T, _ = x.shape
    return torch.arange(0, B * T, T, device=x.device) if cu_seqlens is None else cu_seqlens[:-1]


def _sums(grads: Sequence[Tensor], shares: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the gradients, sum of gradient times share), both wide."""
    total = to_previous = widened(grads[0])
    to_previous = to_previous * shares[0]
    for g, share in zip(grads[1:], shares[1:], strict=True):
        total = total + g
        to_previous = to_previous + g * share
    return total, to_previous


def _rate_and_removal(pa: Tensor, k0: Tensor, a0: Tensor, k_k: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """The in-context learning rate, the removal key, and the length of the key that this is made of, for each head."""
    rate = torch.sigmoid(widened(a0, pa) + pa)
    scaled = widened(k0) * widened(k_k, k0)
    heads = scaled.unflatten(-1, (-1, N))
    length = heads.norm(dim=-1, keepdim=True).expand_as(heads).flatten(-2)
    return rate, scaled / length.clamp_min(SHORTEST), length


def _over_head(x: Tensor, N: int) -> Tensor:
    """The sum over each head, in each of its channels: [B, T, C] -> [B, T, C]."""
    heads = x.unflatten(-1, (-1, N))
    return heads.sum(dim=-1, keepdim=True).expand_as(heads).flatten(-2)


def _normalized(y: Tensor, N: int, eps: float) -> tuple[Tensor, Tensor]:
    """(each head with mean 0 and variance 1, what it was multiplied by)"""
    y = widened(y)
    centred = y - _over_head(y, N) / N
    scale = (_over_head(centred.square(), N) / N + eps).rsqrt()
    return centred * scale, scale


def _normalized_backward(g: Tensor, normal: Tensor, scale: Tensor, N: int) -> Tensor:
    return scale * (g - _over_head(g, N) / N - normal * (_over_head(g * normal, N) / N))
