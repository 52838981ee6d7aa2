"""RWKV-7 (x070, Goose): time mix and channel mix.

Notable:
- the decay differs for every token and channel
- the state is edited before the new value goes in: what is stored under the key kk is removed, in part (a, b)
- every layer's value is mixed with the first layer's
- small low-rank networks (w1 w2, a1 a2, v1 v2, g1 g2) make the decay, the in-context learning rate, the value mix and
  the gate. They are part of the model, not adapters
- the channel mix has no gate, unlike that of generations 5 and 6

Names are upstream's: r receptance, w decay, k key, v value, a in-context learning rate, g gate.

Sizes: B batch, T tokens, C channels, H heads, N head size, D rank of a low-rank network.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix, inputs_again, keeps_input
from rwkv_bone.ops.regions.mix import mix, mix_recipes
from rwkv_bone.ops.regions.relu_square import relu_square, relu_square_recipe
from rwkv_bone.ops.regions.time_mix7 import Activations, Parameters, time_mix7

GROUP_NORM_EPS = 64e-5  # for every head size: upstream's constant, not a formula


class TimeMix(StatefulMix):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__(arch.n_head, arch.head_size)
        C, H, N = arch.n_embd, arch.n_head, arch.head_size
        self.first, self.op = layer == 0, op

        def row() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        def network(name: str) -> tuple[nn.Parameter, nn.Parameter]:
            D = arch.low_rank[name]
            return nn.Parameter(torch.empty(C, D)), nn.Parameter(torch.empty(D, C))

        # The share of the previous token in each of the six inputs.
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (row() for _ in range(6))
        # The biases of decay and in-context learning rate, and two scales of the key.
        self.w0, self.a0, self.k_k, self.k_a = (row() for _ in range(4))
        self.r_k = nn.Parameter(torch.empty(H, N))
        # Some checkpoints carry the value mix in layer 0 too, where there is nothing to mix with.
        has_v = layer > 0 or arch.v_in_layer0
        self.unused = ("v0", "v1", "v2") if layer == 0 and has_v else ()
        if has_v:
            self.v0 = row()
        self.w1, self.w2 = network("w")
        self.a1, self.a2 = network("a")
        self.g1, self.g2 = network("g")
        if has_v:
            self.v1, self.v2 = network("v")
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = HeadNorm(C, GROUP_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        last: Tensor | None,
        state: Tensor | None,
        return_state: bool,
        cu_seqlens: Tensor | None,
        keep_wkv: bool,
        rebuild: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, C], v_first [B, T, C] of layer 0, last [B, C], state [B, H, N, N] -> (output, v_first, state)."""
        state = self.start(state, len(x) if cu_seqlens is None else len(cu_seqlens) - 1)

        def cast(parameter: Tensor) -> Tensor:
            # A trained parameter is fp32, also where activations are bf16.
            return parameter.to(x.dtype)

        # Token shift: each input sees its own mix, per channel, of the token and the one before it.
        shares = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = mixed = mix(x, last, cu_seqlens, shares, self.op)  # each [B, T, C]

        keep = any(map(keeps_input, (self.receptance, self.key, self.value))) or self.w1.requires_grad
        with inputs_again(rebuild and keep, lambda: mix_recipes(x, last, cu_seqlens, shares, mixed, self.op)):
            # r: what is read from the state. k, v: the key and the value that are written into it.
            r, k, v = self.receptance(xr), self.key(xk), self.value(xv)  # each [B, T, C]
            # The first halves of the low-rank networks, each [B, T, D]. The gate has no bias, and its sigmoid is inside
            # the network.
            hidden = (
                torch.tanh(xw @ cast(self.w1)),
                xa @ cast(self.a1),
                None if self.first else xv @ cast(self.v1),
                torch.sigmoid(xg @ cast(self.g1)),
            )

        # The rest up to the output projection is one function: the second halves make of the hidden layers the decay,
        # the in-context learning rate, the value mix and the gate; these and the key make what the operator takes; in
        # each head state <- state (diag(decay) + a b^T) + v k^T and y = state r; then norm, bonus and gate.
        # Each value is mixed with the first layer's, which is closest to the token itself.
        parameters = Parameters(
            self.w0,
            self.w2,
            self.a0,
            self.a2,
            None if self.first else self.v0,
            None if self.first else self.v2,
            self.k_k,
            self.k_a,
            self.r_k,
            self.g2,
            self.ln_x.weight,
            self.ln_x.bias,
        )
        z, state = time_mix7(
            Activations(r, k, v, *hidden, v_first=v_first),
            parameters,
            state,
            cu_seqlens,
            N=self.head_size,
            eps=self.ln_x.eps,
            keep_wkv=keep_wkv,
            op=self.op,
        )  # z [B, T, C]
        return self.output(z), v if v_first is None else v_first, state if return_state else None


class ChannelMix(nn.Module):
    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__()
        self.op = op
        self.x_k = nn.Parameter(torch.empty(1, 1, arch.n_embd))
        self.key = Linear(arch.n_embd, arch.dim_ffn)
        self.value = Linear(arch.dim_ffn, arch.n_embd)

    def forward(self, x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, rebuild: bool) -> Tensor:
        """x [B, T, C], last [B, C] -> [B, T, C]."""
        mixed = mix(x, last, cu_seqlens, (self.x_k,), self.op)  # one [B, T, C]
        with inputs_again(
            rebuild and keeps_input(self.key), lambda: mix_recipes(x, last, cu_seqlens, (self.x_k,), mixed, self.op)
        ):
            h = self.key(mixed[0])
        # An MLP with relu squared, [B, T, dim_ffn] inside.
        squared = relu_square(h, self.op)
        with inputs_again(rebuild and keeps_input(self.value), lambda: [relu_square_recipe(h, squared, self.op)]):
            return self.value(squared)


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
