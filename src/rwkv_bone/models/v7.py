"""RWKV-7 (x070, Goose): time mix and channel mix.

Notable: the decay is per token and channel; the state is edited by a rank-one "remove and rewrite" (a, b) before the
new value goes in; every layer's value is mixed with the first layer's; small low-rank networks (w1 w2, a1 a2, v1 v2,
g1 g2) make decay, in-context learning rate, value mix and gate. They are part of the model, not adapters.

Sizes: B batch, T tokens, C channels, H heads, N head size, D rank of a low-rank network.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix, token_shift, widened
from rwkv_bone.ops.wkv7 import wkv7

GROUP_NORM_EPS = 64e-5  # for every head size: upstream's constant, not a formula


class TimeMix(StatefulMix):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__(arch.n_head, arch.head_size)
        C, H, N, rank = arch.n_embd, arch.n_head, arch.head_size, arch.low_rank
        self.first, self.op = layer == 0, op

        def row() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            setattr(self, name, row())
        self.r_k = nn.Parameter(torch.empty(H, N))
        has_v = layer > 0 or arch.v_in_layer0
        # Some checkpoints carry the value mix in layer 0 too, where there is nothing to mix with.
        self.unused = ("v0", "v1", "v2") if layer == 0 and has_v else ()
        if has_v:
            self.v0 = row()
        for name in ("w", "a", "g", "v") if has_v else ("w", "a", "g"):
            setattr(self, f"{name}1", nn.Parameter(torch.empty(C, rank[name])))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank[name], C)))
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = HeadNorm(H, C, GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        last: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, C], v_first [B, T, C] of layer 0, last [B, C], state [B, H, N, N] -> (output, v_first, state)."""
        B, T, C = x.shape
        state = self.start(state, B if cu_seqlens is None else len(cu_seqlens) - 1)
        heads = (B, T, self.n_head, self.head_size)

        def param(name: str) -> Tensor:
            return getattr(self, name).to(x.dtype)

        delta = token_shift(x, last, cu_seqlens) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, delta, param(f"x_{name}")) for name in "rwkvag")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # In fp32: rounding the decay logit to bf16 moves the decay of slow channels by up to 3 %.
        w = widened(self.w0) + widened(torch.tanh(xw @ param("w1")) @ param("w2"))
        a = torch.sigmoid(param("a0") + (xa @ param("a1")) @ param("a2"))
        g = torch.sigmoid(xg @ param("g1")) @ param("g2")
        if self.first:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(param("v0") + (xv @ param("v1")) @ param("v2"))
        kk = F.normalize((k * param("k_k")).view(heads), dim=-1)
        k = k * (1 + (a - 1) * param("k_a"))
        r, w, k, v, a = (tensor.view(heads) for tensor in (r, w, k, v, a))
        result = wkv7(
            r=r,
            w=w,
            k=k,
            v=v,
            a=-kk,
            b=kk * a,
            state=state,
            cu_seqlens=cu_seqlens,
            output_state=return_state,
            op=self.op,
        )
        y, state = result if return_state else (result, None)
        y = self.ln_x(y.reshape(B, T, C))
        bonus = (r * k * param("r_k")).sum(dim=-1, keepdim=True) * v
        return self.output((y + bonus.reshape(B, T, C)) * g), v_first, state


class ChannelMix(nn.Module):
    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, arch.n_embd))
        self.key = Linear(arch.n_embd, arch.dim_ffn)
        self.value = Linear(arch.dim_ffn, arch.n_embd)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        mixed = torch.addcmul(x, token_shift(x, last, cu_seqlens) - x, self.x_k.to(x.dtype))
        return self.value(torch.relu(self.key(mixed)).square())


def lr_scale(key: str) -> float:
    """Upstream trains the decay's bias w0 at twice the learning rate."""
    return 2.0 if key.endswith(".att.w0") else 1.0


def low_rank_sizes(n_embd: int) -> dict[str, int]:
    """The ranks of released models of this width, for training from scratch (multiples of 32)."""

    def size(factor: float, power: float) -> int:
        return max(32, round(factor * n_embd**power / 32) * 32)

    return {"w": size(1.8, 0.5), "a": size(1.8, 0.5), "v": size(1.3, 0.5), "g": size(0.6, 0.8)}


@torch.no_grad()
def initialise_block(att: TimeMix, ffn: ChannelMix, layer: int, n_layer: int) -> None:
    """Fill one block with upstream's RWKV-7 initialisation (BlinkDL/RWKV-LM, RWKV-v7 training code)."""
    C, N = att.n_head * att.head_size, att.head_size
    early = layer / max(n_layer - 1, 1)  # 0 in the first layer, 1 in the last
    late = 1 - layer / n_layer  # 1 in the first layer, almost 0 after the last
    position = torch.arange(C) / C
    linear = torch.arange(C) / max(C - 1, 1) - 0.5
    in_head = (torch.arange(C) % N - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zigzag = in_head * in_head.abs()

    for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
        getattr(att, f"x_{name}").copy_(1 - position ** (power * late))
    decay = -6 + 6 * (linear + 0.5) ** (1 + early**0.3)
    att.w0.copy_(decay + 0.5 + zigzag * 2.5)
    att.a0.copy_(-0.19 + zigzag * 0.3 + linear * 0.4)
    att.k_k.copy_(0.71 - linear * 0.1)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    names = ["w", "a", "g"]
    if hasattr(att, "v0"):
        att.v0.copy_(0.73 - linear * 0.4)
        names.append("v")
    for name in names:
        first, second = getattr(att, f"{name}1"), getattr(att, f"{name}2")
        first.zero_()
        nn.init.orthogonal_(second, gain=0.1 * math.sqrt(max(second.shape[0] / second.shape[1], 1)))
    for projection, gain in ((att.receptance, 1.0), (att.key, 0.1), (att.value, 1.0), (ffn.key, 1.0)):
        nn.init.orthogonal_(projection.weight, gain=gain)
    att.output.weight.zero_()
    ffn.value.weight.zero_()
    ffn.x_k.copy_(1 - position ** (late**4))
    att.ln_x.weight.fill_(((1 + layer) / n_layer) ** 0.7)
    att.ln_x.bias.zero_()
