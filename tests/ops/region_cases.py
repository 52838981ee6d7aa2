"""Regions and their gradients in float64 by autograd, as PyTorch's own functions say them: what every form must give.

A case is (region, inputs): tensors by name, of the dtype under test, and numbers. `expected(case)` has every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 64e-5


class Case(NamedTuple):
    region: str  # mix, mix6, relu_square, pre7, post7, gated_norm
    inputs: dict[str, Tensor | None]  # activations, then parameters
    N: int = 8
    offsets: Tensor | None = None
    carried: int = 0  # rows of `last` that want a gradient
    want: bool = True  # gradients of parameters


PARAMETERS = {"shares", "w0", "a0", "v0_bias", "k_k", "k_a", "r_k", "ln_weight", "ln_bias"}
NAMES = {
    "mix": ("x", "last", "shares"),
    "mix6": ("x", "last", "shares", "changes"),
    "relu_square": ("h",),
    "pre7": ("pw", "pa", "pv", "k0", "v0", "v_first", "w0", "a0", "v0_bias", "k_k", "k_a"),
    "post7": ("y", "r", "k", "v", "g", "r_k", "ln_weight", "ln_bias"),
    "gated_norm": ("y", "gate", "ln_weight", "ln_bias"),
}


def make(
    region: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int] = (2, 5, 24),
    N: int = 8,
    M: int = 3,
    lengths: Sequence[int] = (),
    rows: int | None = None,
    carried: int = 0,
    first_layer: bool = False,
    wide: bool = True,
    want: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Random inputs. `lengths`: documents packed into a single row; `rows`: of `last`, None = there is none.

    wide: the parameters are float32.
    """
    draw = torch.Generator().manual_seed(seed)
    if lengths:
        shape = (1, sum(lengths), shape[2])
    C = shape[-1]

    def random(name: str) -> Tensor | None:
        if first_layer and name in ("pv", "v_first", "v0_bias") or name == "last" and rows is None:
            return None
        sizes = {"last": (rows, C), "shares": (M, C), "changes": (M, *shape)}.get(name, shape)
        if name in PARAMETERS and name != "shares":
            sizes = (C,)
        x = torch.randn(sizes, generator=draw)
        return x.to(device, torch.float32 if name in PARAMETERS and wide else dtype)

    offsets = torch.tensor([0, *lengths], device=device).cumsum(0) if lengths else None
    return Case(region, {name: random(name) for name in NAMES[region]}, N, offsets, carried, want)


def shifted(x: Tensor, last: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Each token's row before it, sequence by sequence."""
    if offsets is None:
        sequences, starts = list(x.unbind(0)), None
    else:
        starts = offsets.tolist()
        sequences = [x[0, begin:end] for begin, end in zip(starts, starts[1:], strict=False)]
    moved = []
    for i, sequence in enumerate(sequences):
        first = last[i] if last is not None and i < len(last) else torch.zeros_like(x[0, 0])
        moved.append(torch.cat([first[None], sequence])[: len(sequence)])
    return torch.stack(moved) if starts is None else torch.cat(moved)[None]


def heads_normal(y: Tensor, weight: Tensor, bias: Tensor, N: int) -> Tensor:
    return F.group_norm(y.flatten(0, 1), y.shape[-1] // N, weight, bias, EPS).view_as(y)


def forward(case: Case, x: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The region's results, by its definition."""
    N = case.N
    if case.region in ("mix", "mix6"):
        shares = x["shares"][:, None, None]
        if case.region == "mix6":
            shares = shares + x["changes"]
        delta = shifted(x["x"], x["last"], case.offsets) - x["x"]
        return {f"out{m}": x["x"] + delta * share for m, share in enumerate(shares)}
    if case.region == "relu_square":
        return {"out": x["h"].relu() ** 2}
    if case.region == "pre7":
        heads = (*x["k0"].shape[:-1], -1, N)
        a = torch.sigmoid(x["a0"] + x["pa"])
        kk = F.normalize((x["k0"] * x["k_k"]).view(heads), dim=-1).view_as(a)
        found = {"w": x["w0"] + x["pw"], "k": x["k0"] * (1 + (a - 1) * x["k_a"]), "a": -kk, "b": kk * a}
        gate = 0 if x["pv"] is None else torch.sigmoid(x["v0_bias"] + x["pv"])
        found["v"] = x["v0"] if x["pv"] is None else x["v0"] + (x["v_first"] - x["v0"]) * gate
        return found
    normal = heads_normal(x["y"], x["ln_weight"], x["ln_bias"], N)
    if case.region == "gated_norm":
        return {"z": normal * F.silu(x["gate"])}
    products = (x["r"] * x["k"] * x["r_k"]).unflatten(-1, (-1, N)).sum(-1, keepdim=True)
    bonus = (products * x["v"].unflatten(-1, (-1, N))).flatten(-2)
    return {"z": (normal + bonus) * x["g"]}


def given(case: Case) -> dict[str, Tensor]:
    """Gradients of the results, of the activations' dtype but for w's, which is float32."""
    draw = torch.Generator().manual_seed(1)
    like = next(iter(case.inputs.values()))
    with torch.no_grad():
        results = forward(case, case.inputs)
    return {
        name: torch.randn(x.shape, generator=draw).to(like.device, torch.float32 if name == "w" else like.dtype)
        for name, x in results.items()
    }


def expected(case: Case) -> dict[str, Tensor]:
    """Results and gradients in float64: of pre7 also with the bonus' part of dk and dv, which is theirs once more."""
    x = {name: None if t is None else t.double().requires_grad_() for name, t in case.inputs.items()}
    results = forward(case, x)
    outer = {name: g.double() for name, g in given(case).items()}
    if case.region == "pre7":
        outer["k"], outer["v"] = 2 * outer["k"], 2 * outer["v"]
    leaves = {name: t for name, t in x.items() if t is not None}
    gradients = torch.autograd.grad(
        list(results.values()), list(leaves.values()), list(outer.values()), allow_unused=True, materialize_grads=True
    )
    found = {name: t.detach() for name, t in results.items()}
    if case.region == "pre7" and x["pv"] is None:
        del found["v"]  # v0 itself
    found |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    if "dlast" in found:
        found["dlast"] = found["dlast"][: case.carried]
    if not case.want:
        found = {name: g for name, g in found.items() if name[1:] not in PARAMETERS}
    return found


def run(case: Case, operators) -> dict[str, Tensor]:
    """What a form of the regions gives: a module, or what has the functions of ops/regions/compiled.py."""
    x, outer, N, name = case.inputs, given(case), case.N, case.region
    forward, backward = getattr(operators, f"{name}_forward"), getattr(operators, f"{name}_backward")
    if name in ("mix", "mix6"):
        changes = (x["changes"],) if name == "mix6" else ()
        outs = forward(x["x"], x["last"], case.offsets, x["shares"], *changes)
        gradients = backward(
            list(outer.values()),
            x["x"] if case.want or changes else None,
            x["last"] if case.want or changes else None,
            case.offsets,
            x["shares"],
            *changes,
            case.carried,
            case.want,
        )
        found = {f"out{m}": out for m, out in enumerate(outs)}
        found |= dict(zip(("dx", "dlast", "dshares", "dchanges"), gradients, strict=False))
    elif name == "relu_square":
        found = {"out": forward(x["h"]), "dh": backward(x["h"], outer["out"])}
    elif name == "pre7":
        results = forward(*x.values(), N, True)
        found = dict(zip(("w", "k", "v", "a", "b"), results, strict=True))
        inputs = [x[n] for n in ("pa", "pv", "k0", "v0", "v_first", "a0", "v0_bias", "k_k", "k_a")]
        outer_in_order = [outer[n] for n in ("w", "k", "v", "a", "b", "k", "v")]
        gradients = backward(*inputs, N, *outer_in_order, case.want)
        names = ("dpw", "dpa", "dpv", "dk0", "dv0", "dv_first", "dw0", "da0", "dv0_bias", "dk_k", "dk_a")
        found |= dict(zip(names, gradients, strict=True))
    else:
        found = {"z": forward(*x.values(), N, EPS)}
        gradients = backward(*x.values(), N, EPS, outer["z"], case.want)
        found |= {f"d{n}": g for n, g in zip(x, gradients, strict=True)}
    return {n: g for n, g in found.items() if g.numel()}


def check(case: Case, operators) -> dict[str, Tensor]:
    """Fails where a result is missing, of another dtype or shape, or wrong. Returns what was found."""
    found, exact = run(case, operators), expected(case)
    exact = {name: x for name, x in exact.items() if x.numel()}
    assert found.keys() == exact.keys(), found.keys() ^ exact.keys()
    like = next(iter(case.inputs.values()))
    for name, x in found.items():
        wide = name in ("w", "dlast") or name[1:] in PARAMETERS
        assert x.dtype == (torch.float32 if wide else like.dtype), name
        assert x.shape == exact[name].shape, name
        # One rounding of bfloat16 is 2^-9 of a number at most; what is summed in float32 has none.
        limit = 2e-6 if wide or x.dtype == torch.float32 else 2.2e-3
        error = ((x.double() - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)).item()
        assert error < limit, f"{case.region} {name}: relative error {error:.1e}, limit {limit:.0e}"
    return found
