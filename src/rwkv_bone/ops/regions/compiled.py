"""The regions of the step as compiled operators: C++ on the processor (cuda/cpu/regions.cpp), CUDA on a GPU.

Signatures and meaning are those of twins.py, which is the definition. Each function here is a PyTorch operator,
`rwkv_bone::region_<name>`, so that torch.compile takes it; none of them knows autograd.

Activations are float32 or bfloat16, contiguous [B, T, C], C = H N. Parameters are vectors [C], all of one dtype: the
activations' or float32. Arithmetic is float32, rounded once at the results; sums over tokens are float32, in an order
that does not depend on the number of threads. What is not wanted comes back as a tensor of 0 elements.

Sizes: B batch, T tokens, C channels, H heads, N head size, M mixes, D documents, k rows of `last`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_bone.ops import native
from rwkv_bone.ops.arguments import sequences
from rwkv_bone.ops.build import BuildError
from rwkv_bone.ops.driver import DriverError
from rwkv_bone.ops.launches import HEAD_SIZES
from rwkv_bone.ops.native import DTYPES, documents, ready
from rwkv_bone.ops.regions import launches

LIBRARY = "regions"
LARGEST_HEAD = 1024  # LARGEST_N in cuda/cpu/regions.cpp


def mix_forward(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor) -> list[Tensor]:
    """Token shift and M lerps: x [B, T, C], shares [M, C] -> M tensors [B, T, C]. M is 1 to 6.

    `last` [k, C]: what stands before the first k sequences; before the others stand zeros.
    """
    return torch.ops.rwkv_bone.region_mix_forward(x, last, cu_seqlens, shares)


def mix_backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dlast [carried, C] float32, dshares [M, C] float32); x and last are read for `want_shares` only."""
    return torch.ops.rwkv_bone.region_mix_backward(list(grads), x, last, cu_seqlens, shares, carried, want_shares)


def mix6_forward(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, changes: Tensor
) -> list[Tensor]:
    """The same with shares [M, C] + changes [M, B, T, C]: RWKV-6's shares depend on the token."""
    return torch.ops.rwkv_bone.region_mix6_forward(x, last, cu_seqlens, shares, changes)


def mix6_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    changes: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dlast [carried, C] float32, dshares [M, C] float32, dchanges [M, B, T, C])"""
    return torch.ops.rwkv_bone.region_mix6_backward(
        list(grads), x, last, cu_seqlens, shares, changes, carried, want_shares
    )


def relu_square_forward(h: Tensor) -> Tensor:
    """relu(h)^2, of any shape."""
    return torch.ops.rwkv_bone.region_relu_square_forward(h)


def relu_square_backward(h: Tensor, g: Tensor) -> Tensor:
    """2 relu(h) g"""
    return torch.ops.rwkv_bone.region_relu_square_backward(h, g)


def pre7_forward(
    pw: Tensor,
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    want_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What RWKV-7's operator takes: (w float32, k, v, a, b). w is empty unless `want_w`, v if pv is None."""
    return torch.ops.rwkv_bone.region_pre7_forward(pw, pa, pv, k0, v0, v_first, w0, a0, v0_bias, k_k, k_a, N, want_w)


def pre7_backward(
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    dw: Tensor,
    dk: Tensor,
    dv: Tensor,
    da: Tensor,
    db: Tensor,
    dk_bonus: Tensor,
    dv_bonus: Tensor,
    want: bool,
) -> tuple[Tensor, ...]:
    """(dpw, dpa, dpv, dk0, dv0, dv_first, d_w0, d_a0, d_v0_bias, d_k_k, d_k_a): the last five [C] float32.

    dw is float32 or of the activations' dtype. Without pv, dpv, dv_first and d_v0_bias are empty; without `want` the
    last five are.
    """
    return torch.ops.rwkv_bone.region_pre7_backward(
        pa, pv, k0, v0, v_first, a0, v0_bias, k_k, k_a, N, dw, dk, dv, da, db, dk_bonus, dv_bonus, want
    )


def post7_forward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    N: int,
    eps: float,
) -> Tensor:
    """(GroupNorm(y) + bonus) g, [B, T, C]."""
    return torch.ops.rwkv_bone.region_post7_forward(y, r, k, v, g, r_k, ln_weight, ln_bias, N, eps)


def post7_backward(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    N: int,
    eps: float,
    dz: Tensor,
    want: bool,
) -> tuple[Tensor, ...]:
    """(dy, dr, dk, dv, dg, d_r_k, d_ln_weight, d_ln_bias): the last three [C] float32, empty without `want`."""
    return torch.ops.rwkv_bone.region_post7_backward(y, r, k, v, g, r_k, ln_weight, ln_bias, N, eps, dz, want)


def gated_norm_forward(y: Tensor, gate: Tensor, ln_weight: Tensor, ln_bias: Tensor, N: int, eps: float) -> Tensor:
    """GroupNorm(y) silu(gate), [B, T, C]."""
    return torch.ops.rwkv_bone.region_gated_norm_forward(y, gate, ln_weight, ln_bias, N, eps)


def gated_norm_backward(
    y: Tensor, gate: Tensor, ln_weight: Tensor, ln_bias: Tensor, N: int, eps: float, dz: Tensor, want: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, dgate, d_ln_weight, d_ln_bias): the last two [C] float32, empty without `want`."""
    return torch.ops.rwkv_bone.region_gated_norm_backward(y, gate, ln_weight, ln_bias, N, eps, dz, want)


def _run(
    name: str,
    like: Tensor,
    parameter: Tensor,
    sizes: Sequence[int],
    tensors: Sequence[Tensor | None],
    eps: float = 0.0,
) -> None:
    """Runs a region's kernel on `tensors` (None = null pointer), which are read and filled in.

    The activations' dtype and the device are those of `like`, the parameters' dtype that of `parameter`. `tensors` must
    live until this returns: see native.ready. Raises RuntimeError with the library's own words.
    """
    if like.device.type != "cpu":
        return _launch(name, like, parameter, sizes, tensors, eps)
    library = native.library(LIBRARY)
    code = getattr(library, f"region_{name}")(
        DTYPES[like.dtype],
        DTYPES[parameter.dtype],
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors]),
        ctypes.c_float(eps),
        torch.get_num_threads(),
    )
    if code:
        reason = library.regions_error(code).decode()
        raise RuntimeError(f"region_{name} failed on {like.device} with sizes {tuple(sizes)}: {reason}")


def _launch(
    name: str,
    like: Tensor,
    parameter: Tensor,
    sizes: Sequence[int],
    tensors: Sequence[Tensor | None],
    eps: float = 0.0,
) -> None:
    """The same on CUDA: its kernels are launched on the current stream. See launches.Unit.plan."""
    if not like.numel():
        return
    region, _, step = name.rpartition("_")
    offsets, wide, C = None, int(parameter.dtype == torch.float32), like.shape[-1]
    if region == "mix":
        offsets, *tensors = tensors
        region = "mix" if tensors[3] is None else "mix6"
        size, sizes = sizes[4], (*sizes, wide)
        wanted = step == "backward" and tensors[6] is not None
    elif region == "relu_square":
        size, wanted = 1, False
    else:
        rows, H, size, *codes = sizes
        sizes = (rows, H, size, wide, *(1 - code for code in codes), *([launches.bits(eps)] if eps else []))
        wanted = any(x is not None for x in tensors[-launches.TRAINED[region] :])
    dtype, workspace = native.NAMES[like.dtype], None
    if step == "backward" and region in launches.TRAINED:
        if wanted:
            floats = launches.workspace_floats(region, dtype, like.numel() // C, C, size)
            workspace = like.new_empty(floats, dtype=torch.float32)
        tensors = [*tensors, workspace]
    native.launch(launches.Unit(region, dtype, size), step, like, tuple(sizes), offsets, *tensors)


# What the operators are: a function that makes the results, not yet filled in (it serves torch.compile, too), and one
# that fills them in.


def _wanted(x: Tensor, shape: Sequence[int], wanted: bool) -> Tensor:
    """float32, of that shape if it is wanted, else empty."""
    return x.new_empty(shape if wanted else 0, dtype=torch.float32)


def _if_there(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0 if x is None else like.shape)


def _mix_forward_results(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(shares.shape[0])]


def _mix_forward(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor) -> list[Tensor]:
    results = _mix_forward_results(x, last, cu_seqlens, shares)
    given = [ready(x), _carried(x, last), ready(shares), None]
    _run("mix_forward", x, shares, _mix_sizes(x, last, cu_seqlens, shares, 0), [ready(cu_seqlens), *given, *results])
    return results


def _mix_backward_results(
    grads: Sequence[Tensor],
    x: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g = grads[0]
    dlast = g.new_empty(carried, g.shape[-1], dtype=torch.float32)
    return g.new_empty(g.shape), dlast, _wanted(g, shares.shape, want_shares)


def _mix_backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dlast, dshares = results = _mix_backward_results(grads, x, last, cu_seqlens, shares, carried, want_shares)
    sizes = _mix_sizes(dx, last, cu_seqlens, shares, carried)
    given = [ready(x), _carried(dx, last), ready(shares), None]
    if not want_shares:
        given[:2] = None, None
    filled = [dx, dlast, dshares if want_shares else None, None]
    _run("mix_backward", dx, shares, sizes, [ready(cu_seqlens), *given, *filled, *map(ready, grads)])
    return results


def _mix6_forward_results(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, changes: Tensor
) -> list[Tensor]:
    return _mix_forward_results(x, last, cu_seqlens, shares)


def _mix6_forward(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, changes: Tensor
) -> list[Tensor]:
    results = _mix_forward_results(x, last, cu_seqlens, shares)
    given = [ready(x), _carried(x, last), ready(shares), ready(changes)]
    _run("mix_forward", x, shares, _mix_sizes(x, last, cu_seqlens, shares, 0), [ready(cu_seqlens), *given, *results])
    return results


def _mix6_backward_results(
    grads: Sequence[Tensor],
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    changes: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _mix_backward_results(grads, x, last, cu_seqlens, shares, carried, want_shares)
    return *results, changes.new_empty(changes.shape)


def _mix6_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    shares: Tensor,
    changes: Tensor,
    carried: int,
    want_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _mix6_backward_results(grads, x, last, cu_seqlens, shares, changes, carried, want_shares)
    dx, dlast, dshares, dchanges = results
    sizes = _mix_sizes(dx, last, cu_seqlens, shares, carried)
    given = [ready(x), _carried(x, last), ready(shares), ready(changes)]
    filled = [dx, dlast, dshares if want_shares else None, dchanges]
    _run("mix_backward", dx, shares, sizes, [ready(cu_seqlens), *given, *filled, *map(ready, grads)])
    return results


def _carried(x: Tensor, last: Tensor | None) -> Tensor | None:
    return None if last is None else ready(last.to(x.dtype))


def _mix_sizes(
    x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, shares: Tensor, carried: int
) -> tuple[int, ...]:
    rows = 0 if last is None else min(last.shape[0], sequences(x, cu_seqlens))
    return *x.shape, documents(cu_seqlens), shares.shape[0], rows, carried


def _relu_square_forward_results(h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _relu_square_forward(h: Tensor) -> Tensor:
    result = h.new_empty(h.shape)
    _run("relu_square_forward", h, h, (h.numel(),), (ready(h), result))
    return result


def _relu_square_backward_results(h: Tensor, g: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _relu_square_backward(h: Tensor, g: Tensor) -> Tensor:
    result = h.new_empty(h.shape)
    _run("relu_square_backward", h, h, (h.numel(),), (ready(h), ready(g), result))
    return result


def _pre7_forward_results(
    pw: Tensor,
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    want_w: bool,
) -> tuple[Tensor, ...]:
    w, v = _wanted(k0, k0.shape, want_w), _if_there(k0, pv)
    return w, k0.new_empty(k0.shape), v, k0.new_empty(k0.shape), k0.new_empty(k0.shape)


def _pre7_forward(*arguments: Any) -> tuple[Tensor, ...]:
    pw, pa, pv, k0, v0, v_first, *parameters, N, want_w = arguments
    w, k, v, a, b = results = _pre7_forward_results(*arguments)
    filled = (w if want_w else None, k, v if pv is not None else None, a, b)
    given = [*map(ready, (pw, pa, pv, k0, v0, v_first, *parameters))]
    _run("pre7_forward", k0, parameters[0], _head_sizes(k0, N), (*given, *filled))
    return results


def _pre7_backward_results(
    pa: Tensor,
    pv: Tensor | None,
    k0: Tensor,
    v0: Tensor,
    v_first: Tensor | None,
    a0: Tensor,
    v0_bias: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    N: int,
    dw: Tensor,
    dk: Tensor,
    dv: Tensor,
    da: Tensor,
    db: Tensor,
    dk_bonus: Tensor,
    dv_bonus: Tensor,
    want: bool,
) -> tuple[Tensor, ...]:
    dpw, dpa, dk0, dv0 = (k0.new_empty(k0.shape) for _ in range(4))
    C = k0.shape[-1:]
    d_w0, d_a0, d_k_k, d_k_a = (_wanted(k0, C, want) for _ in range(4))
    d_v0_bias = _wanted(k0, C, want and pv is not None)
    return dpw, dpa, _if_there(k0, pv), dk0, dv0, _if_there(k0, pv), d_w0, d_a0, d_v0_bias, d_k_k, d_k_a


def _pre7_backward(*arguments: Any) -> tuple[Tensor, ...]:
    pa, pv, k0, v0, v_first, *parameters, N, dw, dk, dv, da, db, dk_bonus, dv_bonus, want = arguments
    results = _pre7_backward_results(*arguments)
    given = [*map(ready, (pa, pv, k0, v0, v_first, *parameters, dw, dk, dv, da, db, dk_bonus, dv_bonus))]
    sizes = (*_head_sizes(k0, N), DTYPES[dw.dtype])
    _run("pre7_backward", k0, parameters[0], sizes, (*given, *_not_empty(results)))
    return results


def _post7_forward_results(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _post7_forward(y: Tensor, *arguments: Any) -> Tensor:
    *others, N, eps = arguments
    z = y.new_empty(y.shape)
    _run("post7_forward", y, others[-1], _head_sizes(y, N), (*map(ready, (y, *others)), z), eps)
    return z


def _post7_backward_results(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    want = arguments[-1]
    return *(y.new_empty(y.shape) for _ in range(5)), *(_wanted(y, y.shape[-1:], want) for _ in range(3))


def _post7_backward(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, N, eps, dz, _ = arguments
    results = _post7_backward_results(y, *arguments)
    tensors = (*map(ready, (y, *others, dz)), *_not_empty(results))
    _run("post7_backward", y, others[-1], _head_sizes(y, N), tensors, eps)
    return results


def _gated_norm_forward_results(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _gated_norm_forward(y: Tensor, *arguments: Any) -> Tensor:
    *others, N, eps = arguments
    z = y.new_empty(y.shape)
    _run("gated_norm_forward", y, others[-1], _head_sizes(y, N), (*map(ready, (y, *others)), z), eps)
    return z


def _gated_norm_backward_results(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    want = arguments[-1]
    return *(y.new_empty(y.shape) for _ in range(2)), *(_wanted(y, y.shape[-1:], want) for _ in range(2))


def _gated_norm_backward(y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, N, eps, dz, _ = arguments
    results = _gated_norm_backward_results(y, *arguments)
    tensors = (*map(ready, (y, *others, dz)), *_not_empty(results))
    _run("gated_norm_backward", y, others[-1], _head_sizes(y, N), tensors, eps)
    return results


def _head_sizes(x: Tensor, N: int) -> tuple[int, int, int]:
    """(rows, heads, head size)"""
    C = x.shape[-1]
    return x.numel() // C, C // N, N


def _not_empty(results: Sequence[Tensor]) -> list[Tensor | None]:
    return [x if x.numel() else None for x in results]


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


# Without autograd, torch.library.custom_op would only cost: as much time again as a small call takes.
_OPERATORS = torch.library.Library("rwkv_bone", "FRAGMENT")


def _register(name: str, arguments: str, returns: str, run: Callable, results: Callable) -> None:
    _OPERATORS.define(f"region_{name}({arguments}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _OPERATORS.impl(f"region_{name}", run, device)
    torch.library.register_fake(f"rwkv_bone::region_{name}", results, lib=_OPERATORS)


_MIX = "Tensor? last, Tensor? cu_seqlens, Tensor shares"
_PRE = "Tensor k0, Tensor v0, Tensor? v_first"
_KEYS = "Tensor k_k, Tensor k_a, int N"
_POST = (
    "Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor ln_weight, Tensor ln_bias, int N, float eps"
)
_GATED = "Tensor y, Tensor gate, Tensor ln_weight, Tensor ln_bias, int N, float eps"

_register("mix_forward", f"Tensor x, {_MIX}", "Tensor[]", _mix_forward, _mix_forward_results)
_register(
    "mix_backward",
    f"Tensor[] grads, Tensor? x, {_MIX}, int carried, bool want_shares",
    _tensors(3),
    _mix_backward,
    _mix_backward_results,
)
_register("mix6_forward", f"Tensor x, {_MIX}, Tensor changes", "Tensor[]", _mix6_forward, _mix6_forward_results)
_register(
    "mix6_backward",
    f"Tensor[] grads, Tensor x, {_MIX}, Tensor changes, int carried, bool want_shares",
    _tensors(4),
    _mix6_backward,
    _mix6_backward_results,
)
_register("relu_square_forward", "Tensor h", "Tensor", _relu_square_forward, _relu_square_forward_results)
_register("relu_square_backward", "Tensor h, Tensor g", "Tensor", _relu_square_backward, _relu_square_backward_results)
_register(
    "pre7_forward",
    f"Tensor pw, Tensor pa, Tensor? pv, {_PRE}, Tensor w0, Tensor a0, Tensor? v0_bias, {_KEYS}, bool want_w",
    _tensors(5),
    _pre7_forward,
    _pre7_forward_results,
)
_register(
    "pre7_backward",
    f"Tensor pa, Tensor? pv, {_PRE}, Tensor a0, Tensor? v0_bias, {_KEYS}, Tensor dw, Tensor dk, Tensor dv, Tensor da, "
    "Tensor db, Tensor dk_bonus, Tensor dv_bonus, bool want",
    _tensors(11),
    _pre7_backward,
    _pre7_backward_results,
)
_register("post7_forward", _POST, "Tensor", _post7_forward, _post7_forward_results)
_register("post7_backward", f"{_POST}, Tensor dz, bool want", _tensors(8), _post7_backward, _post7_backward_results)
_register("gated_norm_forward", _GATED, "Tensor", _gated_norm_forward, _gated_norm_forward_results)
_register(
    "gated_norm_backward",
    f"{_GATED}, Tensor dz, bool want",
    _tensors(4),
    _gated_norm_backward,
    _gated_norm_backward_results,
)


@functools.cache
def problem(device: torch.device, dtype: torch.dtype, N: int) -> str:
    """Why the compiled regions cannot be used for such a model, in words; nothing if they can.

    Builds them if there is anything to build, and tries each once. N 1 stands for the regions without heads.
    """
    from rwkv_bone.ops.regions.trial import trial  # which imports this module

    kind = device.type
    if kind not in ("cpu", "cuda"):
        return f"there are none for {kind}"
    if kind == "cpu" and N > 1 and (N % 8 or N > LARGEST_HEAD):
        return f"the head size must be a multiple of 8 and at most {LARGEST_HEAD}, found {N}"
    if kind == "cuda" and N > 1 and N not in HEAD_SIZES:
        return f"the head size must be one of {', '.join(map(str, HEAD_SIZES))}, found {N}"
    try:
        trial(device, dtype, N)
    except (BuildError, DriverError, torch.AcceleratorError) as reason:
        return str(reason)
    return ""
