"""One call of a compiled operator before it is relied on: one token of one head, forward and backward.

It shows a driver that cannot load the kernels, a card that they were not made for, and a miscompiled kernel, before a
run has begun instead of at its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rwkv_bone.ops import compiled
from rwkv_bone.ops.arguments import ANY_DTYPE
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.wkv6 import WKV5, WKV6
from rwkv_bone.ops.wkv7 import WKV7

OPERATORS = {operator.name: operator for operator in (WKV7, WKV6, WKV5)}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative errors; a defect is off by far more


def trial(operator: str, device: torch.device, N: int, dtype: torch.dtype) -> None:
    """Compare the compiled kernels with the `torch` form. Raises BuildError, DriverError, or what torch raises."""
    chunked, per_head = OPERATORS[operator].chunked, OPERATORS[operator].per_head
    draw = torch.Generator().manual_seed(0)  # its own, so that a run's random numbers stay what they are

    def random(name: str, *shape: int) -> Tensor:
        kind = torch.float32 if name in ANY_DTYPE else dtype
        return torch.randn(shape, generator=draw).to(device, kind).requires_grad_()

    with _alone():
        inputs = {name: random(name, *((1, N) if name in per_head else (1, 1, 1, N))) for name in INPUTS[operator]}
        start = random("state", 1, 1, N, N)
        leaves = (*inputs.values(), start)
        results = []
        for y, state in (compiled.run(operator, inputs, start, None), chunked(**inputs, state=start)):
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
