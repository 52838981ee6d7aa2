"""RWKV-7's recurrence as one differentiable PyTorch operator. The definition is ops.reference.wkv7_reference.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_bone.ops import native
from rwkv_bone.ops.arguments import check, choose_form, sequences
from rwkv_bone.ops.chunked import wkv7_chunked
from rwkv_bone.ops.reference import each_document, wkv7_reference
from rwkv_bone.ops.sizes import saved_floats


def wkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, T, H, N] in r's dtype, and with output_state also the state after the last token [B, H, N, N] float32.

    r, k, v, a, b   [B, T, H, N], one dtype: float32, bfloat16, or float64 (op "torch" and "reference" only)
    w               [B, T, H, N], the raw decay x: decay = exp(-exp(-0.5) * sigmoid(x)). Taken as float32: give it as
                    float32 where you can, bfloat16 moves slow decays by up to 3 %
    state           [B, H, N, N], rows = value index, columns = key index; None = zeros. Taken as float32
    cu_seqlens      int64 [D + 1], rising from 0 to T: B is 1 and holds D packed documents, document d in tokens
                    cu_seqlens[d] up to cu_seqlens[d + 1]. Each has its own state, so states are [D, H, N, N]; results
                    and gradients are those of each document alone
    op              "auto", "cuda", "cpu", "torch" or "reference": see ops.select_op

    Arithmetic and states are float32 (float64 for float64 inputs). Differentiable once, in everything. Under autocast
    r, k, v, a, b are cast to its dtype. Raises UserError for a wrong shape, dtype, device or op, and for
    wrong offsets if they are on the processor; on a GPU their values are not looked at and must be right.
    """
    if torch.is_autocast_enabled(r.device.type):
        lower = torch.get_autocast_dtype(r.device.type)
        common = lower if lower in native.DTYPES else torch.float32
        r, k, v, a, b = (x.to(common) for x in (r, k, v, a, b))
    check("wkv7", r=r, w=w, k=k, v=v, a=a, b=b, state=state, cu_seqlens=cu_seqlens)
    _, _, H, N = r.shape
    form = choose_form("wkv7", op, r.device.type, r.dtype == torch.float64, N)
    wide = torch.promote_types(r.dtype, torch.float32)
    w = w.to(wide)
    state = None if state is None else state.to(wide)
    if form in ("cpu", "cuda"):
        inputs = [x for x in (r, w, k, v, a, b, state) if x is not None]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        y, last, _ = wkv7_forward(r, w, k, v, a, b, state, cu_seqlens, save)
        return (y, last) if output_state else y
    if state is None:
        state = torch.zeros(sequences(r, cu_seqlens), H, N, N, dtype=wide, device=r.device)
    if form == "torch":
        y, last = wkv7_chunked(r=r, w=w, k=k, v=v, a=a, b=b, state=state, cu_seqlens=cu_seqlens)
    else:
        tensors = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
        tensors = {name: x.to(wide) for name, x in tensors.items()}
        with torch.autocast(r.device.type, enabled=False):
            y, last = each_document(wkv7_reference, cu_seqlens=cu_seqlens, state=state, **tensors)
        y = y.to(r.dtype)
    return (y, last) if output_state else y


@torch.library.custom_op("rwkv_bone::wkv7_forward", mutates_args=())
def wkv7_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernel of r's device: (y, last state, what backward needs: empty unless `save`)."""
    r, w, k, v, a, b, state, cu_seqlens = map(native.ready, (r, w, k, v, a, b, state, cu_seqlens))
    y, last = _outputs(r, cu_seqlens)
    saved = native.scratch("wkv7", "saved_floats", r, cu_seqlens) if save else w.new_empty(0)
    native.call("wkv7", "forward", r, cu_seqlens, r, w, k, v, a, b, state, y, last, saved if save else None)
    return y, last, saved


@torch.library.custom_op("rwkv_bone::wkv7_backward", mutates_args=())
def wkv7_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, a, b and the state (empty unless `want_state`)."""
    r, w, k, v, a, b, state, cu_seqlens, dy, dlast = map(native.ready, (r, w, k, v, a, b, state, cu_seqlens, dy, dlast))
    grads = _gradients(r, w, cu_seqlens, want_state)
    workspace = native.scratch("wkv7", "workspace_floats", r, cu_seqlens)
    d_inputs, d_state = grads[:6], grads[6] if want_state else None
    native.call(
        "wkv7", "backward", r, cu_seqlens, r, w, k, v, a, b, state, saved, dy, dlast, workspace, *d_inputs, d_state
    )
    return grads


def _outputs(r: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    _, _, H, N = r.shape
    return r.new_empty(r.shape), r.new_empty(sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)


def _gradients(r: Tensor, w: Tensor, cu_seqlens: Tensor | None, want_state: bool) -> tuple[Tensor, ...]:
    _, _, H, N = r.shape
    dr, dk, dv, da, db = (r.new_empty(r.shape) for _ in range(5))
    states = (sequences(r, cu_seqlens), H, N, N) if want_state else 0
    return dr, w.new_empty(w.shape), dk, dv, da, db, w.new_empty(states)


@wkv7_forward.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, save):
    sizes = (*r.shape, native.documents(cu_seqlens))
    size = saved_floats("wkv7", r.device.type, *sizes) if save else 0
    return *_outputs(r, cu_seqlens), w.new_empty(size)


@wkv7_backward.register_fake
def _(r, w, k, v, a, b, state, cu_seqlens, saved, dy, dlast, want_state):
    return _gradients(r, w, cu_seqlens, want_state)


def _keep_for_backward(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    # Otherwise autograd fills in zeros as large as `saved`, which nobody differentiates.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dlast, _):
    r, w, k, v, a, b, state, cu_seqlens, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(r)
    want_state = state is not None and ctx.needs_input_grad[6]
    *grads, d_state = wkv7_backward(r, w, k, v, a, b, state, cu_seqlens, saved, dy, dlast, want_state)
    return *grads, d_state if want_state else None, None, None


wkv7_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
