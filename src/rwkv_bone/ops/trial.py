"""Calls of a compiled operator before it is relied on, forward and backward.

They show a driver that cannot load the kernels, a card that they were not made for, and a miscompiled kernel, before a
run has begun instead of at its first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_bone.ops import choice, compiled
from rwkv_bone.ops.arguments import ANY_DTYPE
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.sizes import chunking
from rwkv_bone.ops.wkv6 import WKV5, WKV6
from rwkv_bone.ops.wkv7 import WKV7

OPERATORS = {operator.name: operator for operator in (WKV7, WKV6, WKV5)}
# Relative errors; a defect is off by far more.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHUNKED_LIMITS = {
    ("chunked", torch.bfloat16): 3e-2,
    ("accurate", torch.bfloat16): 1e-2,
    ("accurate", torch.float32): 1e-3,
}


def trial(operator: str, device: torch.device, N: int, dtype: torch.dtype, form: str | None = None) -> None:
    """Compare the kernels of a form with the `torch` form in float64; the device's sequential ones unless it is given.

    Sequential kernels get one token of one head. Chunked ones get enough tokens to end inside a chunk, once in a single
    sequence and once as documents, with a constant part of WKV-7's decay apart; on a card as many heads as it has
    multiprocessors, so that these work side by side, and twice, since threads that do not wait for each other as they
    should give other numbers every time. Raises BuildError, DriverError, or what torch raises.
    """
    form = form or ("cpu" if device.type == "cpu" else "cuda-exact")
    (label,) = choice.labels(form, operator, dtype, N)
    chunked = chunking(label)
    if not chunked:
        _compare(operator, device, N, dtype, form, (1,), False, LIMITS[dtype])
        return
    limit = CHUNKED_LIMITS[chunked.mode, dtype]
    _compare(operator, device, N, dtype, form, (70,), False, limit)
    _compare(operator, device, N, dtype, form, (33, 37), operator == "wkv7", limit)


def _compare(
    operator: str,
    device: torch.device,
    N: int,
    dtype: torch.dtype,
    form: str,
    lengths: Sequence[int],
    decay_apart: bool,
    limit: float,
) -> None:
    chunked, per_head = OPERATORS[operator].chunked, OPERATORS[operator].per_head
    H = 1 if sum(lengths) == 1 else _heads(device)
    draw = torch.Generator().manual_seed(0)  # its own, so that a run's random numbers stay what they are
    T, D = sum(lengths), len(lengths)

    def random(name: str, *shape: int) -> Tensor:
        kind = torch.float32 if name in ANY_DTYPE and not (name == "w" and decay_apart) else dtype
        x = torch.randn(shape, generator=draw)
        if T > 1 and name in "ab":
            # As a model has them: a state neither grows without bounds nor vanishes.
            x = F.normalize(x, dim=-1) * (-1 if name == "a" else 0.5)
        return x.to(device, kind).requires_grad_()

    with alone():
        inputs = {name: random(name, *((H, N) if name in per_head else (1, T, H, N))) for name in INPUTS[operator]}
        start = random("state", D, H, N, N)
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0) if D > 1 else None
        w0 = torch.randn(H, N, generator=draw).to(device) if decay_apart else None
        leaves = (*inputs.values(), start)
        # In float64, of which no setting of PyTorch makes less: with TF32 float32's products are off by 1e-3.
        exact = {name: x.double() for name, x in inputs.items()}
        if w0 is not None:
            exact["w"] = exact["w"] + w0
        # Of y and of the last state.
        given = (random("y", 1, T, H, N).detach(), random("state", D, H, N, N).detach())

        def gradients(y: Tensor, state: Tensor) -> list[Tensor]:
            # Of a sum, since gradients that are handed to autograd make it import sympy, half a second at each start.
            total = (y * given[0].to(y.dtype)).sum() + (state * given[1].to(state.dtype)).sum()
            found = torch.autograd.grad(total, leaves)
            return [x.float() for x in (y, state, *found)]

        found = gradients(*compiled.run(operator, inputs, start, offsets, form, w0))
        again = found if H == 1 else gradients(*compiled.run(operator, inputs, start, offsets, form, w0))
        expected = gradients(*chunked(**exact, state=start.double(), cu_seqlens=offsets))
        errors = torch.stack([(a - b).norm() / (b.norm() + 1e-6) for a, b in zip(found, expected, strict=True)])
        worst = errors.nan_to_num(nan=torch.inf).max().item()
    if not worst < limit:
        raise BuildError(f"a trial call of the {form} kernels gave wrong numbers (relative error {worst:.1e})")
    if not all(map(torch.equal, found, again)):
        raise BuildError(f"a trial call of the {form} kernels gave other numbers when it was repeated")


def _heads(device: torch.device) -> int:
    """How many heads keep the whole device busy."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@contextmanager
def alone() -> Iterator[None]:
    """Untouched by what the caller is in the middle of: a trace, a checkpointed block, no_grad."""
    same = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    modes = torch.utils._python_dispatch._disable_current_modes()
    with modes, same, torch.inference_mode(False), torch.enable_grad():
        yield
