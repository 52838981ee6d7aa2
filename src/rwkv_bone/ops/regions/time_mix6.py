"""RWKV-6's and RWKV-5's time mix between their projections, as one differentiable function: decay, WKV operator, norm
and gate.

For backward it keeps what the projections and the first half of the decay's low-rank network gave. With `keep_wkv` it
also keeps what the WKV operator gave; otherwise this runs again.

Sizes: B batch, T tokens, C channels, H heads, N head size, D rank of the decay's network.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions import recurrence, twins
from rwkv_bone.ops.regions.twins import over_tokens, widened
from rwkv_bone.ops.wkv6 import wkv5, wkv6


class Parameters(NamedTuple):
    """Of a time mix. RWKV-5, whose decay is the same for every token, has no decay_w2."""

    decay: Tensor  # of C numbers, before its activation
    decay_w2: Tensor | None  # [D, C]
    u: Tensor  # [H, N], the bonus
    ln_weight: Tensor
    ln_bias: Tensor


class Activations(NamedTuple):
    """[B, T, C] r, k, v and the gate before silu as the projections give them; w [B, T, D], RWKV-6's alone: the decay
    network's hidden layer, after tanh.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    w: Tensor | None


def time_mix6(
    activations: Activations,
    parameters: Parameters,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    N: int,
    eps: float,
    keep_wkv: bool,
    op: str,
) -> tuple[Tensor, Tensor]:
    """(what the output projection takes [B, T, C], last state [B, H, N, N]): see twins.gated_norm_forward.

    state, cu_seqlens, op: as in ops.wkv6. UserError if they do not fit.
    """
    r = activations.r
    if torch.is_autocast_enabled(r.device.type):
        with torch.autocast(r.device.type, enabled=False):
            return time_mix6(activations, parameters, state, cu_seqlens, N=N, eps=eps, keep_wkv=keep_wkv, op=op)
    dtype = r.dtype if r.dtype in recurrence.DTYPES else torch.float32
    given: Any = [None if x is None else x.to(dtype) for x in activations]
    activations = Activations(*given)
    state = None if state is None else widened(state, activations.r)
    operator = "wkv5" if activations.w is None else "wkv6"
    form = recurrence.checked_form(operator, activations.r, state, cu_seqlens, N, op)
    tensors = (*activations, state, cu_seqlens, *parameters)
    if form in regions.PLAIN:
        z, last = recurrence.kept_or_again(keep_wkv, _plain, N, eps, form, *tensors)
    else:
        keep = keep_wkv and torch.is_grad_enabled()
        z, last = _TimeMix6.apply(N, eps, keep, form, *tensors)
    return z.to(r.dtype), last


def _plain(N: int, eps: float, form: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own gradients, for the operators in PyTorch."""
    x, state, cu_seqlens, p = _parts(tensors)
    inputs = dict(zip("rwkvu", _inputs(x, p, N), strict=True))
    run = wkv5 if x.w is None else wkv6
    y, last = run(**inputs, state=state, cu_seqlens=cu_seqlens, output_state=True, op=form)
    return _after(twins, x, p, y, N, eps), last


class _TimeMix6(torch.autograd.Function):
    """The compiled operators'."""

    @staticmethod
    def forward(ctx: Any, N: int, eps: float, keep: bool, form: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, state, cu_seqlens, p = _parts(tensors)
        operator = "wkv5" if x.w is None else "wkv6"
        y, last, saved = recurrence.forward(operator, _inputs(x, p, N), state, cu_seqlens, keep, form)
        z = _after(regions.form(form, x.r, N), x, p, y, N, eps)
        ctx.save_for_backward(*tensors, *((y, saved) if keep else ()))
        ctx.N, ctx.eps, ctx.form = N, eps, form
        ctx.set_materialize_grads(False)
        return z, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # only once: a checkpoint hands them out once
        x, state, cu_seqlens, p = _parts(tensors[:COUNT])
        N, form = ctx.N, ctx.form
        need_x, need_state, _, need = _parts(ctx.needs_input_grad[4:])
        dz = torch.zeros_like(x.r) if dz is None else dz.contiguous()
        operator, inputs = "wkv5" if x.w is None else "wkv6", _inputs(x, p, N)
        if len(tensors) > COUNT:
            y, saved = tensors[COUNT:]
        else:
            y, _, saved = recurrence.forward(operator, inputs, state, cu_seqlens, True, form)

        want = need.ln_weight or need.ln_bias
        dy, dgate, d_ln_weight, d_ln_bias = regions.form(form, x.r, N).gated_norm_backward(
            y.flatten(-2), x.gate, *_norm(p, x.r), N, ctx.eps, dz, want
        )
        del y
        (dr, dw, dk, dv, du), dstate = recurrence.backward(
            operator, inputs, state, cu_seqlens, saved, dy.view(inputs[0].shape), dlast, need_state, form
        )
        dr, dk, dv = (gradient.flatten(-2) for gradient in (dr, dk, dv))

        d_decay: Any = None
        d_w2 = d_hidden = None
        if x.w is None or p.decay_w2 is None:
            d_decay = recurrence.summed(dw, p.decay, need.decay)
        else:
            dw = dw.flatten(-2)
            d_decay = recurrence.summed(over_tokens(dw), p.decay, True) if need.decay else None
            dw = dw.to(dz.dtype)
            d_w2 = recurrence.product_gradient(x.w, dw, p.decay_w2, need.decay_w2)
            d_hidden = dw @ p.decay_w2.to(dz.dtype).t() if need_x.w else None
        dx = Activations(r=dr, k=dk, v=dv, gate=dgate, w=d_hidden)
        dp = Parameters(
            decay=d_decay,
            decay_w2=d_w2,
            u=recurrence.summed(du, p.u, need.u),
            ln_weight=recurrence.summed(d_ln_weight, p.ln_weight, need.ln_weight),
            ln_bias=recurrence.summed(d_ln_bias, p.ln_bias, need.ln_bias),
        )
        return None, None, None, None, *dx, dstate, None, *dp


COUNT = len(Activations._fields) + 2 + len(Parameters._fields)


def _parts(tensors: tuple[Any, ...]) -> tuple[Activations, Any, Any, Parameters]:
    """(activations, state, cu_seqlens, parameters)"""
    count = len(Activations._fields)
    return Activations(*tensors[:count]), tensors[count], tensors[count + 1], Parameters(*tensors[count + 2 :])


def _inputs(x: Activations, p: Parameters, N: int) -> tuple[Tensor, ...]:
    """The operator's inputs r w k v [B, T, H, N], RWKV-5's w and u [H, N]: the last two at least fp32.

    The operator turns w into the decay exp(-exp(w)): the exponent of an exponent, so not in bf16.
    """
    w = widened(p.decay, x.r)
    if x.w is not None and p.decay_w2 is not None:
        w = w + widened(x.w @ p.decay_w2.to(x.w.dtype))  # [B, T, C]
    r, k, v = (tensor.unflatten(-1, (-1, N)) for tensor in (x.r, x.k, x.v))
    w = w.view(-1, N) if x.w is None else w.unflatten(-1, (-1, N))
    return r, w, k, v, widened(p.u, x.r)


def _norm(p: Parameters, like: Tensor) -> list[Any]:
    return recurrence.vectors((p.ln_weight, p.ln_bias), like)


def _after(region: ModuleType, x: Activations, p: Parameters, y: Tensor, N: int, eps: float) -> Tensor:
    return region.gated_norm_forward(y.flatten(-2), x.gate, *_norm(p, x.r), N, eps)
