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
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix, inputs_again, keeps_input
from rwkv_bone.ops.regions.mix import mix, mix6, mix6_recipes, mix_recipes
from rwkv_bone.ops.regions.relu_square import relu_square, relu_square_recipe
from rwkv_bone.ops.regions.time_mix6 import Activations, Parameters, time_mix6

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

        def cast(parameter: Tensor) -> Tensor:
            # A trained parameter is fp32, also where activations are bf16.
            return parameter.to(x.dtype)

        # Token shift, in two steps. A fixed mix of the token and the one before it goes through the mix network, which
        # says for each of the five inputs how much its own share of the previous token is to change.
        (seen,) = first = mix(x, last, cu_seqlens, (self.time_maa_x,), self.op)  # one [B, T, C]
        with inputs_again(
            rebuild and self.time_maa_w1.requires_grad,
            lambda: mix_recipes(x, last, cu_seqlens, (self.time_maa_x,), first, self.op),
        ):
            changes = torch.tanh(seen @ cast(self.time_maa_w1))  # [B, T, 5 M]
        changes = changes.view(-1, len(MIXED), self.time_maa_w2.shape[1]).transpose(0, 1)  # [5, B T, M]
        shares = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)  # as in MIXED
        how = (x, last, cu_seqlens, shares, changes, self.time_maa_w2)
        xw, xk, xv, xr, xg = mixed = mix6(*how, self.op)  # each [B, T, C]

        keep = any(map(keeps_input, (self.receptance, self.key, self.value, self.gate)))
        with inputs_again(
            rebuild and (keep or self.time_decay_w1.requires_grad), lambda: mix6_recipes(*how, mixed, self.op)
        ):
            # r: what is read from the state. k, v: the key and the value that are written into it.
            r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # each [B, T, C]
            gate = self.gate(xg)  # [B, T, C], the output's
            decay = torch.tanh(xw @ cast(self.time_decay_w1))  # [B, T, D]: the first half of the decay's network

        # The rest up to the output projection is one function. In each head: y = (state + v (u k)^T) r, then
        # state <- state diag(decay) + v k^T; then norm and gate.
        z, state = time_mix6(
            Activations(r, k, v, gate, decay),
            Parameters(self.time_decay, self.time_decay_w2, self.time_faaaa, self.ln_x.weight, self.ln_x.bias),
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
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, arch.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(arch.dim_ffn, C)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, rebuild: bool) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        shares = (self.time_maa_k, self.time_maa_r)
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
    """Upstream trains the decay, but not the network that adds to it, at twice the learning rate."""
    return 2.0 if key.endswith(".time_decay") else 1.0
