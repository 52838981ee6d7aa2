"""HeadNorm in bf16: as exact as bf16 can say it, forward and backward, and nothing more kept than before."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.models.layers import HeadNorm

C, H, EPS = 2560, 40, 64e-5
# Rounding to bf16 alone is 1.66e-3 of normal numbers. With mean and scale rounded, too, dx is off by 2.4e-3 and more.
ROUNDING = 1.75e-3
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def problem(tokens: int, device: str = "cpu"):
    """x [2, T, C] with a size and a mean of its own in each row, dy, and a norm of bf16 values kept in fp32."""
    generator = torch.Generator().manual_seed(tokens)
    x, dy = torch.randn(2, 2, tokens, C, generator=generator)
    x = (x + 0.5) * torch.rand(2, tokens, 1, generator=generator)
    norm = HeadNorm(H, C, EPS)
    with torch.no_grad():
        norm.weight.copy_((torch.rand(C, generator=generator) + 0.5).bfloat16())
        norm.bias.copy_(torch.randn(C, generator=generator).bfloat16())
    return x.bfloat16().to(device), dy.bfloat16().to(device), norm.to(device)


def run(norm, x, dy, call=None):
    """y, dx and the gradients of weight and bias."""
    leaf = x.clone().requires_grad_()
    y = (norm if call is None else call)(leaf)
    trained = [p for p in norm.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, (leaf, *trained), dy)]


def in_float64(norm, x, dy):
    exact = HeadNorm(H, C, EPS).double().to(x.device)
    exact.load_state_dict(norm.state_dict())
    return run(exact, x.double(), dy.double())


def error(x, exact) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@each_device
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [64, 512, 2048])
def test_outputs_and_gradients_have_the_error_of_one_rounding(tokens, compiled, device):
    x, dy, norm = problem(tokens, device)
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    y, dx, dweight, dbias = run(norm, x, dy, call)
    exact = in_float64(norm, x, dy)
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (*[torch.bfloat16] * 2, *[torch.float32] * 2)
    assert error(y, exact[0]) < ROUNDING and error(dx, exact[1]) < ROUNDING
    assert error(dweight, exact[2]) < 1e-5 and error(dbias, exact[3]) < 1e-5


@each_device
def test_a_frozen_norm_of_bf16_gives_the_same_as_one_of_fp32(device):
    x, dy, norm = problem(64, device)
    expected = run(norm, x, dy)[:2]
    found = run(norm.requires_grad_(False).bfloat16(), x, dy)
    assert len(found) == 2 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_other_dtypes_it_is_pytorchs_group_norm(dtype):
    x, dy, norm = problem(16)
    x, dy, norm = x.to(dtype), dy.to(dtype), norm.to(dtype)

    def plain(leaf):
        return F.group_norm(leaf.flatten(0, 1), H, norm.weight, norm.bias, EPS).view_as(leaf)

    for found, expected in zip(run(norm, x, dy), run(norm, x, dy, plain), strict=True):
        assert torch.equal(found, expected)


@each_device
def test_for_backward_it_keeps_its_input_and_two_numbers_a_head(device):
    x, _, norm = problem(64, device)
    norm.bfloat16().requires_grad_(False)
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    leaf = x.requires_grad_()
    with hooks:
        norm(leaf)
    assert {leaf.data_ptr(), norm.weight.data_ptr()} < kept.keys()
    sizes = sorted(t.numel() * t.element_size() for t in kept.values())
    assert sizes == sorted([x.numel() * 2, C * 2, *[x.numel() // C * H * 4] * 2])


@each_device
def test_rows_and_gradients_may_lie_in_memory_in_any_order(device):
    x, dy, norm = problem(64, device)
    x, dy = x[:1], dy[:1]  # of more than one sequence flattening would make a copy in order
    apart = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, dy)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    for found, expected in zip(run(norm, *apart), run(norm, x, dy), strict=True):
        assert torch.equal(found, expected)
