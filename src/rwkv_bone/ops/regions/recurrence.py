"""What the time mixes of all generations share: parameters as the regions take them, and calls of the WKV operators
from inside an autograd function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_bone.ops.arguments import check, choose_form
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.regions.twins import widened

Result = TypeVar("Result")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # that the operators take


def checked_form(operator: str, r: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, N: int, op: str) -> str:
    """The form of the operator for r [B, T, C]: see ops.select_op. UserError for arguments that do not fit."""
    check(operator, r=r.unflatten(-1, (-1, N)), state=state, cu_seqlens=cu_seqlens)
    return choose_form(operator, op, r.device.type, r.dtype, N)


def forward(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, what backward needs: empty unless `save`) of compiled kernels; inputs in the order of INPUTS."""
    constants = (w0,) if operator == "wkv7" else ()
    run = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
    return run(*inputs, state, cu_seqlens, save, form, *constants)


def backward(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
    form: str,
    w0: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """(the gradients of the inputs, that of the state or None)"""
    constants = (w0,) if operator == "wkv7" else ()
    run = getattr(torch.ops.rwkv_bone, f"{operator}_backward")
    *gradients, d_state = run(*inputs, state, cu_seqlens, saved, dy, dlast, want_state, form, *constants)
    assert len(gradients) == len(INPUTS[operator])
    return gradients, d_state if want_state else None


def kept_or_again(keep: bool, function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments); unless `keep`, all of it is computed again in backward."""
    if keep or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)


def vectors(parameters: Sequence[Tensor | None], like: Tensor) -> list[Any]:
    """Parameters of C numbers each as the regions take them: [C], all of one dtype."""
    given = [p for p in parameters if p is not None]
    if any(p.dtype != given[0].dtype for p in given) or given[0].dtype not in (like.dtype, torch.float32):
        return [None if p is None else widened(p, like).flatten() for p in parameters]
    return [None if p is None else p.flatten() for p in parameters]


def summed(g: Tensor, parameter: Any, needed: Any) -> Any:
    """A gradient [C] as one of its parameter, None unless it is needed."""
    return g.view(parameter.shape).to(parameter.dtype) if needed else None


def product_gradient(hidden: Any, g: Tensor, weight: Any, needed: Any) -> Any:
    """The gradient of `weight` in hidden @ weight, None unless it is needed."""
    return (hidden.flatten(0, -2).t() @ g.flatten(0, -2)).to(weight.dtype) if needed else None
