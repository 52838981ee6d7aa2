"""The compiled kernels of every WKV operator as a pair of PyTorch operators, so that autograd and torch.compile take
them.

`operator` is "wkv7", "wkv6" or "wkv5" and `inputs` are the tensors that `launches.INPUTS` names, in its order. What is
[H, N] among them is shared by all sequences.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_bone.ops import native
from rwkv_bone.ops.arguments import sequences
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.sizes import saved_floats


def run(
    operator: str, inputs: dict[str, Tensor], state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, last state), differentiable. The arguments are checked already, and of the dtypes that the kernels take."""
    ordered = [inputs[name] for name in INPUTS[operator]]
    wanted = any(x.requires_grad for x in ordered) or (state is not None and state.requires_grad)
    y, last, _ = forward(operator, ordered, state, cu_seqlens, wanted and torch.is_grad_enabled())
    return y, last


@torch.library.custom_op("rwkv_bone::wkv_forward", mutates_args=())
def forward(
    operator: str, inputs: list[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernel of r's device: (y, last state, what backward needs: empty unless `save`)."""
    y, last, nothing = _outputs(inputs[0], cu_seqlens)
    saved = native.scratch(operator, "saved_floats", y, cu_seqlens) if save else nothing
    offsets, *given = map(native.ready, (cu_seqlens, *inputs, state))
    native.call(operator, "forward", y, offsets, *given, y, last, saved if save else None)
    return y, last, saved


@torch.library.custom_op("rwkv_bone::wkv_backward", mutates_args=())
def backward(
    operator: str,
    inputs: list[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> list[Tensor]:
    """The gradients of the inputs, and last that of the state: empty unless `want_state`."""
    *gradients, d_state = _gradients(inputs, cu_seqlens, want_state)
    # What all sequences share comes as a row per sequence: summed here, the order does not depend on the threads.
    count = sequences(inputs[0], cu_seqlens)
    rows = [x if x.dim() == 4 else x.new_empty(count, *x.shape) for x in gradients]
    workspace = native.scratch(operator, "workspace_floats", inputs[0], cu_seqlens)
    offsets, *given = map(native.ready, (cu_seqlens, *inputs, state, saved, dy, dlast))
    made = (workspace, *rows, d_state if want_state else None)
    native.call(operator, "backward", inputs[0], offsets, *given, *made)
    for gradient, row in zip(gradients, rows, strict=True):
        if row is not gradient:
            torch.sum(row, dim=0, out=gradient)
    return [*gradients, d_state]


def _outputs(r: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and nothing saved, not yet filled."""
    _, _, H, N = r.shape
    state = r.new_empty(sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)
    return r.new_empty(r.shape), state, state.new_empty(0)


def _gradients(inputs: list[Tensor], cu_seqlens: Tensor | None, want_state: bool) -> list[Tensor]:
    _, _, H, N = inputs[0].shape
    states = (sequences(inputs[0], cu_seqlens), H, N, N) if want_state else 0
    d_state = inputs[0].new_empty(states, dtype=torch.float32)
    return [*(x.new_empty(x.shape) for x in inputs), d_state]


@forward.register_fake
def _(
    operator: str, inputs: list[Tensor], state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, last, nothing = _outputs(inputs[0], cu_seqlens)
    B, T, H, N = y.shape
    size = saved_floats(operator, y.device.type, B, T, H, N, native.documents(cu_seqlens)) if save else 0
    return y, last, nothing.new_empty(size)


@backward.register_fake
def _(
    operator: str,
    inputs: list[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> list[Tensor]:
    return _gradients(inputs, cu_seqlens, want_state)


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.operator, tensors, state, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, state, cu_seqlens, output[2])
    # Otherwise autograd fills in zeros as large as `saved`, which nobody differentiates.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple:
    *inputs, state, cu_seqlens, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    want_state = state is not None and ctx.needs_input_grad[2]
    *gradients, d_state = backward(ctx.operator, inputs, state, cu_seqlens, saved, dy, dlast, want_state)
    return None, gradients, d_state if want_state else None, None, None


forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
