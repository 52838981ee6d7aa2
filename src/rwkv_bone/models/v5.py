"""RWKV-5 (x052, Eagle): time mix and channel mix.

Notable:
- the decay is a parameter: it is the same for every token
- the current token enters the output with a bonus u (`time_faaaa`) before it enters the state
- `time_mix_*` is the share of the current token, not of the previous one as in later generations

Names are upstream's: r receptance, w decay, k key, v value, g gate.

Sizes: B batch, T tokens, C channels, H heads, N head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix
from rwkv_bone.ops.regions.twins import token_shift
from rwkv_bone.ops.wkv6 import wkv5

# Upstream divides by 8 and then uses eps 1e-5, which is the same as eps 64e-5 without the division.
GROUP_NORM_EPS = 64e-5


class TimeMix(StatefulMix):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__(arch.n_head, arch.head_size)
        C, H, N = arch.n_embd, arch.n_head, arch.head_size
        self.op = op

        def row() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        # The share of the current token in each of the four inputs.
        self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g = (row() for _ in range(4))
        self.time_decay = nn.Parameter(torch.empty(H, N))
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

        # Token shift: each input sees its own mix, per channel, of the token before and the token itself.
        previous = token_shift(x, last, cu_seqlens)  # [B, T, C]
        shares = (self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g)
        xk, xv, xr, xg = (torch.lerp(previous, x, share.to(x.dtype)) for share in shares)  # each [B, T, C]

        # r: what is read from the state. k, v: the key and the value that are written into it. g: the output's gate.
        r, k, v = (y.view(heads) for y in (self.receptance(xr), self.key(xk), self.value(xv)))  # each [B, T, H, N]
        g = F.silu(self.gate(xg))  # [B, T, C]

        # In each head: y = (state + v (u k)^T) r, then state <- state diag(decay) + v k^T. `time_decay` is not the
        # decay itself: the operator turns it into exp(-exp(w)).
        y, state = wkv5(
            r=r,
            w=self.time_decay,
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
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, arch.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(arch.dim_ffn, C)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        previous = token_shift(x, last, cu_seqlens)  # [B, T, C]
        xk = torch.lerp(previous, x, self.time_mix_k.to(x.dtype))
        xr = torch.lerp(previous, x, self.time_mix_r.to(x.dtype))
        # A gated MLP with relu squared, [B, T, dim_ffn] inside.
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)).square())


def lr_scale(key: str) -> float:
    """Upstream trains the decay at twice the learning rate."""
    return 2.0 if key.endswith(".time_decay") else 1.0
