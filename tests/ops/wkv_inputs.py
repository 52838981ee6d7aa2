"""The inputs on which every WKV-7 implementation must agree with the float64 reference (design: sizes that hurt).

Sizes: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_bone.ops.reference import wkv7_reference

INPUTS = ("r", "w", "k", "v", "a", "b")
OUTPUTS = ("y", "state")


def make_case(
    dtype: torch.dtype,
    *,
    B: int = 2,
    T: int = 33,
    H: int = 2,
    N: int = 64,
    raw: float | None = None,
    repeated: bool = False,
    states: str | None = "random",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """One problem as the model poses it: a = -kk, b = kk * iclr, kk of unit length.

    Returns r, k, v, a, b, dy [B, T, H, N] in `dtype`; w (the raw decay) likewise, and state, dstate [B, H, N, N], in
    float32 (float64 if dtype is). `raw` fixes the raw decay; `repeated` cycles through three keys with iclr near 1 and
    slow decay; `states` None leaves both states None, "rank1" makes them outer products of very different vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, v, dy = (normal(B, T, H, N) for _ in range(3))
    w = normal(B, T, H, N) * 3 - 2
    key = normal(B, T, H, N)
    iclr = torch.sigmoid(normal(B, T, H, N))
    if repeated:
        key = normal(B, 3, H, N)[:, torch.arange(T) % 3]
        iclr = 0.98 + 0.02 * iclr
        raw = -8.0
    if raw is not None:
        w = raw + 0.1 * w
    kk = F.normalize(key, dim=-1)
    k = kk * N**0.5 * 0.3 * iclr
    state = dstate = None
    if states == "random":
        # Every batch row has its own scale, so that reading another row's state cannot pass.
        scale = torch.arange(1, B + 1, dtype=torch.float64).view(B, 1, 1, 1)
        state, dstate = normal(B, H, N, N) * scale, normal(B, H, N, N) / scale
    elif states == "rank1":
        rows, columns = torch.zeros(N, dtype=torch.float64), torch.linspace(-1, 2, N, dtype=torch.float64)
        rows[N // 4] = 3.0
        state = (rows[:, None] * columns).expand(B, H, N, N).clone()
        dstate = (columns[:, None] * rows.flip(0)).expand(B, H, N, N).clone()
    case = {"r": r, "k": k, "v": v, "a": -kk, "b": kk * iclr, "dy": dy}
    case = {name: tensor.to(dtype) for name, tensor in case.items()}
    case["w"] = w.to(wide)
    case["state"], case["dstate"] = (None if tensor is None else tensor.to(wide) for tensor in (state, dstate))
    return case


def cases() -> dict[str, Callable[[torch.dtype], dict[str, Tensor | None]]]:
    """name -> function(dtype) -> case (see make_case)."""
    named = {
        "random": {"T": 65, "states": None},
        "states_in_and_out_differ_by_row": {},
        "asymmetric_rank1_states": {"T": 17, "states": "rank1"},
        "repeated_keys_iclr_near_1_slow_decay": {"T": 129, "H": 1, "repeated": True},
        "raw_decay_minus_9": {"raw": -9.0},
        "raw_decay_plus_8": {"T": 65, "raw": 8.0},
    }
    named |= {f"length_{T}": {"T": T, "H": 1} for T in (1, 15, 17, 63, 65, 130)}
    named |= {f"head_size_{N}": {"T": 17, "N": N} for N in (8, 16, 32, 128)}
    return {name: partial(make_case, seed=i, **sizes) for i, (name, sizes) in enumerate(named.items())}


def reference_gradients(case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """float64 y, state and the gradients dr, dw, dk, dv, da, db, dstate0 of sum(y * dy) + sum(state * dstate).

    A state or dstate of None counts as zeros.
    """
    r = case["r"]
    B, _, H, N = r.shape
    leaves = {name: case[name].detach().double().requires_grad_() for name in INPUTS}
    zeros = torch.zeros(B, H, N, N, dtype=torch.float64, device=r.device)
    state = zeros.clone() if case["state"] is None else case["state"].detach().double()
    state.requires_grad_()
    y, last = wkv7_reference(**leaves, state=state)
    dstate = zeros if case["dstate"] is None else case["dstate"].double()
    grads = torch.autograd.grad((y, last), (*leaves.values(), state), (case["dy"].double(), dstate))
    names = [f"d{name}" for name in leaves] + ["dstate0"]
    return {"y": y.detach(), "state": last.detach(), **dict(zip(names, grads, strict=True))}


def relative_error(x: Tensor, ref: Tensor) -> float:
    """Frobenius norm of the difference over that of `ref`; infinite if anything in x is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    ref = ref.double()
    scale = ref.norm().item()
    error = (x.detach().to(ref.device).double() - ref).norm().item()
    return error / scale if scale else error
