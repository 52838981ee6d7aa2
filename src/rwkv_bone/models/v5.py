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
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix, inputs_again, keeps_input
from rwkv_bone.ops.regions.mix import mix, mix_recipes
from rwkv_bone.ops.regions.relu_square import relu_square, relu_square_recipe
from rwkv_bone.ops.regions.time_mix6 import Activations, Parameters, time_mix6
from rwkv_bone.ops.regions.twins import widened

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
        self.ln_x = HeadNorm(C, GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        shared: None,
        last: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
        keep_wkv: bool,
        rebuild: bool,
    ) -> tuple[Tensor, None, Tensor | None]:
        """x [B, T, C], last [B, C], state [B, H, N, N] -> (output [B, T, C], None, state)."""
        state = self.start(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)

        # Token shift: each input sees its own mix, per channel, of the token before and the token itself.
        own = (self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g)
        shares = [1 - widened(share, x) for share in own]  # of the previous token
        xk, xv, xr, xg = mixed = mix(x, last, cu_seqlens, shares, self.op)  # each [B, T, C]

        keep = any(map(keeps_input, (self.receptance, self.key, self.value, self.gate)))
        with inputs_again(rebuild and keep, lambda: mix_recipes(x, last, cu_seqlens, shares, mixed, self.op)):
            # r: what is read from the state. k, v: the key and the value that are written into it.
            r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # each [B, T, C]
            gate = self.gate(xg)  # [B, T, C], the output's

        # The rest up to the output projection is one function. In each head: y = (state + v (u k)^T) r, then
        # state <- state diag(decay) + v k^T; then norm and gate.
        z, state = time_mix6(
            Activations(r, k, v, gate, None),
            Parameters(self.time_decay, None, self.time_faaaa, self.ln_x.weight, self.ln_x.bias),
            state,
            cu_seqlens,
            N=self.head_size,
            eps=self.ln_x.eps,
            keep_wkv=keep_wkv,
            op=self.op,
        )  # z [B, T, C]
        return self.output(z), None, state if return_state else None


class ChannelMix(nn.Module):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__()
        self.op = op
        C = arch.n_embd
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, arch.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(arch.dim_ffn, C)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, rebuild: bool) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        shares = (1 - widened(self.time_mix_k, x), 1 - widened(self.time_mix_r, x))
        mixed = mix(x, last, cu_seqlens, shares, self.op)
        with inputs_again(
            rebuild and (keeps_input(self.key) or keeps_input(self.receptance)),
            lambda: mix_recipes(x, last, cu_seqlens, shares, mixed, self.op),
        ):
            h, gate = self.key(mixed[0]), self.receptance(mixed[1])
        # A gated MLP with relu squared, [B, T, dim_ffn] inside.
        squared = relu_square(h, self.op)
        with inputs_again(rebuild and keeps_input(self.value), lambda: [relu_square_recipe(h, squared, self.op)]):
            return torch.sigmoid(gate) * self.value(squared)


def lr_scale(key: str) -> float:
    """Upstream trains the decay at twice the learning rate."""
    return 2.0 if key.endswith(".time_decay") else 1.0
