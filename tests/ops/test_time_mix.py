"""The time mixes between their projections: all gradients are those of the formula as upstream defines it, written out
here, in float64. There the compiled operators have a stand-in, the operator in PyTorch: what is tested is everything
around it. And with the compiled operators themselves, running them again changes no bit.
"""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.errors import UserError
from rwkv_bone.ops.reference import each_document, wkv6_reference, wkv7_reference
from rwkv_bone.ops.regions import recurrence, time_mix6, time_mix7
from rwkv_bone.ops.wkv6 import wkv5, wkv6
from rwkv_bone.ops.wkv7 import wkv7

H, N, D, EPS = 2, 8, 5, 64e-5
C = H * N
OPERATORS = {"wkv7": (wkv7, "rwkvab"), "wkv6": (wkv6, "rwkvu"), "wkv5": (wkv5, "rwkvu")}
MODULES = {"v7": time_mix7, "v6": time_mix6, "v5": time_mix6}
# (rows, tokens, document bounds)
LAYOUTS = {"rows": (2, 6, None), "packed": (1, 9, [0, 1, 5, 9])}
each_case = pytest.mark.parametrize(
    "version, layout", [("v7", "rows"), ("v7", "packed"), ("v7 first", "packed"), ("v6", "packed"), ("v5", "packed")]
)


def draw(*shape, seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def problem(version: str, layout: str, dtype=torch.float64):
    """(module, activations, parameters, state, cu_seqlens), all of which can be trained."""
    B, T, bounds = LAYOUTS[layout]
    module, first = MODULES[version.split()[0]], "first" in version
    # Hidden layers of several networks, after their first halves; in the first layer there is none for the value.
    nothing = (
        ({"v", "v_first"}, {"v0", "v2"}) if first else ({"w"}, {"decay_w2"}) if version == "v5" else (set(), set())
    )
    hidden = set("wavg") if module is time_mix7 else {"w"}

    def activation(i, name):
        if name in nothing[0]:
            return None
        return draw(B, T, D if name in hidden else C, seed=i, dtype=dtype)

    def parameter(i, name):
        if name in nothing[1]:
            return None
        if name == "u":
            return draw(H, N, seed=40 + i, dtype=dtype)
        return draw(*((D, C) if name.endswith("2") else (C,)), seed=40 + i, scale=0.5, dtype=dtype)

    x = module.Activations(*(activation(i, name) for i, name in enumerate(module.Activations._fields)))
    p = module.Parameters(*(parameter(i, name) for i, name in enumerate(module.Parameters._fields)))
    state = draw(B if bounds is None else len(bounds) - 1, H, N, N, seed=90, scale=0.3, dtype=dtype)
    return module, x, p, state, None if bounds is None else torch.tensor(bounds)


def heads(x):
    return x.unflatten(-1, (H, N))


def norm(y, p):
    return F.group_norm(y.flatten(-2).flatten(0, 1), H, p.ln_weight, p.ln_bias, EPS).view(*y.shape[:2], C)


def upstream(module, x, p, state, cu_seqlens):
    """(z, last state) as upstream's training code has them."""
    if module is time_mix6:
        w = heads(p.decay + x.w @ p.decay_w2) if x.w is not None else p.decay.view(H, N)
        inputs = {"r": heads(x.r), "w": w, "k": heads(x.k), "v": heads(x.v), "u": p.u}
        y, last = each_document(wkv6_reference, cu_seqlens=cu_seqlens, state=state, **inputs)
        return norm(y, p) * F.silu(x.gate), last
    a = torch.sigmoid(p.a0 + x.a @ p.a2)
    v = x.v0
    if x.v is not None:
        v = v + (x.v_first - v) * torch.sigmoid(p.v0 + x.v @ p.v2)
    kk = F.normalize(heads(x.k0 * p.k_k), dim=-1)
    k = x.k0 * (1 + (a - 1) * p.k_a)
    inputs = {"r": x.r, "w": p.w0 + x.w @ p.w2, "k": k, "v": v}
    inputs = {**{name: heads(value) for name, value in inputs.items()}, "a": -kk, "b": kk * heads(a)}
    y, last = each_document(wkv7_reference, cu_seqlens=cu_seqlens, state=state, **inputs)
    bonus = (heads(x.r * k * p.r_k).sum(-1, keepdim=True) * heads(v)).flatten(-2)
    return (norm(y, p) + bonus) * (x.g @ p.g2), last


def ours(module, x, p, state, cu_seqlens, keep_wkv=True, op="auto"):
    run = module.time_mix7 if module is time_mix7 else module.time_mix6
    return run(x, p, state, cu_seqlens, N=N, eps=EPS, keep_wkv=keep_wkv, op=op)


def results(function, problem, **how):
    """z, the last state and all gradients, under names."""
    module, x, p, state, _ = problem
    z, last = function(*problem, **how)
    named = {**x._asdict(), **{f"parameter {name}": tensor for name, tensor in p._asdict().items()}, "state": state}
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    g = [draw(*y.shape, seed=70 + i, dtype=y.dtype).detach() for i, y in enumerate((z, last))]
    found = torch.autograd.grad((z, last), list(named.values()), g)
    return {"z": z.detach(), "last": last.detach(), **dict(zip(named, found, strict=True))}


@pytest.fixture
def operators_in_float64(monkeypatch):
    """The compiled operators' place is taken by the operators in PyTorch, and what they save by a mark."""

    def run(operator, inputs, state, cu_seqlens):
        function, names = OPERATORS[operator]
        named = dict(zip(names, inputs, strict=True))
        return function(**named, state=state, cu_seqlens=cu_seqlens, output_state=True, op="torch")

    calls = []

    def forward(operator, inputs, state, cu_seqlens, save, form, w0=None):
        calls.append(save)
        y, last = run(operator, inputs, state, cu_seqlens)
        return y.contiguous(), last, y.new_empty(3 if save else 0)

    def backward(operator, inputs, state, cu_seqlens, saved, dy, dlast, want_state, form, w0=None):
        assert len(saved) == 3
        leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
        with torch.enable_grad():
            outputs = run(operator, leaves[:-1], leaves[-1], cu_seqlens)
        *found, d_state = torch.autograd.grad(outputs, leaves, (dy, dlast))
        return [x.contiguous() for x in found], d_state if want_state else None

    monkeypatch.setattr(recurrence, "checked_form", lambda *_: "cpu")
    monkeypatch.setattr(recurrence, "forward", forward)
    monkeypatch.setattr(recurrence, "backward", backward)
    return calls


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    worst = {key: float((found[key] - x).norm() / (x.norm() + 1e-30)) for key, x in expected.items()}
    assert {key: error for key, error in worst.items() if not error < 1e-11} == {}


@each_case
@pytest.mark.parametrize("keep_wkv", [True, False])
def test_every_gradient_is_that_of_upstreams_formula(version, layout, keep_wkv, operators_in_float64):
    given = problem(version, layout)
    assert_close(results(ours, given, keep_wkv=keep_wkv), results(upstream, given))
    assert operators_in_float64 == ([True] if keep_wkv else [False, True])


@each_case
@pytest.mark.parametrize("keep_wkv", [True, False])
@pytest.mark.parametrize("op", ["torch", "reference"])
def test_with_the_operators_in_pytorch_too(version, layout, keep_wkv, op):
    given = problem(version, layout)
    assert_close(results(ours, given, keep_wkv=keep_wkv, op=op), results(upstream, given))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_the_operator_again_changes_no_bit(version, layout, dtype):
    given = problem(version, layout, dtype)
    kept, again = (results(ours, given, keep_wkv=keep, op="cpu") for keep in (True, False))
    assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept)
    exact = results(upstream, problem(version, layout))
    limit = 1e-4 if dtype == torch.float32 else 6e-2
    assert max(float((kept[key] - x).norm() / x.norm()) for key, x in exact.items()) < limit


@pytest.mark.parametrize("version", ["v7", "v6"])
def test_nothing_is_kept_for_a_frozen_part_but_its_inputs(version):
    """Also without gradients at all nothing is saved: y and the operator's states are as large as the rest together."""
    module, x, p, state, bounds = problem(version, "packed", torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            ours(module, x, p, state, bounds, op="cpu")
        assert kept == []
        ours(module, x, p, state, bounds, keep_wkv=False, op="cpu")
    own = {t.data_ptr() for t in (*x, *p, state, bounds) if t is not None}
    assert {t.data_ptr() for t in kept} <= own


def test_states_and_documents_that_do_not_fit_are_told():
    module, x, p, state, bounds = problem("v7", "packed", torch.float32)
    with pytest.raises(UserError, match="state must be"):
        ours(module, x, p, state[:1], bounds, op="cpu")
    with pytest.raises(UserError, match="cu_seqlens must rise"):
        ours(module, x, p, state, bounds.flip(0), op="cpu")
