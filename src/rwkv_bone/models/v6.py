"""RWKV-6 (x060, Finch): time mix and channel mix.

Notable:
- how much of the previous token goes into each of the five inputs depends on the data, through one low-rank network
  (time_maa_w1, time_maa_w2)
- so does the decay (time_decay_w1, time_decay_w2), which has no lower bound
- the current token enters the output with a bonus u (`time_faaaa`) before it enters the state

Names are upstream's: r receptance, w decay, k key, v value, g gate.

Sizes: B batch, T tokens, C channels, H heads, N head size, M rank of the mix network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix
from rwkv_bone.ops.regions.twins import token_shift, widened
from rwkv_bone.ops.wkv6 import wkv6

GROUP_NORM_EPS = 64e-5
MIXED = "wkvrg"  # the five inputs, in their order in time_maa_w1 and time_maa_w2


class TimeMix(StatefulMix):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__(arch.n_head, arch.head_size)
        C, H, N = arch.n_embd, arch.n_head, arch.head_size
        mix, decay = arch.low_rank["mix"], arch.low_rank["decay"]
        self.op = op

        def row() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        # The share of the previous token in what the mix network sees, and in each of the five inputs.
        self.time_maa_x = row()
        self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g = (row() for _ in MIXED)
        self.time_maa_w1 = nn.Parameter(torch.empty(C, len(MIXED) * mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(MIXED), mix, C))
        self.time_decay = row()
        self.time_decay_w1 = nn.Parameter(torch.empty(C, decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay, C))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.gate = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = HeadNorm(H, C, GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        shared: None,
        last: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, None, Tensor | None]:
        """x [B, T, C], last [B, C], state [B, H, N, N] -> (output [B, T, C], None, state)."""
        B, T, C = x.shape
        state = self.start(state, B if cu_seqlens is None else len(cu_seqlens) - 1)
        heads = (B, T, self.n_head, self.head_size)

        def cast(parameter: Tensor) -> Tensor:
            # A trained parameter is fp32, also where activations are bf16.
            return parameter.to(x.dtype)

        # Token shift, in two steps. A fixed mix of the token and the one before it goes through the mix network, which
        # says for each of the five inputs how much its own share of the previous token is to change.
        delta = token_shift(x, last, cu_seqlens) - x  # [B, T, C]
        mix = torch.tanh(torch.addcmul(x, delta, cast(self.time_maa_x)) @ cast(self.time_maa_w1))  # [B, T, 5 M]
        mix = mix.view(B * T, len(MIXED), -1).transpose(0, 1)  # [5, B T, M]
        mix = torch.bmm(mix, cast(self.time_maa_w2)).view(len(MIXED), B, T, C)
        shares = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)  # as in MIXED
        xw, xk, xv, xr, xg = (
            torch.addcmul(x, delta, cast(share) + change) for share, change in zip(shares, mix, strict=True)
        )  # each [B, T, C]

        # r: what is read from the state. k, v: the key and the value that are written into it. g: the output's gate.
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # each [B, T, C]
        g = F.silu(self.gate(xg))  # [B, T, C]
        # The operator turns this into the decay exp(-exp(w)). In fp32, since it is the exponent of an exponent.
        low = torch.tanh(xw @ cast(self.time_decay_w1)) @ cast(self.time_decay_w2)
        w = widened(self.time_decay) + widened(low)  # [B, T, C] fp32

        # In each head: y = (state + v (u k)^T) r, then state <- state diag(decay) + v k^T.
        r, w, k, v = (tensor.view(heads) for tensor in (r, w, k, v))  # each [B, T, H, N]
        y, state = wkv6(
            r=r,
            w=w,
            k=k,
            v=v,
            u=self.time_faaaa,
            state=state,
            cu_seqlens=cu_seqlens,
            output_state=True,
            op=self.op,
        )  # y [B, T, H, N]
        y = self.ln_x(y.reshape(B, T, C))  # [B, T, C]
        return self.output(y * g), None, state if return_state else None


class ChannelMix(nn.Module):
    def __init__(self, arch: Architecture, layer: int):
        super().__init__()
        C = arch.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, arch.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(arch.dim_ffn, C)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        delta = token_shift(x, last, cu_seqlens) - x  # [B, T, C]
        xk = torch.addcmul(x, delta, self.time_maa_k.to(x.dtype))
        xr = torch.addcmul(x, delta, self.time_maa_r.to(x.dtype))
        # A gated MLP with relu squared, [B, T, dim_ffn] inside.
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)).square())


def lr_scale(key: str) -> float:
    """Upstream trains the decay, but not the network that adds to it, at twice the learning rate."""
    return 2.0 if key.endswith(".time_decay") else 1.0
