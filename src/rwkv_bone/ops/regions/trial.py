"""Calls of the compiled regions before they are relied on: every function against its twin in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.regions import compiled, twins
from rwkv_bone.ops.trial import LIMITS, alone

T, H, M = 35, 2, 6  # more tokens than the processor's kernels take at a time
EPS = 64e-5


def trial(device: torch.device, dtype: torch.dtype, N: int) -> None:
    """Raises BuildError if a region gives wrong numbers, and what building and calling it raises. N: see problem."""
    C = H * (N if N > 1 else 32)
    draw = torch.Generator().manual_seed(0)  # its own, so that a run's random numbers stay what they are

    def activation(*rows: int) -> Tensor:
        return torch.randn(*(rows or (1, T)), C, generator=draw).to(device, dtype)

    def parameter() -> Tensor:
        return torch.randn(C, generator=draw).to(device)

    with alone(), torch.no_grad():
        calls = [*_any_size(activation, draw, device), *(_of_heads(activation, parameter, N) if N > 1 else ())]
        for name, arguments in calls:
            found = _list(getattr(compiled, name)(*arguments))
            expected = _list(getattr(twins, name)(*map(_exact, arguments)))
            for a, b in zip(found, expected, strict=True):
                if not b.numel():
                    continue
                error = ((a.double() - b).norm() / (b.norm() + 1e-6)).nan_to_num(nan=torch.inf).item()
                if not error < LIMITS[dtype]:
                    raise BuildError(f"a trial call of {name} gave wrong numbers (relative error {error:.1e})")


def _any_size(activation: Any, draw: torch.Generator, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """The regions without heads: (name of the function, arguments)."""
    C = activation().shape[-1]
    shares = torch.rand(M, C, generator=draw).to(device)
    x, last, grads = activation(), activation(2), [activation() for _ in range(M)]
    offsets = torch.tensor([0, 1, 33, T], device=device)
    changes = torch.stack([activation() for _ in range(M)])
    yield "mix_forward", (x, last, offsets, shares)
    yield "mix_backward", (grads, x, last, offsets, shares, 2, True)
    yield "mix_forward", (x, None, None, shares[:1])
    yield "mix_backward", (grads[:1], None, None, None, shares[:1], 0, False)
    yield "mix6_forward", (x, last, offsets, shares, changes)
    yield "mix6_backward", (grads, x, last, offsets, shares, changes, 2, True)
    yield "relu_square_forward", (x,)
    yield "relu_square_backward", (x, grads[0])


def _of_heads(activation: Any, parameter: Any, N: int) -> Iterator[tuple[str, tuple]]:
    pw, pa, pv, k0, v0, v_first, *grads, y, r, k, v, g, dz = (activation() for _ in range(18))
    w0, a0, v0_bias, k_k, k_a, r_k, weight, bias = (parameter() for _ in range(8))
    yield "pre7_forward", (pw, pa, pv, k0, v0, v_first, w0, a0, v0_bias, k_k, k_a, N, True)
    yield "pre7_backward", (pa, pv, k0, v0, v_first, a0, v0_bias, k_k, k_a, N, grads[0].float(), *grads[:6], True)
    yield "pre7_forward", (pw, pa, None, k0, v0, None, w0, a0, None, k_k, k_a, N, False)
    yield "pre7_backward", (pa, None, k0, v0, None, a0, None, k_k, k_a, N, grads[0], *grads[:6], False)
    yield "post7_forward", (y, r, k, v, g, r_k, weight, bias, N, EPS)
    yield "post7_backward", (y, r, k, v, g, r_k, weight, bias, N, EPS, dz, True)
    yield "gated_norm_forward", (y, g, weight, bias, N, EPS)
    yield "gated_norm_backward", (y, g, weight, bias, N, EPS, dz, True)


def _exact(x: Any) -> Any:
    """The same in float64, of which no setting of PyTorch makes less."""
    if isinstance(x, list):
        return [_exact(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _list(results: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
