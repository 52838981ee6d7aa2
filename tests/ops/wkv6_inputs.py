"""The inputs on which every WKV-6 and WKV-5 implementation must agree with the float64 reference.

Sizes: B batch, T tokens, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rwkv_bone.ops.reference import wkv6_reference

OPERATORS = ("wkv6", "wkv5")
INPUTS = ("r", "w", "k", "v", "u")


def make_case(
    operator: str,
    dtype: torch.dtype,
    *,
    B: int = 2,
    T: int = 33,
    H: int = 2,
    N: int = 64,
    raw: tuple[float, float] | None = None,
    repeated: bool = False,
    states: str | None = "random",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """One problem for "wkv6", or for "wkv5", whose w is [H, N].

    Returns r, k, v, dy [B, T, H, N] in `dtype`; w (the raw decay) [B, T, H, N] or [H, N], u [H, N], and state, dstate
    [B, H, N, N], in float32 (float64 if dtype is). `raw` = (low, high) draws the raw decay evenly from there;
    `repeated` cycles through three keys with slow decay; `states` None leaves both states None, "rank1" makes them
    outer products of very different vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay_shape = (B, T, H, N) if operator == "wkv6" else (H, N)
    r, v, dy = (normal(B, T, H, N) for _ in range(3))
    w = normal(*decay_shape) * 3 - 2
    k, u = normal(B, T, H, N) * 0.3, normal(H, N)
    if repeated:
        k = normal(B, 3, H, N)[:, torch.arange(T) % 3]
        raw = (-8.5, -7.5)
    if raw is not None:
        low, high = raw
        w = low + (high - low) * torch.rand(*decay_shape, generator=generator, dtype=torch.float64)
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
    case = {name: x.to(dtype) for name, x in {"r": r, "k": k, "v": v, "dy": dy}.items()}
    wider = {"w": w, "u": u, "state": state, "dstate": dstate}
    return case | {name: None if x is None else x.to(wide) for name, x in wider.items()}


def cases(operator: str) -> dict[str, Callable[[torch.dtype], dict[str, Tensor | None]]]:
    """name -> function(dtype) -> case (see make_case)."""
    named = {
        "random": {"T": 65, "states": None},
        "states_in_and_out_differ_by_row": {},
        "asymmetric_rank1_states": {"T": 17, "states": "rank1"},
        "repeated_keys_slow_decay": {"T": 129, "H": 1, "repeated": True},
        "raw_decay_minus_9": {"raw": (-9.2, -8.8)},
        "raw_decay_plus_8": {"T": 65, "raw": (7.8, 8.2)},
        # Neighbours may differ by eight powers of ten: sums of log decay that cancel lose the small ones.
        "raw_decay_from_minus_9_to_20": {"T": 65, "raw": (-9.0, 20.0)},
        "raw_decay_beyond_the_range_of_exp": {"T": 17, "raw": (80.0, 120.0)},
    }
    named |= {f"length_{T}": {"T": T, "H": 1} for T in (1, 15, 17, 63, 65, 130)}
    named |= {f"head_size_{N}": {"T": 17, "N": N} for N in (8, 16, 32, 128)}
    return {name: partial(make_case, operator, seed=i, **sizes) for i, (name, sizes) in enumerate(named.items())}


def reference_gradients(case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """float64 y, state and the gradients dr, dw, dk, dv, du, dstate0 of sum(y * dy) + sum(state * dstate).

    A state or dstate of None counts as zeros. dw and du have the shapes of w and u: kernels give a row per sequence.
    """
    r = case["r"]
    B, _, H, N = r.shape
    leaves = {name: case[name].detach().double().requires_grad_() for name in INPUTS}
    zeros = torch.zeros(B, H, N, N, dtype=torch.float64, device=r.device)
    state = zeros.clone() if case["state"] is None else case["state"].detach().double()
    state.requires_grad_()
    y, last = wkv6_reference(**leaves, state=state)
    dstate = zeros if case["dstate"] is None else case["dstate"].double()
    grads = torch.autograd.grad((y, last), (*leaves.values(), state), (case["dy"].double(), dstate))
    names = [f"d{name}" for name in leaves] + ["dstate0"]
    return {"y": y.detach(), "state": last.detach(), **dict(zip(names, grads, strict=True))}
