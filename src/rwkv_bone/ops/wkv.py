"""What a call of a WKV operator does, whichever recurrence it is: check the arguments, choose a form, run it.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_bone.ops import compiled, native
from rwkv_bone.ops.arguments import ANY_DTYPE, check, choose_form, sequences
from rwkv_bone.ops.reference import each_document

Recurrence = Callable[..., tuple[Tensor, Tensor]]


class Operator(NamedTuple):
    """What is particular to an operator. `launches.INPUTS` names its inputs, in the order of the compiled kernels."""

    name: str
    per_head: tuple[str, ...]  # the inputs [H, N], which all sequences and tokens share; the others are [B, T, H, N]
    reference: Recurrence
    chunked: Recurrence


def run(
    operator: Operator,
    inputs: dict[str, Tensor],
    *,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    op: str,
    w0: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the public function of the operator returns; the arguments are described there (ops/wkv7.py)."""
    inputs = _as_under_autocast(inputs)
    constants = {} if w0 is None else {"w0": w0}
    per_head = (*operator.per_head, *constants)
    check(operator.name, **inputs, **constants, state=state, cu_seqlens=cu_seqlens, per_head=per_head)
    r, w = inputs["r"], inputs["w"]
    _, _, H, N = r.shape
    form = choose_form(operator.name, op, r.device.type, r.dtype, N)
    wide = torch.promote_types(r.dtype, torch.float32)
    inputs = {name: x.to(wide) if name in ANY_DTYPE else x for name, x in inputs.items()}
    state = None if state is None else state.to(wide)
    if w0 is not None:
        w0 = w0.to(wide)
        if form.startswith(("cuda", "cpu")) and w.dtype == r.dtype and not w0.requires_grad:
            inputs["w"] = w  # which saves its float32 copy
        else:
            inputs["w"], w0 = inputs["w"] + w0, None
    if form not in ("torch", "reference"):
        y, last = compiled.run(operator.name, inputs, state, cu_seqlens, form, w0)
        return (y, last) if output_state else y
    if state is None:
        state = torch.zeros(sequences(r, cu_seqlens), H, N, N, dtype=wide, device=r.device)
    if form == "torch":
        y, last = operator.chunked(**inputs, state=state, cu_seqlens=cu_seqlens)
    else:
        inputs = {name: x.to(wide) for name, x in inputs.items()}
        with torch.autocast(r.device.type, enabled=False):
            y, last = each_document(operator.reference, cu_seqlens=cu_seqlens, state=state, **inputs)
        y = y.to(r.dtype)
    return (y, last) if output_state else y


def _as_under_autocast(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    device_type = inputs["r"].device.type
    if not torch.is_autocast_enabled(device_type):
        return inputs
    lower = torch.get_autocast_dtype(device_type)
    common = lower if lower in native.DTYPES else torch.float32
    return {name: x if name in ANY_DTYPE else x.to(common) for name, x in inputs.items()}
