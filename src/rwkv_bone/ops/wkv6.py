"""RWKV-6's and RWKV-5's recurrence as differentiable PyTorch operators: one machinery, since they differ only in
whether the decay changes over time. The definition is ops.reference.wkv6_reference.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_bone.ops import native
from rwkv_bone.ops.arguments import check, choose_form, sequences
from rwkv_bone.ops.chunked6 import wkv6_chunked
from rwkv_bone.ops.reference import each_document, wkv6_reference
from rwkv_bone.ops.sizes import saved_floats


def wkv6(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, T, H, N] in r's dtype, and with output_state also the state after the last token [B, H, N, N] float32.

    r, k, v      [B, T, H, N], one dtype: float32, bfloat16, or float64 (op "torch" and "reference" only)
    w            [B, T, H, N], the raw decay: decay = exp(-exp(w)), any real number. Taken as float32: give it as
                 float32 where you can, bfloat16 moves slow decays by up to 3 %
    u            [H, N], the bonus of the current token. Taken as float32
    state        [B, H, N, N], rows = value index, columns = key index; None = zeros. Taken as float32
    cu_seqlens   int64 [D + 1], rising from 0 to T: B is 1 and holds D packed documents, document d in tokens
                 cu_seqlens[d] up to cu_seqlens[d + 1]. Each has its own state, so states are [D, H, N, N]; results and
                 gradients are those of each document alone
    op           "auto", "cuda", "cpu", "torch" or "reference": see ops.select_op

    Arithmetic and states are float32 (float64 for float64 inputs). Differentiable once, in everything. Under autocast
    r, k, v are cast to its dtype. Raises UserError for a wrong shape, dtype, device or op, and for wrong
    offsets if they are on the processor; on a GPU their values are not looked at and must be right.
    """
    return _wkv("wkv6", r, w, k, v, u, state, cu_seqlens, output_state, op)


def wkv5(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """As wkv6, with w [H, N]: the same decay for every sequence and token."""
    return _wkv("wkv5", r, w, k, v, u, state, cu_seqlens, output_state, op)


def _wkv(operator, r, w, k, v, u, state, cu_seqlens, output_state, op):
    if torch.is_autocast_enabled(r.device.type):
        lower = torch.get_autocast_dtype(r.device.type)
        common = lower if lower in native.DTYPES else torch.float32
        r, k, v = (x.to(common) for x in (r, k, v))
    per_head = ("u",) if operator == "wkv6" else ("u", "w")
    check(operator, r=r, w=w, k=k, v=v, u=u, state=state, cu_seqlens=cu_seqlens, per_head=per_head)
    _, _, H, N = r.shape
    form = choose_form(operator, op, r.device.type, r.dtype == torch.float64, N)
    wide = torch.promote_types(r.dtype, torch.float32)
    w, u = w.to(wide), u.to(wide)
    state = None if state is None else state.to(wide)
    if form in ("cpu", "cuda"):
        inputs = [x for x in (r, w, k, v, u, state) if x is not None]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        y, last, _ = wkv6_forward(r, w, k, v, u, state, cu_seqlens, save)
        return (y, last) if output_state else y
    if state is None:
        state = torch.zeros(sequences(r, cu_seqlens), H, N, N, dtype=wide, device=r.device)
    if form == "torch":
        y, last = wkv6_chunked(r=r, w=w.expand_as(r), k=k, v=v, u=u, state=state, cu_seqlens=cu_seqlens)
    else:
        tensors = {"r": r, "w": w, "k": k, "v": v, "u": u}
        tensors = {name: x.to(wide) for name, x in tensors.items()}
        with torch.autocast(r.device.type, enabled=False):
            y, last = each_document(wkv6_reference, cu_seqlens=cu_seqlens, state=state, **tensors)
        y = y.to(r.dtype)
    return (y, last) if output_state else y


def _operator(w: Tensor) -> str:
    """Which of the two it is: RWKV-5's decay has no batch and no time."""
    return "wkv6" if w.dim() == 4 else "wkv5"


@torch.library.custom_op("rwkv_bone::wkv6_forward", mutates_args=())
def wkv6_forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The compiled kernel of r's device: (y, last state, what backward needs: empty unless `save`)."""
    operator = _operator(w)
    r, w, k, v, u, state, cu_seqlens = map(native.ready, (r, w, k, v, u, state, cu_seqlens))
    y, last = _outputs(r, cu_seqlens)
    saved = native.scratch(operator, "saved_floats", r, cu_seqlens) if save else w.new_empty(0)
    native.call(operator, "forward", r, cu_seqlens, r, w, k, v, u, state, y, last, saved if save else None)
    return y, last, saved


@torch.library.custom_op("rwkv_bone::wkv6_backward", mutates_args=())
def wkv6_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, u and the state (empty unless `want_state`)."""
    operator = _operator(w)
    r, w, k, v, u, state, cu_seqlens, dy, dlast = map(native.ready, (r, w, k, v, u, state, cu_seqlens, dy, dlast))
    _, _, H, N = r.shape
    rows = (sequences(r, cu_seqlens), H, N)
    dr, dw, dk, dv, du, d_state = _gradients(r, w, u, cu_seqlens, want_state)
    # What all sequences share comes as a row per sequence: summed here, the order does not depend on the threads.
    dw_rows = dw if operator == "wkv6" else w.new_empty(rows)
    du_rows = u.new_empty(rows)
    workspace = native.scratch(operator, "workspace_floats", r, cu_seqlens)
    native.call(
        operator, "backward", r, cu_seqlens, r, w, k, v, u, state, saved, dy, dlast, workspace,
        dr, dw_rows, dk, dv, du_rows, d_state if want_state else None,
    )  # fmt: skip
    if operator == "wkv5":
        torch.sum(dw_rows, dim=0, out=dw)
    torch.sum(du_rows, dim=0, out=du)
    return dr, dw, dk, dv, du, d_state


def _outputs(r: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    _, _, H, N = r.shape
    return r.new_empty(r.shape), r.new_empty(sequences(r, cu_seqlens), H, N, N, dtype=torch.float32)


def _gradients(r: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor | None, want_state: bool) -> tuple[Tensor, ...]:
    _, _, H, N = r.shape
    dr, dk, dv = (r.new_empty(r.shape) for _ in range(3))
    states = (sequences(r, cu_seqlens), H, N, N) if want_state else 0
    return dr, w.new_empty(w.shape), dk, dv, u.new_empty(u.shape), w.new_empty(states)


@wkv6_forward.register_fake
def _(r, w, k, v, u, state, cu_seqlens, save):
    sizes = (*r.shape, native.documents(cu_seqlens))
    size = saved_floats(_operator(w), r.device.type, *sizes) if save else 0
    return *_outputs(r, cu_seqlens), w.new_empty(size)


@wkv6_backward.register_fake
def _(r, w, k, v, u, state, cu_seqlens, saved, dy, dlast, want_state):
    return _gradients(r, w, u, cu_seqlens, want_state)


def _keep_for_backward(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    # Otherwise autograd fills in zeros as large as `saved`, which nobody differentiates.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dlast, _):
    r, w, k, v, u, state, cu_seqlens, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(r)
    want_state = state is not None and ctx.needs_input_grad[5]
    *grads, d_state = wkv6_backward(r, w, k, v, u, state, cu_seqlens, saved, dy, dlast, want_state)
    return *grads, d_state if want_state else None, None, None


wkv6_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
