"""One call of a compiled operator before it is relied on: one token of one head, forward and backward.

It shows a driver that cannot load the kernels, a card that they were not made for, and a miscompiled kernel, before a
run has begun instead of at its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.chunked import wkv7_chunked
from rwkv_bone.ops.chunked6 import wkv6_chunked
from rwkv_bone.ops.wkv6 import wkv6_forward
from rwkv_bone.ops.wkv7 import wkv7_forward

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative errors; a defect is off by far more


def trial(operator: str, device: torch.device, N: int, dtype: torch.dtype) -> None:
    """Compare the compiled kernels with the `torch` form. Raises BuildError, DriverError, or what torch raises."""
    draw = torch.Generator().manual_seed(0)  # its own, so that a run's random numbers stay what they are

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    with _alone():
        inputs = {name: random(1, 1, 1, N, dtype=dtype) for name in ("rkvab" if operator == "wkv7" else "rkv")}
        inputs["w"] = random(1, N) if operator == "wkv5" else random(1, 1, 1, N)
        if operator != "wkv7":
            inputs["u"] = random(1, N)
        inputs["state"] = random(1, 1, N, N)
        leaves = tuple(inputs.values())
        results = []
        for form in (_compiled, _chunked):
            y, state = form(operator, **inputs)
            gradients = torch.autograd.grad((y, state), leaves, (torch.ones_like(y), torch.ones_like(state)))
            results.append([x.float() for x in (y, state, *gradients)])
        errors = torch.stack([(a - b).norm() / (b.norm() + 1e-6) for a, b in zip(*results, strict=True)])
        worst = errors.nan_to_num(nan=torch.inf).max().item()
    if not worst < LIMITS[dtype]:
        raise BuildError(f"a trial call of the {device.type} kernel gave wrong numbers (relative error {worst:.1e})")


@contextmanager
def _alone() -> Iterator[None]:
    """Untouched by what the caller is in the middle of: a trace, a checkpointed block, no_grad."""
    same = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    modes = torch.utils._python_dispatch._disable_current_modes()
    with modes, same, torch.inference_mode(False), torch.enable_grad():
        yield


def _compiled(operator: str, *, w: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    if operator == "wkv7":
        r, k, v, a, b = (inputs[name] for name in "rkvab")
        return wkv7_forward(r, w, k, v, a, b, state, None, True)[:2]
    r, k, v, u = (inputs[name] for name in "rkvu")
    return wkv6_forward(r, w, k, v, u, state, None, True)[:2]


def _chunked(operator: str, *, w: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    if operator == "wkv7":
        return wkv7_chunked(w=w, **inputs)
    return wkv6_chunked(w=w.expand_as(inputs["r"]), **inputs)
