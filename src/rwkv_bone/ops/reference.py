"""The definition of each WKV operator: the recurrence, one step at a time, in plain PyTorch.

Everything else under ops/ and cuda/ is compared with this file. Use float64 for that; speed is not a goal.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

DECAY_SCALE = math.exp(-0.5)


def each_document(
    recurrence: Callable[..., tuple[Tensor, Tensor]], *, cu_seqlens: Tensor | None, state: Tensor, **tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """What packed documents mean: the recurrence on each of them alone, from its own state.

    The tensors [1, T, H, N] hold D documents one after another, document d in tokens cu_seqlens[d] up to
    cu_seqlens[d + 1]; those without tokens, [H, N], are the same for all. state [D, H, N, N] -> (y [1, T, H, N], last
    states [D, H, N, N]). Without cu_seqlens it is the recurrence itself.
    """
    if cu_seqlens is None:
        return recurrence(**tensors, state=state)
    lengths = cu_seqlens.diff().tolist()
    parts = {name: x.split(lengths, dim=1) if x.dim() == 4 else [x] * len(lengths) for name, x in tensors.items()}
    results = [
        recurrence(**{name: part[d] for name, part in parts.items()}, state=one) for d, one in enumerate(state.split(1))
    ]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)


def wkv7_reference(
    *, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """RWKV-7 (Goose). r, w, k, v, a, b [B, T, H, N], state [B, H, N, N] (value index, key index) -> (y, last state).

        decay_t = exp(-exp(-0.5) * sigmoid(w_t))
        S_t = S_{t-1} diag(decay_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t

    Differentiable by autograd; all arguments of one floating-point type.
    """
    decay = torch.exp(-DECAY_SCALE * torch.sigmoid(w))
    outputs = []
    for t in range(r.shape[1]):
        edit = (state @ a[:, t, :, :, None]) * b[:, t, :, None, :]  # [B, H, N, N]
        state = state * decay[:, t, :, None, :] + edit + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def wkv6_reference(*, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-6 (Finch), and RWKV-5 (Eagle), whose decay does not change over time.

    r, k, v [B, T, H, N], w like r (RWKV-6) or [H, N] (RWKV-5), u [H, N], state [B, H, N, N] (value index, key index)
    -> (y, last state).

        decay_t = exp(-exp(w_t))
        y_t = (S_{t-1} + v_t (u * k_t)^T) r_t
        S_t = S_{t-1} diag(decay_t) + v_t k_t^T

    Differentiable by autograd; all arguments of one floating-point type.
    """
    decay = torch.exp(-torch.exp(w)).expand_as(r)
    outputs = []
    for t in range(r.shape[1]):
        write = v[:, t, :, :, None] * k[:, t, :, None, :]  # [B, H, N, N]
        outputs.append(((state + write * u[:, None, :]) @ r[:, t, :, :, None]).squeeze(-1))
        state = state * decay[:, t, :, None, :] + write
    return torch.stack(outputs, dim=1), state
