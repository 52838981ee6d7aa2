"""The compiled kernels of every WKV operator as PyTorch operators, so that autograd and torch.compile take them.

`operator` is "wkv7", "wkv6" or "wkv5", and `inputs` are the tensors that `launches.INPUTS` names, in its order. Those
of them that are [H, N] are shared by all sequences. `form` is "cpu" or one of CUDA's (ops/choice.py): which kernels a
call takes is decided inside the operator, from its sizes, and backward decides as forward did.

WKV-7 may have `w0`, a constant: then w is of r's dtype, and the decay is w + w0, added in float32.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv_bone.ops import choice, native, sizes
from rwkv_bone.ops.arguments import sequences
from rwkv_bone.ops.launches import INPUTS
from rwkv_bone.ops.register import define

Result = TypeVar("Result")


def run(
    operator: str,
    inputs: dict[str, Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, last state), differentiable. The arguments are checked already, and of the dtypes that the kernels take."""
    ordered = [inputs[name] for name in INPUTS[operator]]
    wanted = any(x.requires_grad for x in ordered) or (state is not None and state.requires_grad)
    save = wanted and torch.is_grad_enabled()
    constants = (w0,) if operator == "wkv7" else ()
    forward = getattr(torch.ops.rwkv_bone, f"{operator}_forward")
    y, last, _ = forward(*ordered, state, cu_seqlens, save, form, *constants)
    return y, last


def _forward(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernels: (y, last state, what backward needs: empty unless `save`)."""
    y, last, saved = _outputs(operator, inputs, state, cu_seqlens, save, form)
    label, problem = _problem(operator, inputs, cu_seqlens, form)
    offsets, *given = map(native.ready, (cu_seqlens, *_decayed(label, inputs, w0), state))
    extra = _extra(operator, label, w0)
    if sizes.chunking(label):
        extra.append(saved.new_empty(sizes.forward_workspace_floats(operator, label, *problem, save=save)))
    native.call(operator, "forward", y, offsets, *given, y, last, saved if save else None, *extra, label=label)
    return y, last, saved


def _outputs(
    operator: str,
    inputs: Sequence[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What _forward returns, not yet filled in."""
    r = inputs[0]
    B, T, H, N = r.shape
    last = r.new_empty(sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)
    size = 0
    if save:
        # Enough for whatever the call may choose: a size that followed the choice would bind a trace to it.
        for label in choice.labels(form, operator, r.dtype, N):
            size = torch.sym_max(size, sizes.saved_floats(operator, label, B, T, H, N, native.documents(cu_seqlens)))
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
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, and last that of the state: empty unless `want_state`."""
    r = inputs[0]
    *gradients, d_state = _gradients(operator, inputs, state, cu_seqlens, saved, dy, dlast, want_state, form)
    label, problem = _problem(operator, inputs, cu_seqlens, form)
    decayed = _decayed(label, inputs, w0)
    # What all sequences share comes as a row per sequence: summed here, the order does not depend on the threads.
    rows = [
        gradient if x.dim() == 4 else x.new_empty(sequences(r, cu_seqlens), *x.shape)
        for x, gradient in zip(decayed, gradients, strict=True)
    ]
    if decayed is not inputs:
        rows[1] = torch.empty_like(decayed[1])  # dw as these kernels write it
    workspace = saved.new_empty(sizes.workspace_floats(operator, label, *problem))
    offsets, *given = map(native.ready, (cu_seqlens, *decayed, state, saved, dy, dlast))
    tensors = (*given, *_extra(operator, label, w0), workspace, *rows, d_state if want_state else None)
    native.call(operator, "backward", r, offsets, *tensors, label=label)
    for gradient, row in zip(gradients, rows, strict=True):
        if row.dim() != gradient.dim():
            torch.sum(row, dim=0, out=gradient)
        elif row is not gradient:
            gradient.copy_(row)
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
    form: str,
    w0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What _backward returns, not yet filled in."""
    _, _, H, N = inputs[0].shape
    states = (sequences(inputs[0], cu_seqlens), H, N, N) if want_state else 0
    return *(x.new_empty(x.shape) for x in inputs), saved.new_empty(states)


def _problem(
    operator: str, inputs: Sequence[Tensor], cu_seqlens: Tensor | None, form: str
) -> tuple[str, tuple[int, int, int, int, int]]:
    """(which kernels the call takes, (B, T, H, N, D))"""
    r = inputs[0]
    B, T, H, N = r.shape
    problem = (B, T, H, N, native.documents(cu_seqlens))
    return choice.label(form, operator, r.dtype, problem, r.device), problem


def _decayed(label: str, inputs: Sequence[Tensor], w0: Tensor | None) -> Sequence[Tensor]:
    """The inputs as these kernels take them: CUDA's sequential ones do not add w0 themselves."""
    if w0 is None or label != sizes.EXACT:
        return inputs
    r, w, *others = inputs
    return r, w.float() + w0, *others


def _extra(operator: str, label: str, w0: Tensor | None) -> list[Tensor | None]:
    """What WKV-7's kernels take besides, but for CUDA's sequential ones."""
    return [native.ready(w0)] if operator == "wkv7" and label != sizes.EXACT else []


def _register(operator: str) -> None:
    """Makes torch.ops.rwkv_bone.<operator>_forward and _backward, with an argument for each input: lists are slow."""
    count = len(INPUTS[operator])

    def flat(function: Callable[..., Result]) -> Callable[..., Result]:
        return lambda *arguments: function(operator, arguments[:count], *arguments[count:])

    def keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        given, (_, form, *constants) = inputs[: count + 2], inputs[count + 2 :]
        ctx.save_for_backward(*given, output[2], *constants)
        ctx.form = form
        # Otherwise autograd fills in zeros as large as `saved`, which nobody differentiates.
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # only once: a checkpoint hands them out once
        given, (saved, *constants) = kept[: count + 2], kept[count + 2 :]
        if dy is None:
            dy = torch.zeros_like(given[0])
        want_state = ctx.needs_input_grad[count]
        *gradients, d_state = backward(*given, saved, dy, dlast, want_state, ctx.form, *constants)
        return *gradients, d_state if want_state else None, *[None] * (3 + len(constants))

    tensors = ", ".join(f"Tensor {name}" for name in INPUTS[operator])
    given = f"{tensors}, Tensor? state, Tensor? cu_seqlens"
    chosen = "str form, Tensor? w0" if operator == "wkv7" else "str form"
    define(
        f"{operator}_forward",
        f"({given}, bool save, {chosen}) -> (Tensor, Tensor, Tensor)",
        flat(_forward),
        flat(_outputs),
    )
    backward = define(
        f"{operator}_backward",
        f"({given}, Tensor saved, Tensor dy, Tensor? dlast, bool want_state, {chosen}) -> "
        f"({', '.join(['Tensor'] * (count + 1))})",
        flat(_backward),
        flat(_gradients),
    )
    torch.library.register_autograd(f"rwkv_bone::{operator}_forward", differentiate, setup_context=keep_for_backward)


for _operator in INPUTS:
    _register(_operator)
