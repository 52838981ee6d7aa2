"""The two layers against their dense definitions, written here block by block."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rwkv_bone.adapters import ADAPTERS, BatLinear, BoneLinear
from rwkv_bone.errors import UserError
from tests.conftest import REPOSITORY

# (kind, in, out, r): square, wide, tall, one block, blocks of one, and for Bone sizes that r does not divide.
SHAPES = [
    ("bone", 24, 24, 8),
    ("bone", 24, 40, 8),
    ("bone", 22, 13, 8),
    ("bone", 7, 5, 7),
    ("bone", 7, 3, 1),
    ("bone", 65, 9, 64),
    ("bat", 24, 24, 8),
    ("bat", 24, 40, 8),
    ("bat", 40, 8, 8),
    ("bat", 8, 8, 8),
    ("bat", 6, 9, 1),
    ("bat", 6, 9, 3),
]
KINDS = list(ADAPTERS)


def dense_weight(kind, weight, bone):
    """W' element by element (Bone) or r x r block by block (Bat), from the definitions alone."""
    new = weight.clone()
    out_features, in_features = weight.shape
    if kind == "bone":
        for o in range(out_features):
            for j in range(in_features):
                new[o, j] += bone[j % bone.shape[0], o]
        return new
    r = bone.shape[1]
    for a in range(0, out_features, r):
        for b in range(0, in_features, r):
            block = weight[a : a + r, b : b + r]
            new[a : a + r, b : b + r] = block + block @ bone[b // r] + bone[b // r]
    return new


def make(kind, in_features, out_features, r, dtype=torch.float64, bias=False, seed=0):
    """An adapter layer with a non-zero adapter (float64 too if the base is)."""
    torch.manual_seed(seed)
    layer = ADAPTERS[kind](nn.Linear(in_features, out_features, bias=bias).to(dtype), r, "att.key")
    nn.init.normal_(layer.bone, std=0.3)
    return layer.double() if dtype == torch.float64 else layer


def gradients(layer, x, g):
    """(y, dx, dbone) of one backward pass."""
    x = x.detach().clone().requires_grad_()
    layer.bone.grad = None
    y = layer(x)
    y.backward(g)
    return y.detach(), x.grad, layer.bone.grad


@pytest.mark.parametrize("kind,in_features,out_features,r", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_merge_equal_the_dense_definition(kind, in_features, out_features, r, bias):
    layer = make(kind, in_features, out_features, r, bias=bias)
    dense = dense_weight(kind, layer.weight, layer.bone.detach())
    torch.testing.assert_close(layer.merged(layer.weight, layer.bone.detach()), dense, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind,in_features,out_features,r", SHAPES)
def test_backward_is_the_gradient_in_float64(kind, in_features, out_features, r):
    layer = make(kind, in_features, out_features, r, bias=True)
    x = torch.randn(5, in_features, dtype=torch.float64, requires_grad=True)
    bias, weight = (nn.Parameter(tensor.detach().clone()) for tensor in (layer.bias, layer.weight))
    # The weight and bias are trained too here: then they need a gradient like any others.
    assert torch.autograd.gradcheck(layer.function.apply, (x, weight, bias, layer.bone))
    assert torch.autograd.gradcheck(
        lambda bone: layer.function.apply(x.detach(), weight.detach(), None, bone), layer.bone
    )
    assert torch.autograd.gradcheck(lambda x: layer.function.apply(x, weight.detach(), None, layer.bone.detach()), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700])
def test_gradients_of_many_tokens_equal_those_through_the_dense_weight(kind, tokens):
    layer = make(kind, 32, 48, 8)
    x, g = torch.randn(tokens, 32, dtype=torch.float64), torch.randn(tokens, 48, dtype=torch.float64)
    bone = layer.bone.detach().clone().requires_grad_()
    leaf = x.clone().requires_grad_()
    F.linear(leaf, dense_weight(kind, layer.weight, bone)).backward(g)
    _, grad_x, grad_bone = gradients(layer, x, g)
    torch.testing.assert_close(grad_x, leaf.grad)
    torch.testing.assert_close(grad_bone, bone.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_equals_its_base_and_takes_over_its_parameters(kind):
    base = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    expected = base(x)
    layer = ADAPTERS[kind](base, 8)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert torch.equal(layer(x), expected)
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {"bone"}
    assert layer.bone.dtype == torch.float32 and layer.state_dict().keys() == {"weight", "bias", "bone"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_any_strides_are_taken(kind):
    layer = make(kind, 16, 24, 8)
    x = torch.randn(6, 16, dtype=torch.float64)
    expected, grad_x, grad_bone = gradients(layer, x, torch.ones(6, 24, dtype=torch.float64))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert layer(x[:0]).shape == (0, 24)
    layer(x[:0].requires_grad_()).sum().backward()
    torch.testing.assert_close(layer(x.view(1, 2, 3, 16)), expected.view(1, 2, 3, 24))
    torch.testing.assert_close(layer(x.t().contiguous().t()), expected)
    # `sum` hands back a gradient whose strides are all zero.
    layer.bone.grad = None
    leaf = x.view(2, 3, 16).transpose(0, 1).detach().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad.transpose(0, 1).reshape(6, 16), grad_x)
    torch.testing.assert_close(layer.bone.grad, grad_bone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice_gets_the_sum_of_both_gradients(kind):
    layer = make(kind, 16, 16, 8)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    bone = layer.bone.detach().clone().requires_grad_()
    leaf = x.detach().clone().requires_grad_()
    dense = dense_weight(kind, layer.weight, bone)
    (leaf @ dense.t() @ dense.t()).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(layer.bone.grad, bone.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    layer, g = make(kind, 16, 24, 8), torch.randn(6, 24, dtype=torch.float64)
    x = torch.randn(6, 16, dtype=torch.float64)
    expected = gradients(layer, x, g)
    layer.bone.grad = None
    leaf = x.clone().requires_grad_()
    y = checkpoint(layer, leaf, use_reentrant=reentrant)
    y.backward(g)
    for found, wanted in zip((y, leaf.grad, layer.bone.grad), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_as_close_to_the_truth_as_a_plain_linear(kind, weight_dtype):
    # x decides the dtype of the arithmetic; the adapter stays fp32, and so does its gradient.
    layer = make(kind, 256, 320, 32, dtype=weight_dtype)
    nn.init.normal_(layer.bone, std=0.02)
    x, g = torch.randn(600, 256).bfloat16(), torch.randn(600, 320).bfloat16()
    y, grad_x, grad_bone = gradients(layer, x, g)
    assert (y.dtype, grad_x.dtype, grad_bone.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)

    exact = copy.deepcopy(layer).double()
    exact.weight.data = exact.weight.data.bfloat16().double()
    plain_error = (F.linear(x, layer.weight.bfloat16()).double() - x.double() @ exact.weight.t()).norm()
    plain_grad_error = ((g @ layer.weight.bfloat16()).double() - g.double() @ exact.weight).norm()
    true_y, true_grad_x, true_grad_bone = gradients(exact, x.double(), g.double())
    assert (y.double() - true_y).norm() < 2.5 * plain_error
    assert (grad_x.double() - true_grad_x).norm() < 2.5 * plain_grad_error
    assert (grad_bone.double() - true_grad_bone).norm() < 0.004 * true_grad_bone.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_obeyed(kind):
    layer = make(kind, 32, 48, 8, dtype=torch.float32)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.requires_grad_())
        found.sum().backward()
    assert found.dtype == torch.bfloat16 and x.grad.dtype == layer.bone.grad.dtype == torch.float32
    assert torch.equal(found, layer(x.detach().bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_for_backward(kind, dtype):
    tokens, r = 16, 8
    x = torch.randn(tokens, 256).to(dtype).requires_grad_()
    layer = make(kind, 256, 512, r, dtype=dtype)
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor}) or tensor, lambda tensor: tensor
    )
    with hooks:
        layer(x)
    for parameter in layer.parameters():
        assert kept.pop(parameter.data_ptr()).shape == parameter.shape
    # What is left: Bat's input, which its producer keeps anyway, or Bone's sums.
    (left,) = kept.values()
    assert (left.data_ptr() == x.data_ptr()) if kind == "bat" else (left.shape == (tokens, r))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_weight_beside_the_adapter_gets_its_gradient(kind):
    layer = make(kind, 24, 16, 8, bias=True)
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.bias))
    F.linear(x, dense_weight(kind, weight, layer.bone.detach()), bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_rounds_once(kind):
    layer = make(kind, 64, 64, 8, dtype=torch.bfloat16)
    before = layer.weight.clone()
    exact = layer.merged(layer.weight.double(), layer.bone.detach().double())
    merged = layer.merged(layer.weight, layer.bone.detach())
    assert merged.dtype == torch.bfloat16 and torch.equal(layer.weight, before)
    # fp32's own error may tip a value that lies halfway between two bf16 numbers, and nothing else.
    differing = merged != exact.float().bfloat16()
    assert differing.float().mean() < 1e-3
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_bat_refuses_sizes_that_r_does_not_divide_and_names_them():
    for sizes in ((24, 20), (20, 24)):
        with pytest.raises(UserError, match=r"blocks\.0\.att\.key.*--bone_r 4,") as caught:
            BatLinear(nn.Linear(*sizes), 8, "blocks.0.att.key")
        assert all(str(size) in str(caught.value) for size in sizes)


def test_a_block_larger_than_the_input_is_refused():
    for layer in (BoneLinear, BatLinear):
        with pytest.raises(UserError, match="--bone_r 17 is larger than the 16 inputs of att.key"):
            layer(nn.Linear(16, 34), 17, "att.key")
        with pytest.raises(UserError, match="at least 1"):
            layer(nn.Linear(16, 16), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(kind, dtype):
    layer = make(kind, 256, 320, 64, dtype=torch.float32).to(dtype)
    layer.bone.data = layer.bone.data.float()
    x, g = torch.randn(5000, 256).to(dtype), torch.randn(5000, 320).to(dtype)
    expected = gradients(layer, x, g)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for found, wanted in zip(gradients(layer.cuda(), x.cuda(), g.cuda()), expected, strict=True):
        assert (found.cpu().double() - wanted.double()).norm() < tolerance * wanted.double().norm()


def test_the_benchmarks_correctness_check_passes():
    command = [sys.executable, REPOSITORY / "benchmarks" / "adapters.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
