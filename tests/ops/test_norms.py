"""The norms inside the regions in bf16: as exact as bf16 can say it, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.ops import regions
from rwkv_bone.ops.regions import twins

C, N, EPS = 2560, 64, 64e-5
# Rounding to bf16 alone is 1.66e-3 of normal numbers. With mean and scale rounded, too, dx is off by 2.4e-3 and more.
ROUNDING = 1.75e-3
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def problem(tokens: int, device: str):
    """y [2, T, C] with a size and a mean of its own in each row, dz, and the norm's parameters, of bf16 values."""
    generator = torch.Generator().manual_seed(tokens)
    y, dz = torch.randn(2, 2, tokens, C, generator=generator)
    y = (y + 0.5) * torch.rand(2, tokens, 1, generator=generator)
    weight = torch.rand(C, generator=generator) + 0.5
    bias = torch.randn(C, generator=generator)
    return [x.bfloat16().to(device) for x in (y, dz, weight, bias)]


def error(x, exact) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@each_device
@pytest.mark.parametrize("wide_parameters", [False, True])
@pytest.mark.parametrize("form", ["twins", "compiled"])
def test_outputs_and_gradients_have_the_error_of_one_rounding(form, wide_parameters, device):
    """Of post7 without bonus and with an open gate: r is zero, g one. PyTorch's own GroupNorm in float64 is exact."""
    y, dz, weight, bias = problem(64, device)
    region = twins if form == "twins" else regions.form(device, y, N)
    if wide_parameters:
        weight, bias = weight.float(), bias.float()
    none, one = torch.zeros_like(y), torch.ones_like(y)
    given = (y, none, none, none, one, torch.zeros_like(weight), weight, bias, N, EPS)
    z = region.post7_forward(*given)
    dy, _, _, _, dg, _, dweight, dbias = region.post7_backward(*given, dz, True)

    leaves = [x.double().requires_grad_() for x in (y, weight, bias)]
    exact = F.group_norm(leaves[0].flatten(0, 1), C // N, *leaves[1:], EPS).view_as(y)
    expected = torch.autograd.grad(exact, leaves, dz.double())
    assert (z.dtype, dy.dtype, dweight.dtype, dbias.dtype) == (*[torch.bfloat16] * 2, *[torch.float32] * 2)
    assert error(z, exact.detach()) < ROUNDING and error(dy, expected[0]) < ROUNDING
    assert error(dg, dz.double() * exact.detach()) < ROUNDING
    assert error(dweight, expected[1]) < 1e-5 and error(dbias, expected[2]) < 1e-5


@each_device
@pytest.mark.parametrize("form", ["twins", "compiled"])
def test_the_gated_norm_has_the_error_of_one_rounding_too(form, device):
    y, dz, weight, bias = problem(64, device)
    region = twins if form == "twins" else regions.form(device, y, N)
    gate = dz.roll(1, dims=-1)
    given = (y, gate, weight, bias, N, EPS)
    found = [region.gated_norm_forward(*given), *region.gated_norm_backward(*given, dz, True)]
    leaves = [x.double().requires_grad_() for x in (y, gate, weight, bias)]
    norm = F.group_norm(leaves[0].flatten(0, 1), C // N, *leaves[2:], EPS).view_as(y)
    exact = norm * F.silu(leaves[1])
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, dz.double())]
    for x, right, limit in zip(found, expected, (ROUNDING,) * 3 + (1e-5,) * 2, strict=True):
        assert error(x, right) < limit
