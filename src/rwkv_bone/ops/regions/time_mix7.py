"""RWKV-7's time mix between its projections, as one differentiable function: pre7, the WKV operator, post7.

For backward it keeps what the projections and the first halves of the low-rank networks gave, which is less than what
is made of it: the second halves, gates, keys and values are computed again. With `keep_wkv` it also keeps what the WKV
operator gave; otherwise this runs again too.

Sizes: B batch, T tokens, C channels, H heads, N head size, D rank of a low-rank network.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions import recurrence, twins
from rwkv_bone.ops.regions.twins import widened
from rwkv_bone.ops.wkv7 import wkv7


class Parameters(NamedTuple):
    """Of a time mix, under upstream's names; v0 and v2 are None in the first layer."""

    w0: Tensor
    w2: Tensor
    a0: Tensor
    a2: Tensor
    v0: Tensor | None
    v2: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    g2: Tensor
    ln_weight: Tensor
    ln_bias: Tensor


class Activations(NamedTuple):
    """[B, T, C] r, k0, v0 as the projections give them, [B, T, D] the hidden layers of the low-rank networks.

    The first layer has neither v nor v_first [B, T, C], the first layer's v0.
    """

    r: Tensor
    k0: Tensor
    v0: Tensor
    w: Tensor  # after tanh
    a: Tensor
    v: Tensor | None
    g: Tensor  # after sigmoid
    v_first: Tensor | None


def time_mix7(
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
    """(what the output projection takes [B, T, C], last state [B, H, N, N]): see twins.pre7_forward and post7_forward.

    state, cu_seqlens, op: as in ops.wkv7. UserError if they do not fit.
    """
    r = activations.r
    if torch.is_autocast_enabled(r.device.type):
        with torch.autocast(r.device.type, enabled=False):
            return time_mix7(activations, parameters, state, cu_seqlens, N=N, eps=eps, keep_wkv=keep_wkv, op=op)
    dtype = r.dtype if r.dtype in recurrence.DTYPES else torch.float32
    given: Any = [None if x is None else x.to(dtype) for x in activations]
    activations = Activations(*given)
    state = None if state is None else widened(state, activations.r)
    form = recurrence.checked_form("wkv7", activations.r, state, cu_seqlens, N, op)
    tensors = (*activations, state, cu_seqlens, *parameters)
    if form in regions.PLAIN:
        z, last = recurrence.kept_or_again(keep_wkv, _plain, N, eps, form, *tensors)
    else:
        keep = keep_wkv and torch.is_grad_enabled()
        z, last = _TimeMix7.apply(N, eps, keep, form, *tensors)
    return z.to(r.dtype), last


def _plain(N: int, eps: float, form: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own gradients, for the operators in PyTorch."""
    x, state, cu_seqlens, parameters = _parts(tensors)
    _, _, inputs, _ = _before(twins, x, parameters, N, want_w=True)
    names = ("r", "w", "k", "v", "a", "b")
    y, last = wkv7(
        **dict(zip(names, inputs, strict=True)), state=state, cu_seqlens=cu_seqlens, output_state=True, op=form
    )
    return _after(twins, x, parameters, inputs, y, N, eps), last


class _TimeMix7(torch.autograd.Function):
    """The compiled operators'."""

    @staticmethod
    def forward(ctx: Any, N: int, eps: float, keep: bool, form: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        x, state, cu_seqlens, parameters = _parts(tensors)
        region = regions.form(form, x.r, N)
        # Where the decay's bias is a constant the kernels take the rest of it in the activations' dtype.
        apart = not parameters.w0.requires_grad
        _, _, inputs, w0 = _before(region, x, parameters, N, want_w=not apart)
        y, last, saved = recurrence.forward("wkv7", inputs, state, cu_seqlens, keep, form, w0)
        z = _after(region, x, parameters, inputs, y, N, eps)
        ctx.save_for_backward(*tensors, *((y, saved) if keep else ()))
        ctx.N, ctx.eps, ctx.form, ctx.apart = N, eps, form, apart
        ctx.set_materialize_grads(False)
        return z, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # only once: a checkpoint hands them out once
        x, state, cu_seqlens, parameters = _parts(tensors[:COUNT])
        N, eps, form = ctx.N, ctx.eps, ctx.form
        region = regions.form(form, x.r, N)
        need_x, need_state, _, need = _parts(ctx.needs_input_grad[4:])
        dz = torch.zeros_like(x.r) if dz is None else dz.contiguous()

        pa, pv, inputs, w0 = _before(region, x, parameters, N, want_w=not ctx.apart)
        if len(tensors) > COUNT:
            y, saved = tensors[COUNT:]
        else:
            y, _, saved = recurrence.forward("wkv7", inputs, state, cu_seqlens, True, form, w0)

        # From the result back to the operator.
        r, _, k, v, _, _ = (tensor.flatten(-2) for tensor in inputs)
        _, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias = _vectors(parameters, x.r)
        g = x.g @ parameters.g2.to(dz.dtype)
        want = need.r_k or need.ln_weight or need.ln_bias
        dy, dr_bonus, dk_bonus, dv_bonus, dg, d_r_k, d_ln_weight, d_ln_bias = region.post7_backward(
            y.flatten(-2), r, k, v, g, r_k, ln_weight, ln_bias, N, eps, dz, want
        )
        del y, g
        (dr, *gradients), dstate = recurrence.backward(
            "wkv7", inputs, state, cu_seqlens, saved, dy.view(inputs[0].shape), dlast, need_state, form, w0
        )
        del saved, inputs, k, v, dy

        # And from there to what it was made of.
        dw, dk, dv, da, db = (gradient.flatten(-2) for gradient in gradients)
        del gradients
        want = need.w0 or need.a0 or need.v0 or need.k_k or need.k_a
        dpw, dpa, dpv, dk0, dv0, dv_first, d_w0, d_a0, d_v0, d_k_k, d_k_a = region.pre7_backward(
            pa, pv, x.k0, x.v0, x.v_first, a0, v0, k_k, k_a, N, dw, dk, dv, da, db, dk_bonus, dv_bonus, want
        )
        p = parameters

        def down(g: Tensor, weight: Tensor | None, needed: Any) -> Any:
            return g @ weight.to(g.dtype).t() if weight is not None and needed else None

        dx = Activations(
            r=dr.flatten(-2) + dr_bonus,
            k0=dk0,
            v0=dv0,
            w=down(dpw, p.w2, need_x.w),
            a=down(dpa, p.a2, need_x.a),
            v=down(dpv, p.v2, need_x.v),
            g=down(dg, p.g2, need_x.g),
            v_first=None if x.v_first is None else dv_first,
        )
        dp = Parameters(
            w0=recurrence.summed(d_w0, p.w0, need.w0),
            w2=recurrence.product_gradient(x.w, dpw, p.w2, need.w2),
            a0=recurrence.summed(d_a0, p.a0, need.a0),
            a2=recurrence.product_gradient(x.a, dpa, p.a2, need.a2),
            v0=recurrence.summed(d_v0, p.v0, need.v0),
            v2=recurrence.product_gradient(x.v, dpv, p.v2, need.v2),
            k_k=recurrence.summed(d_k_k, p.k_k, need.k_k),
            k_a=recurrence.summed(d_k_a, p.k_a, need.k_a),
            r_k=recurrence.summed(d_r_k, p.r_k, need.r_k),
            g2=recurrence.product_gradient(x.g, dg, p.g2, need.g2),
            ln_weight=recurrence.summed(d_ln_weight, p.ln_weight, need.ln_weight),
            ln_bias=recurrence.summed(d_ln_bias, p.ln_bias, need.ln_bias),
        )
        return None, None, None, None, *dx, dstate, None, *dp


COUNT = len(Activations._fields) + 2 + len(Parameters._fields)


def _parts(tensors: tuple[Any, ...]) -> tuple[Activations, Any, Any, Parameters]:
    """(activations, state, cu_seqlens, parameters)"""
    count = len(Activations._fields)
    return Activations(*tensors[:count]), tensors[count], tensors[count + 1], Parameters(*tensors[count + 2 :])


def _vectors(p: Parameters, like: Tensor) -> list[Any]:
    return recurrence.vectors((p.w0, p.a0, p.v0, p.k_k, p.k_a, p.r_k, p.ln_weight, p.ln_bias), like)


def _before(
    region: ModuleType, x: Activations, p: Parameters, N: int, want_w: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """(pa, pv, the operator's inputs r w k v a b [B, T, H, N], its w0 [H, N] if w is without it)"""
    dtype = x.r.dtype
    w0, a0, v0, k_k, k_a, *_ = _vectors(p, x.r)
    pw, pa = x.w @ p.w2.to(dtype), x.a @ p.a2.to(dtype)  # each [B, T, C]
    pv = None if x.v is None or p.v2 is None else x.v @ p.v2.to(dtype)
    w, k, v, a, b = region.pre7_forward(pw, pa, pv, x.k0, x.v0, x.v_first, w0, a0, v0, k_k, k_a, N, want_w)
    inputs = (x.r, w if want_w else pw, k, x.v0 if pv is None else v, a, b)
    heads = tuple(tensor.unflatten(-1, (-1, N)) for tensor in inputs)
    return pa, pv, heads, None if want_w else widened(p.w0).view(-1, N)


def _after(
    region: ModuleType, x: Activations, p: Parameters, inputs: tuple[Tensor, ...], y: Tensor, N: int, eps: float
) -> Tensor:
    r, _, k, v, _, _ = (tensor.flatten(-2) for tensor in inputs)
    *_, r_k, ln_weight, ln_bias = _vectors(p, x.r)
    return region.post7_forward(y.flatten(-2), r, k, v, x.g @ p.g2.to(x.r.dtype), r_k, ln_weight, ln_bias, N, eps)
