"""The compiled kernels of every WKV operator as PyTorch operators, so that autograd and torch.compile take them.

`operator` is "wkv7", "wkv6" or "wkv5", and `inputs` are the tensors that `launches.INPUTS` names, in its order. Those
of them that are [H, N] are shared by all sequences.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv_bone.ops import native, sizes
from rwkv_bone.ops.arguments import sequences
from rwkv_bone.ops.launches import INPUTS

Result = TypeVar("Result")


def run(
    operator: str, inputs: dict[str, Tensor], state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, last state), differentiable. The arguments are checked already, and of the dtypes that the kernels take."""
    ordered = [inputs[name] for name in INPUTS[operator]]
    wanted = any(x.requires_grad for x in ordered) or (state is not None and state.requires_grad)
    save = wanted and torch.is_grad_enabled()
    y, last, _ = getattr(torch.ops.rwkv_bone, f"{operator}_forward")(*ordered, state, cu_seqlens, save)
    return y, last


def _forward(
    operator: str, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernel of r's device: (y, last state, what backward needs: empty unless `save`)."""
    y, last, saved = _outputs(operator, inputs, state, cu_seqlens, save)
    offsets, *given = map(native.ready, (cu_seqlens, *inputs, state))
    native.call(operator, "forward", y, offsets, *given, y, last, saved if save else None)
    return y, last, saved


def _outputs(
    operator: str, inputs: Sequence[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What _forward returns, not yet filled in."""
    r = inputs[0]
    _, _, H, N = r.shape
    last = r.new_empty(sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)
    size = _floats(sizes.saved_floats, operator, r, cu_seqlens) if save else 0
    return r.new_empty(r.shape), last, last.new_empty(size)


def _backward(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, and last that of the state: empty unless `want_state`."""
    r = inputs[0]
    *gradients, d_state = _gradients(operator, inputs, state, cu_seqlens, saved, dy, dlast, want_state)
    # What all sequences share comes as a row per sequence: summed here, the order does not depend on the threads.
    rows = [x if x.dim() == 4 else x.new_empty(sequences(r, cu_seqlens), *x.shape) for x in gradients]
    workspace = saved.new_empty(_floats(sizes.workspace_floats, operator, r, cu_seqlens))
    offsets, *given = map(native.ready, (cu_seqlens, *inputs, state, saved, dy, dlast))
    native.call(operator, "backward", r, offsets, *given, workspace, *rows, d_state if want_state else None)
    for gradient, row in zip(gradients, rows, strict=True):
        if row is not gradient:
            torch.sum(row, dim=0, out=gradient)
    return *gradients, d_state


def _gradients(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, ...]:
    """What _backward returns, not yet filled in."""
    _, _, H, N = inputs[0].shape
    states = (sequences(inputs[0], cu_seqlens), H, N, N) if want_state else 0
    return *(x.new_empty(x.shape) for x in inputs), saved.new_empty(states)


def _floats(how_many: Callable[..., int], operator: str, r: Tensor, cu_seqlens: Tensor | None) -> int:
    return how_many(operator, r.device.type, *r.shape, native.documents(cu_seqlens))


def _register(operator: str) -> None:
    """Makes torch.ops.rwkv_bone.<operator>_forward and _backward, with an argument for each input: lists are slow."""
    count = len(INPUTS[operator])

    def flat(function: Callable[..., Result]) -> Callable[..., Result]:
        return lambda *arguments: function(operator, arguments[:count], *arguments[count:])

    def keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        # Otherwise autograd fills in zeros as large as `saved`, which nobody differentiates.
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0])
        want_state = ctx.needs_input_grad[count]
        *gradients, d_state = backward(*tensors, saved, dy, dlast, want_state)
        return *gradients, d_state if want_state else None, None, None

    tensors = ", ".join(f"Tensor {name}" for name in INPUTS[operator])
    given = f"{tensors}, Tensor? state, Tensor? cu_seqlens"
    forward = torch.library.custom_op(
        f"rwkv_bone::{operator}_forward",
        flat(_forward),
        mutates_args=(),
        schema=f"({given}, bool save) -> (Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        f"rwkv_bone::{operator}_backward",
        flat(_backward),
        mutates_args=(),
        schema=f"({given}, Tensor saved, Tensor dy, Tensor? dlast, bool want_state) -> "
        f"({', '.join(['Tensor'] * (count + 1))})",
    )
    forward.register_fake(flat(_outputs))
    backward.register_fake(flat(_gradients))
    forward.register_autograd(differentiate, setup_context=keep_for_backward)


for _operator in INPUTS:
    _register(_operator)
