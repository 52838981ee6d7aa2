"""The regions' twins: what they compute is the formula, written out here with PyTorch's own functions, and their
backward functions are its gradients, in float64. The compiled forms are compared with the twins elsewhere.
"""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions import twins

B, T, H, N = 2, 7, 3, 8
C = H * N
LIMIT = 1e-12
# (cu_seqlens, rows of `last`): sequences of their own, and documents of one and of more tokens in one row.
LAYOUTS = [(None, 0), (None, B), ([0, 1, 4, 5, 7], 0), ([0, 1, 4, 5, 7], 2), ([0, 7], 1)]


def draw(*shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def activations(count: int, batch: int = B) -> list[torch.Tensor]:
    return [draw(batch, T, C, seed=i) for i in range(count)]


def vectors(count: int) -> list[torch.Tensor]:
    return [draw(C, seed=100 + i) for i in range(count)]


def heads(x):
    return x.unflatten(-1, (-1, N))


def close(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if b is None or not b.numel():
            assert not a.numel()
        else:
            assert a.shape == b.shape and (a - b).norm() <= LIMIT * (1 + b.norm())


def gradients(outputs, inputs, grads):
    outputs, grads = zip(*((o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad), strict=True)
    return torch.autograd.grad(outputs, inputs, grads)


def previous(x, last, bounds):
    """The token before each, by a loop."""
    rows = x.flatten(0, 1)
    starts = [b * T for b in range(B)] if bounds is None else bounds[:-1]
    made = []
    for t in range(len(rows)):
        if t in starts:
            number = starts.index(t)
            made.append(last[number] if last is not None and number < len(last) else torch.zeros_like(rows[0]))
        else:
            made.append(rows[t - 1])
    return torch.stack(made).view_as(x)


@pytest.mark.parametrize("want", [False, True])
@pytest.mark.parametrize("bounds, carried", LAYOUTS)
@pytest.mark.parametrize("mixes, data_dependent", [(1, False), (2, False), (6, False), (5, True)])
def test_a_mix_takes_its_share_of_the_token_before_in_the_same_document(mixes, data_dependent, bounds, carried, want):
    (x,) = activations(1, B if bounds is None else 1)
    last = draw(carried, C) if carried else None
    shares, changes = torch.stack(vectors(mixes)), draw(mixes, *x.shape)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    share_of = shares[:, None, None] + changes if data_dependent else shares[:, None, None].expand(-1, *x.shape)
    plain = [x + (previous(x, last, bounds) - x) * share for share in share_of]
    extra = (changes,) if data_dependent else ()
    forward, backward = (
        (twins.mix6_forward, twins.mix6_backward) if data_dependent else (twins.mix_forward, twins.mix_backward)
    )
    close(forward(x, last, cu_seqlens, shares, *extra), plain)

    grads = [draw(*x.shape, seed=50 + i).detach() for i in range(mixes)]
    leaves = [x, *([last] if carried else []), shares, *extra]
    dx, *rest = torch.autograd.grad(plain, leaves, grads)
    expected = [dx, rest.pop(0) if carried else torch.empty(0, C), rest[0] if want else torch.empty(0), *rest[1:]]
    needed = (x, last) if want or data_dependent else (None, None)
    with torch.no_grad():
        close(backward(grads, *needed, cu_seqlens, shares, *extra, carried, want), expected)


def test_relu_square():
    h, g = activations(2)
    close([twins.relu_square_forward(h)], [F.relu(h) ** 2])
    close([twins.relu_square_backward(h, g)], torch.autograd.grad(F.relu(h) ** 2, h, g))


@pytest.mark.parametrize("want", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_what_the_wkv7_operator_takes_is_upstreams_formula(first, want):
    pw, pa, pv, k0, v0, v_first = activations(6)
    w0, a0, v0_bias, k_k, k_a = vectors(5)
    rate = torch.sigmoid(a0 + pa)
    kk = F.normalize(heads(k0 * k_k), dim=-1).flatten(-2)
    v = v0 * 1 if first else v0 + (v_first - v0) * torch.sigmoid(v0_bias + pv)
    plain = [w0 + pw, k0 * (1 + (rate - 1) * k_a), v, -kk, kk * rate]
    value = (None, k0, v0, None) if first else (pv, k0, v0, v_first)
    bias = None if first else v0_bias
    found = twins.pre7_forward(pw, pa, *value, w0, a0, bias, k_k, k_a, N, True)
    close(found, [*plain[:2], torch.empty(0) if first else v, *plain[3:]])
    assert not twins.pre7_forward(pw, pa, *value, w0, a0, bias, k_k, k_a, N, False)[0].numel()

    dw, dk, dv, da, db, dk_bonus, dv_bonus = (x.detach() for x in [draw(B, T, C, seed=60 + i) for i in range(7)])
    leaves = [pw, pa, pv, k0, v0, v_first, w0, a0, v0_bias, k_k, k_a]
    expected = torch.autograd.grad(plain, leaves, [dw, dk + dk_bonus, dv + dv_bonus, da, db], allow_unused=True)
    expected = [torch.empty(0) if g is None or (not want and i > 5) else g for i, g in enumerate(expected)]
    with torch.no_grad():
        args = (pa, *value, a0, bias, k_k, k_a, N, dw, dk, dv, da, db, dk_bonus, dv_bonus, want)
        close(twins.pre7_backward(*args), expected)


def test_the_decays_bias_is_added_in_fp32():
    pw, pa, k0, v0 = (x.detach().bfloat16() for x in activations(4))
    w0, a0, k_k, k_a = (x.detach().float() for x in vectors(4))
    w = twins.pre7_forward(pw, pa, None, k0, v0, None, w0, a0, None, k_k, k_a, N, True)[0]
    assert torch.equal(w, w0 + pw.float()) and not torch.equal(w, w.bfloat16().float())


@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_a_key_of_zeros_or_shorter_than_any_has_a_gradient_that_is_a_number(size):
    pw, pa, k0, v0 = activations(4)
    w0, a0, k_k, k_a = vectors(4)
    k0 = (size * k0.detach()).requires_grad_()
    outputs = twins.pre7_forward(pw, pa, None, k0, v0, None, w0, a0, None, k_k, k_a, N, True)
    (expected,) = torch.autograd.grad(outputs[1:2] + outputs[3:], k0, [torch.ones_like(k0)] * 3)
    ones, none = torch.ones_like(k0), torch.zeros_like(k0)
    found = twins.pre7_backward(
        pa, None, k0, v0, None, a0, None, k_k, k_a, N, none, ones, none, ones, ones, none, none, False
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(found[3], expected)


@pytest.mark.parametrize("want", [False, True])
def test_after_the_wkv7_operator_come_norm_bonus_and_gate(want):
    y, r, k, v, g, dz = activations(6)
    r_k, weight, bias = vectors(3)
    norm = F.group_norm(y.flatten(0, 1), H, weight, bias, 64e-5).view_as(y)
    bonus = (heads(r * k * r_k).sum(-1, keepdim=True) * heads(v)).flatten(-2)
    plain = (norm + bonus) * g
    close([twins.post7_forward(y, r, k, v, g, r_k, weight, bias, N, 64e-5)], [plain])
    expected = torch.autograd.grad(plain, [y, r, k, v, g, r_k, weight, bias], dz)
    with torch.no_grad():
        found = twins.post7_backward(y, r, k, v, g, r_k, weight, bias, N, 64e-5, dz, want)
    close(found, [*expected[:5], *(expected[5:] if want else [torch.empty(0)] * 3)])


@pytest.mark.parametrize("want", [False, True])
def test_the_gated_norm_is_group_norm_times_silu(want):
    y, gate, dz = activations(3)
    weight, bias = vectors(2)
    plain = F.group_norm(y.flatten(0, 1), H, weight, bias, 64e-5).view_as(y) * F.silu(gate)
    close([twins.gated_norm_forward(y, gate, weight, bias, N, 64e-5)], [plain])
    expected = torch.autograd.grad(plain, [y, gate, weight, bias], dz)
    with torch.no_grad():
        found = twins.gated_norm_backward(y, gate, weight, bias, N, 64e-5, dz, want)
    close(found, [*expected[:2], *(expected[2:] if want else [torch.empty(0)] * 2)])


def test_float64_and_the_plain_operators_take_the_twins():
    (x,) = activations(1)
    assert regions.form("auto", x, N) is twins
    assert regions.form("torch", x.float(), N) is twins and regions.form("reference", x.bfloat16(), N) is twins
    assert regions.form("cpu", x.half(), N) is twins
