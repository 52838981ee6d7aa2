"""RWKV-6 (x060, Finch): time mix and channel mix.

Notable: how much of the previous token goes into each of the five inputs depends on the data, through one low-rank
network (time_maa_w1, time_maa_w2); so does the decay (time_decay_w1, time_decay_w2), which has no lower bound; the
current token enters the output with a bonus u (`time_faaaa`) before it enters the state.

Sizes: B batch, T tokens, C channels, H heads, N head size, M rank of the mix network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models.layers import HeadNorm, Linear, StatefulMix, token_shift, widened
from rwkv_bone.ops.wkv6 import wkv6

GROUP_NORM_EPS = 64e-5
MIXED = "wkvrg"  # the order of the five inputs in time_maa_w1 and time_maa_w2


class TimeMix(StatefulMix):
    unused = ()

    def __init__(self, arch: Architecture, layer: int, op: str):
        super().__init__(arch.n_head, arch.head_size)
        C, H, N = arch.n_embd, arch.n_head, arch.head_size
        mix, decay = arch.low_rank["mix"], arch.low_rank["decay"]
        self.op = op
        for name in ("x", *MIXED):
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, len(MIXED) * mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(MIXED), mix, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
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

        def param(name: str) -> Tensor:
            return getattr(self, name).to(x.dtype)

        delta = token_shift(x, last, cu_seqlens) - x
        mix = torch.tanh(torch.addcmul(x, delta, param("time_maa_x")) @ param("time_maa_w1"))
        mix = mix.view(B * T, len(MIXED), -1).transpose(0, 1)  # [5, B T, M]
        mix = torch.bmm(mix, param("time_maa_w2")).view(len(MIXED), B, T, C)
        inputs = {
            name: torch.addcmul(x, delta, param(f"time_maa_{name}") + amount)
            for name, amount in zip(MIXED, mix, strict=True)
        }
        r, k, v = self.receptance(inputs["r"]), self.key(inputs["k"]), self.value(inputs["v"])
        g = F.silu(self.gate(inputs["g"]))
        # In fp32, since the decay is the exponential of an exponential of this.
        low = torch.tanh(inputs["w"] @ param("time_decay_w1")) @ param("time_decay_w2")
        w = widened(self.time_decay) + widened(low)
        r, w, k, v = (tensor.view(heads) for tensor in (r, w, k, v))
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
        )
        y = self.ln_x(y.reshape(B, T, C))
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
        delta = token_shift(x, last, cu_seqlens) - x
        xk = torch.addcmul(x, delta, self.time_maa_k.to(x.dtype))
        xr = torch.addcmul(x, delta, self.time_maa_r.to(x.dtype))
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)).square())


def lr_scale(key: str) -> float:
    """Upstream trains the decay at twice and the bonus at three times the learning rate."""
    return 2.0 if key.endswith("time_decay") else 3.0 if key.endswith("time_faaaa") else 1.0
