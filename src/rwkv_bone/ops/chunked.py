"""RWKV-7's recurrence as matrix products over chunks of tokens: the portable form, on any device PyTorch knows.

Within a chunk of L tokens the rank-one edits are gathered into one triangular system, so a chunk costs a few products
and only one [N, N] product per chunk is sequential. The backward pass is explicit and remakes everything from the
inputs and the state at the start of each chunk. What a chunk lacks is filled up with tokens that leave the state alone
(r = k = v = a = b = 0, decay 1). Packed documents are cut each by itself: see ops/chunks.py. Verified against
ops/reference.py.

Sizes: B batch, T tokens, H heads, N head size, n chunks, L tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops.chunks import Chunks
from rwkv_bone.ops.reference import DECAY_SCALE

# The decay's bound of exp(-0.6065) per step keeps exp(+-sum of log decay) in fp32's range up to about 128 tokens.
CHUNK = 32


def wkv7_chunked(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """r, w, k, v, a, b [B, T, H, N], state [B, H, N, N] (value, key) -> (y in r's dtype, last state).

    With `cu_seqlens` [D + 1] B is 1 and the states are [D, H, N, N]. Computes in float64 if the state is float64,
    otherwise in float32. See ops.reference for the formula.
    """
    return _Chunked.apply(r, w, k, v, a, b, state, cu_seqlens, chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, cu_seqlens, chunk):
        chunks = Chunks(r.shape, chunk, cu_seqlens)
        with torch.autocast(r.device.type, enabled=False):
            c = _within_chunks(chunks, r, w, k, v, a, b, state.dtype)
            starts, states = chunks.walk(
                state, lambda i, start: _past(start, c.kept[:, :, i], c.change[:, :, i], c.added[:, :, i])
            )
            y = c.own + c.reads @ starts.mT
        ctx.save_for_backward(r, w, k, v, a, b, starts, states, cu_seqlens)
        ctx.chunk = chunk
        return chunks.join(y).to(r.dtype), states

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        r, w, k, v, a, b, starts, last, cu_seqlens = ctx.saved_tensors
        chunks = Chunks(r.shape, ctx.chunk, cu_seqlens)
        with torch.autocast(r.device.type, enabled=False):
            grads = _backward(chunks, r, w, k, v, a, b, starts, last, dy, dstate)
        # In bf16 the gradients are rounded once, here.
        return *(g.to(x.dtype) for g, x in zip(grads, (r, w, k, v, a, b, starts), strict=True)), None, None


class _Chunks(NamedTuple):
    """What needs no state, for every chunk at once; [B, H, n, L, N] unless said otherwise.

    With S the state at a chunk's start: U = u0 + W S^T are the values the edits write, y = own + reads S^T, and the
    state at the chunk's end is S * kept + S change + added.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    # Sums of log decay up to a token, with or without its own, and from it to the end; exponentiated.
    up: Tensor
    up_before: Tensor
    down: Tensor
    to_end: Tensor
    # r and a as they see the state at the chunk's start; k and b brought back to it, or on to the chunk's end.
    r_start: Tensor
    a_start: Tensor
    k_start: Tensor
    b_start: Tensor
    k_end: Tensor
    b_end: Tensor
    # Who reads whom within the chunk: a reads b, a reads k, r reads k, r reads b. [B, H, n, L, L]
    ab: Tensor
    ak: Tensor
    rk: Tensor
    rb: Tensor
    u0: Tensor
    W: Tensor
    own: Tensor
    reads: Tensor
    kept: Tensor  # [B, H, n, 1, N]
    change: Tensor  # [B, H, n, N, N]
    added: Tensor  # [B, H, n, N, N]


def _past(state: Tensor, kept: Tensor, change: Tensor, added: Tensor) -> Tensor:
    """A state, or the gradient of one, on the other side of a chunk: state * kept + state change + added."""
    elsewhere = torch.addcmul(added, state, kept)
    return torch.baddbmm(elsewhere.flatten(0, 1), state.flatten(0, 1), change.flatten(0, 1)).view_as(state)


def _within_chunks(
    chunks: Chunks, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype
) -> _Chunks:
    log_decay = chunks.split(-DECAY_SCALE * torch.sigmoid(w.to(dtype)), dtype)
    r, k, v, a, b = (chunks.split(x, dtype) for x in (r, k, v, a, b))
    total = log_decay.cumsum(dim=3)
    end = total[..., -1:, :]
    up, up_before = total.exp(), (total - log_decay).exp()
    down, to_end = (-total).exp(), (end - total).exp()
    r_start, a_start, k_start, b_start = r * up, a * up_before, k * down, b * down
    k_end, b_end = k * to_end, b * to_end
    ab, ak = (a_start @ b_start.mT).tril(-1), (a_start @ k_start.mT).tril(-1)
    rk, rb = (r_start @ k_start.mT).tril(), (r_start @ b_start.mT).tril()
    # Substitution: powers of ab (a Neumann series) reach 1e6 on repeated keys although the inverse stays near 1.
    right = torch.cat([ak @ v, a_start], dim=-1)
    u0, W = torch.linalg.solve_triangular(-ab, right, upper=False, unitriangular=True).chunk(2, dim=-1)
    own, reads = rk @ v + rb @ u0, r_start + rb @ W
    kept, change, added = end.exp(), W.mT @ b_end, v.mT @ k_end + u0.mT @ b_end
    return _Chunks(
        r, k, v, a, b, up, up_before, down, to_end, r_start, a_start, k_start, b_start, k_end, b_end,
        ab, ak, rk, rb, u0, W, own, reads, kept, change, added,
    )  # fmt: skip


def _backward(
    chunks: Chunks,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    starts: Tensor,
    last: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, ...]:
    dtype = starts.dtype
    c = _within_chunks(chunks, r, w, k, v, a, b, dtype)
    dy = chunks.split(dy, dtype)
    from_y = dy.mT @ c.reads
    # The gradient of each chunk's last state [B, H, n, N, N], and that of the initial states.
    d_ends, dstates = chunks.walk(
        dstate,
        lambda i, d_end: _past(d_end, c.kept[:, :, i], c.change[:, :, i].mT, from_y[:, :, i]),
        backwards=True,
    )
    ends = chunks.ends(starts, last)

    u = c.u0 + c.W @ starts.mT
    du = c.rb.mT @ dy + c.b_end @ d_ends.mT
    dx = torch.linalg.solve_triangular(-c.ab.mT, du, upper=True, unitriangular=True)
    dv = c.rk.mT @ dy + c.k_end @ d_ends.mT + c.ak.mT @ dx
    dab, dak = (dx @ u.mT).tril(-1), (dx @ c.v.mT).tril(-1)
    drk, drb = (dy @ c.v.mT).tril(), (dy @ u.mT).tril()
    da = (dab @ c.b_start + dak @ c.k_start + dx @ starts) * c.up_before
    dr = (drk @ c.k_start + drb @ c.b_start + dy @ starts) * c.up
    dk = (dak.mT @ c.a_start + drk.mT @ c.r_start) * c.down + (c.v @ d_ends) * c.to_end
    db = (dab.mT @ c.a_start + drb.mT @ c.r_start) * c.down + (u @ d_ends) * c.to_end

    # A log decay scales all that passes over it: what r and a read later, less what k and b only write later.
    at_read = c.a * da
    through = c.r * dr - c.k * dk - c.b * db + at_read
    later = through.flip(3).cumsum(3).flip(3) - at_read
    dlog = later + (ends * d_ends).sum(dim=3, keepdim=True)
    x = w.to(dtype)
    dw = chunks.join(dlog) * (-DECAY_SCALE * torch.sigmoid(x) * torch.sigmoid(-x))
    dr, dk, dv, da, db = (chunks.join(g) for g in (dr, dk, dv, da, db))
    return dr, dw, dk, dv, da, db, dstates
