"""RWKV-6's and RWKV-5's recurrence as matrix products over chunks of tokens: the portable form, on any device.

A token j reaches a later token i through the decays between them. These have no lower bound, so the usual product of
exp(G_i) and exp(-G_j) with running sums G overflows, and G_i - G_j loses slow decays beside fast ones. Instead a chunk
is halved again and again: for j in a left half and i in the right half beside it, the way from j to the middle and the
way from the middle to i are separate sums of log decay, each at most 0, and all these pairs are one product. Every
pair of a chunk meets at exactly one halving. Nothing is subtracted or divided.

The backward pass is explicit and remakes everything from the inputs and the state at the start of each chunk. What a
chunk lacks is filled up with tokens that leave the state alone (r = k = v = 0, decay 1). Packed documents are cut each
by itself: see ops/chunks.py. Verified against ops/reference.py.

Sizes: B batch, T tokens, H heads, N head size, n chunks, L tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops.chunks import Chunks

CHUNK = 32


def wkv6_chunked(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """r, w, k, v [B, T, H, N], u [H, N], state [B, H, N, N] (value, key) -> (y in r's dtype, last state).

    With `cu_seqlens` [D + 1] B is 1 and the states are [D, H, N, N]. Computes in float64 if the state is float64,
    otherwise in float32; w and u are of the state's dtype. `chunk` is a power of two. See ops.reference for the
    formula; RWKV-5's w is [H, N].
    """
    return _Chunked.apply(r, w.expand_as(r), k, v, u, state, cu_seqlens, chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, u, state, cu_seqlens, chunk):
        ctx.chunk = chunk
        chunks = Chunks(r.shape, chunk, cu_seqlens)
        with torch.autocast(r.device.type, enabled=False):
            dtype, bonus = state.dtype, u[:, None, None, :]
            log = chunks.split(_log_decay(w), dtype)
            rc, kc, vc = (chunks.split(x, dtype) for x in (r, k, v))
            added = vc.mT @ (kc * _after(log).exp())
            kept = log.sum(dim=3, keepdim=True).exp()
            starts, states = chunks.walk(state, lambda i, start: torch.addcmul(added[:, :, i], start, kept[:, :, i]))
            ctx.save_for_backward(r, w, k, v, u, starts, cu_seqlens)
            y = (rc * _before(log).exp()) @ starts.mT + (rc * bonus * kc).sum(-1, keepdim=True) * vc
            for half in _halves_of(chunk):
                (log_j, log_i), (_, r_i), (k_j, _), (v_j, _), (_, y_i) = (_halve(x, half) for x in (log, rc, kc, vc, y))
                reads = (r_i * _before(log_i).exp()) @ (k_j * _after(log_j).exp()).mT
                y_i += reads @ v_j
        return chunks.join(y).to(r.dtype), states

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        r, w, k, v, u, starts, cu_seqlens = ctx.saved_tensors
        chunks = Chunks(r.shape, ctx.chunk, cu_seqlens)
        with torch.autocast(r.device.type, enabled=False):
            grads = _backward(chunks, r, w, k, v, u, starts, dy, dstate)
        # In bf16 the gradients are rounded once, here.
        return *(g.to(x.dtype) for g, x in zip(grads, (r, w, k, v, u, starts), strict=True)), None, None


def _log_decay(w: Tensor) -> Tensor:
    # Beyond float's range the decay is 0 either way, and 0 times a finite number is not NaN in the gradient.
    return -w.exp().clamp(max=torch.finfo(w.dtype).max)


def _before(x: Tensor) -> Tensor:
    """For each token, the sum over the earlier ones (dimension -2). Subtracting x from cumsum(x) would not be exact."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(x: Tensor) -> Tensor:
    """For each token, the sum over the later ones (dimension -2)."""
    return _before(x.flip(-2)).flip(-2)


def _halves_of(chunk: int) -> list[int]:
    return [1 << n for n in range(chunk.bit_length() - 1)]


def _halve(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the left and the right halves of all parts of 2 * half tokens: [B, H, n, parts, half, N] each."""
    return x.unflatten(3, (-1, 2, half)).unbind(4)


def _backward(
    chunks: Chunks,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    starts: Tensor,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, ...]:
    dtype, bonus = starts.dtype, u[:, None, None, :]
    log_decay = _log_decay(w)
    log = chunks.split(log_decay, dtype)
    r, k, v, dy = (chunks.split(x, dtype) for x in (r, k, v, dy))
    from_start, to_end, kept = _before(log).exp(), _after(log).exp(), log.sum(dim=3, keepdim=True).exp()
    r_start, k_end = r * from_start, k * to_end
    from_y = dy.mT @ r_start
    # The gradient of each chunk's last state [B, H, n, N, N], and that of the initial states.
    d_ends, dstates = chunks.walk(
        dstate, lambda i, d_end: torch.addcmul(from_y[:, :, i], d_end, kept[:, :, i]), backwards=True
    )

    # Between the chunk's tokens and the states around it.
    dr, dk, dv = dy @ starts, v @ d_ends, k_end @ d_ends.mT
    # A log decay scales all that passes over it.
    dlog = _after(r_start * dr) + _before(k_end * dk) + kept * (starts * d_ends).sum(dim=3, keepdim=True)
    dr, dk = dr * from_start, dk * to_end
    # A token with itself.
    vdy = (v * dy).sum(-1, keepdim=True)
    dr += bonus * k * vdy
    dk += bonus * r * vdy
    dv += (r * bonus * k).sum(-1, keepdim=True) * dy
    du = (r * k * vdy).sum(dim=(0, 2, 3))
    for half in _halves_of(chunks.length):
        (log_j, log_i), (_, r_i), (k_j, _), (v_j, _), (_, dy_i) = (_halve(x, half) for x in (log, r, k, v, dy))
        (dlog_j, dlog_i), (_, dr_i), (dk_j, _), (dv_j, _) = (_halve(x, half) for x in (dlog, dr, dk, dv))
        from_middle, to_middle = _before(log_i).exp(), _after(log_j).exp()
        r_middle, k_middle = r_i * from_middle, k_j * to_middle
        reads, d_reads = r_middle @ k_middle.mT, dy_i @ v_j.mT
        dr_middle, dk_middle = d_reads @ k_middle, d_reads.mT @ r_middle
        dv_j += reads.mT @ dy_i
        dr_i += dr_middle * from_middle
        dk_j += dk_middle * to_middle
        dlog_i += _after(r_middle * dr_middle)
        dlog_j += _before(k_middle * dk_middle)

    dr, dlog, dk, dv = (chunks.join(x) for x in (dr, dlog, dk, dv))
    return dr, dlog * log_decay, dk, dv, du, dstates
