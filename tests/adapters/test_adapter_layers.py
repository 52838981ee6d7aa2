"""Every adapter layer against its dense definition, written here element by element or block by block."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, LoraLinear, PissaLinear
from rwkv_bone.adapters.blockwise import HAS_OUT_DTYPE, token_product
from rwkv_bone.errors import UserError
from rwkv_bone.quantization import QuantLinear, quantize
from tests.conftest import REPOSITORY

# (kind, in, out, r): square, wide, tall, one block, blocks of one, and where it may be sizes that r does not divide.
DIVISIBLE = [(12, 12, 4), (12, 20, 4), (20, 4, 4), (8, 8, 8), (6, 9, 1), (6, 9, 3)]
SHAPES = [
    *(("bone", *sizes) for sizes in ((12, 12, 4), (12, 20, 4), (22, 13, 8), (7, 5, 7), (7, 3, 1), (65, 9, 64))),
    *(("bat", *sizes) for sizes in DIVISIBLE),
    *(("bat-col", *sizes) for sizes in DIVISIBLE),
    *(("lora", *sizes) for sizes in ((12, 12, 4), (22, 13, 3), (7, 3, 1), (5, 4, 6))),
    *(("pissa", *sizes) for sizes in ((12, 12, 4), (22, 13, 3), (7, 3, 1), (5, 4, 4))),
]
KINDS = list(ADAPTERS)
PISSA_SIZES = [(768, 3072), (3072, 768), (1024, 1024), (512, 2048), (256, 256)]


def dense_weight(kind, weight, tensors, settings):
    """W' from the definitions alone."""
    new, r = weight.clone(), settings.r
    out_features, in_features = weight.shape
    if kind in ("lora", "pissa"):
        update = tensors["lora_B"] @ tensors["lora_A"]
        if kind == "pissa":
            update = update - tensors["init_lora_B"] @ tensors["init_lora_A"]
        alpha = settings.alpha or r
        return weight + update * (alpha / r**0.5 if settings.rslora else alpha / r)
    bone = tensors["bone"]
    if kind == "bone":
        for o in range(out_features):
            for j in range(in_features):
                new[o, j] += bone[j % r, o]
        return new
    for a in range(0, out_features, r):
        for b in range(0, in_features, r):
            block, d = weight[a : a + r, b : b + r], bone[(b if kind == "bat" else a) // r]
            new[a : a + r, b : b + r] = block + block @ d + d
    return new


def settings_for(kind, r):
    return AdapterSettings(kind, r, alpha=3.0) if kind in ("lora", "pissa") else AdapterSettings(kind, r)


def make(kind, in_features, out_features, r, dtype=torch.float64, bias=False, seed=0, std=0.3):
    """An adapter layer whose tensors all differ from where they start (float64 too if the base is)."""
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, bias=bias).to(dtype)
    layer = ADAPTERS[kind](base.float(), settings_for(kind, r), "att.key")
    layer.weight.data = layer.weight.data.to(dtype)
    with torch.no_grad():
        for name in layer.parameter_names:
            parameter = getattr(layer, name)
            parameter.add_(std * torch.randn_like(parameter))
    return layer.double() if dtype == torch.float64 else layer


def merged(layer, weight=None):
    """The merged weight; the base's or `weight` of any precision, with the tensors as they are."""
    weight = layer.weight if weight is None else weight
    return layer.merged(weight, {name: tensor.detach() for name, tensor in layer.tensors().items()}, layer.settings)


def copies(layer):
    """(layer's tensors as leaves of their own, those of them that are trained)."""
    tensors = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    return tensors, [tensors[name].requires_grad_() for name in layer.parameter_names]


def gradients(layer, x, g):
    """[y, dx, gradient of each trained tensor] of one backward pass."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return [y.detach(), x.grad, *(getattr(layer, name).grad for name in layer.parameter_names)]


def quantised(layer):
    """(the same adapter around a quantised base, the same on that base's values as a plain weight), float32."""
    weight = quantize(layer.weight.float(), "int8")
    wrapping = type(layer)(QuantLinear(weight), layer.settings, initialise=False)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight.data = QuantLinear(weight).dequantize(torch.float32)
    plain = type(layer)(plain, layer.settings, initialise=False)
    for name, tensor in layer.tensors().items():
        getattr(wrapping, name).data.copy_(tensor)
        getattr(plain, name).data.copy_(tensor)
    return wrapping, plain


@pytest.mark.parametrize("kind,in_features,out_features,r", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_layer_and_merge_equal_the_dense_definition(kind, in_features, out_features, r, bias):
    layer = make(kind, in_features, out_features, r, bias=bias)
    dense = dense_weight(kind, layer.weight, layer.tensors(), layer.settings).detach()
    torch.testing.assert_close(merged(layer), dense, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind,in_features,out_features,r", SHAPES)
def test_backward_is_the_gradient_in_float64(kind, in_features, out_features, r):
    layer = make(kind, in_features, out_features, r, bias=True)
    x = torch.randn(5, in_features, dtype=torch.float64, requires_grad=True)
    bias, weight = (nn.Parameter(tensor.detach().clone()) for tensor in (layer.bias, layer.weight))
    tensors, trained = copies(layer)

    def compute(x, weight, bias, *trained):
        own = dict(zip(layer.parameter_names, trained, strict=True))
        return layer.forward_fused(x, weight, bias, {**tensors, **own}, layer.settings)

    # The weight and bias are trained too here: then they need a gradient like any others.
    assert torch.autograd.gradcheck(compute, (x, weight, bias, *trained))
    weight, fixed = weight.detach(), [tensor.detach() for tensor in trained]
    assert torch.autograd.gradcheck(lambda *trained: compute(x.detach(), weight, None, *trained), trained)
    assert torch.autograd.gradcheck(lambda x: compute(x, weight, None, *fixed), x)


@pytest.mark.parametrize("kind,in_features,out_features,r", [row for row in SHAPES if row[0] != "bat-col"])
def test_around_any_projection_it_is_the_same_function_with_the_same_gradients(kind, in_features, out_features, r):
    layer = make(kind, in_features, out_features, r, bias=True)
    x, g = (torch.randn(5, size, dtype=torch.float64) for size in (in_features, out_features))
    expected = gradients(layer, x, g)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    calls = []

    def base(x):
        calls.append(x)
        return F.linear(x, layer.weight, layer.bias)

    y = layer.forward_wrapped(base, leaf, layer.tensors(), layer.settings, 0.0)
    y.backward(g)
    assert len(calls) == 1
    found = (y, leaf.grad, *(getattr(layer, name).grad for name in layer.parameter_names))
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_gives_what_its_values_as_a_plain_weight_give(kind, dtype):
    wrapping, plain = quantised(make(kind, 64, 96, 8, dtype=torch.float32))
    assert wrapping.state_dict().keys() == {*wrapping.tensors()}  # codes and scales follow from the base's file
    assert {name for name, p in wrapping.named_parameters() if p.requires_grad} == set(wrapping.parameter_names)
    plain.weight.data = plain.weight.data.to(dtype)
    x, g = torch.randn(3, 9, 64).to(dtype), torch.randn(3, 9, 96).to(dtype)
    tolerance = 0 if dtype == torch.float32 else 0.004  # two gradients of x are rounded before they are added
    for found, wanted in zip(gradients(wrapping, x, g), gradients(plain, x, g), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700])
def test_gradients_of_many_tokens_equal_those_through_the_dense_weight(kind, tokens):
    layer = make(kind, 32, 48, 8)
    x, g = torch.randn(tokens, 32, dtype=torch.float64), torch.randn(tokens, 48, dtype=torch.float64)
    tensors, trained = copies(layer)
    leaf = x.clone().requires_grad_()
    F.linear(leaf, dense_weight(kind, layer.weight, tensors, layer.settings)).backward(g)
    _, *found = gradients(layer, x, g)
    for ours, tensor in zip(found, (leaf, *trained), strict=True):
        torch.testing.assert_close(ours, tensor.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_rows_beyond_one_chunk_are_computed_too(kind):
    layer = make(kind, 64, 1088, 64)  # 17 blocks of outputs
    x, g = torch.randn(9, 64, dtype=torch.float64), torch.randn(9, 1088, dtype=torch.float64)
    tensors, trained = copies(layer)
    leaf = x.clone().requires_grad_()
    F.linear(leaf, merged_densely(kind, layer.weight, tensors, layer.settings)).backward(g)
    for ours, tensor in zip(gradients(layer, x, g)[1:], (leaf, *trained), strict=True):
        torch.testing.assert_close(ours, tensor.grad)


def merged_densely(kind, weight, tensors, settings):
    """dense_weight where its loops would take too long: Bone without them."""
    if kind != "bone":
        return dense_weight(kind, weight, tensors, settings)
    return weight + tensors["bone"].t().repeat(1, -(-weight.shape[1] // settings.r))[:, : weight.shape[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_equals_its_base_and_takes_over_its_parameters(kind):
    base = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    expected = base(x)
    before = base.weight.clone()
    layer = ADAPTERS[kind](base, settings_for(kind, 8))
    assert layer.weight is base.weight and layer.bias is base.bias and torch.equal(layer.weight, before)
    assert torch.equal(layer(x), expected)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == set(layer.parameter_names)
    assert {tensor.dtype for tensor in layer.tensors().values()} == {torch.float32}
    shapes = layer.shapes(16, 24, layer.settings)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in layer.tensors().items()}
    assert layer.state_dict().keys() == {"weight", "bias", *shapes}


@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_any_strides_are_taken(kind):
    layer = make(kind, 16, 24, 8)
    x = torch.randn(6, 16, dtype=torch.float64)
    expected, grad_x, *grads = gradients(layer, x, torch.ones(6, 24, dtype=torch.float64))
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])
    assert layer(x[:0]).shape == (0, 24)
    layer(x[:0].requires_grad_()).sum().backward()
    torch.testing.assert_close(layer(x.view(1, 2, 3, 16)), expected.view(1, 2, 3, 24))
    torch.testing.assert_close(layer(x.t().contiguous().t()), expected)
    # `sum` hands back a gradient whose strides are all zero.
    layer.zero_grad()
    leaf = x.view(2, 3, 16).transpose(0, 1).detach().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad.transpose(0, 1).reshape(6, 16), grad_x)
    for name, wanted in zip(layer.parameter_names, grads, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice_gets_the_sum_of_both_gradients(kind):
    layer = make(kind, 16, 16, 8)
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    tensors, trained = copies(layer)
    leaf = x.detach().clone().requires_grad_()
    dense = dense_weight(kind, layer.weight, tensors, layer.settings)
    (leaf @ dense.t() @ dense.t()).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    for name, tensor in zip(layer.parameter_names, trained, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, tensor.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    layer, g = make(kind, 16, 24, 8), torch.randn(6, 24, dtype=torch.float64)
    x = torch.randn(6, 16, dtype=torch.float64)
    expected = gradients(layer, x, g)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(layer, leaf, use_reentrant=reentrant)
    y.backward(g)
    found = (y, leaf.grad, *(getattr(layer, name).grad for name in layer.parameter_names))
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_as_close_to_the_truth_as_a_plain_linear(kind, weight_dtype):
    # x decides the dtype of the arithmetic; the adapter stays fp32, and so does its gradient.
    layer = make(kind, 256, 320, 32, dtype=weight_dtype, std=0.02)
    x, g = torch.randn(600, 256).bfloat16(), torch.randn(600, 320).bfloat16()
    found = gradients(layer, x, g)
    dtypes = [tensor.dtype for tensor in found]
    assert dtypes == [torch.bfloat16, torch.bfloat16, *(torch.float32 for _ in layer.parameter_names)]

    exact = copy.deepcopy(layer).double()
    exact.weight.data = exact.weight.data.bfloat16().double()
    plain_error = (F.linear(x, layer.weight.bfloat16()).double() - x.double() @ exact.weight.t()).norm()
    plain_grad_error = ((g @ layer.weight.bfloat16()).double() - g.double() @ exact.weight).norm()
    y, grad_x, *grads = zip(found, gradients(exact, x.double(), g.double()), strict=True)
    assert (y[0].double() - y[1]).norm() < 2.5 * plain_error
    assert (grad_x[0].double() - grad_x[1]).norm() < 2.5 * plain_grad_error
    for ours, true in grads:
        assert (ours.double() - true).norm() < 0.004 * true.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_obeyed(kind):
    layer = make(kind, 32, 48, 8, dtype=torch.float32)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.requires_grad_())
        found.sum().backward()
    assert found.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert {getattr(layer, name).grad.dtype for name in layer.parameter_names} == {torch.float32}
    assert torch.equal(found, layer(x.detach().bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", [False, True])
def test_nothing_of_the_weights_size_is_kept_for_backward(kind, dtype, quant):
    tokens, r = 16, 8
    x = torch.randn(tokens, 256).to(dtype).requires_grad_()
    layer = make(kind, 256, 512, r, dtype=torch.float32 if quant else dtype)
    if quant:
        layer = quantised(layer)[0]
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor}) or tensor, lambda tensor: tensor
    )
    with hooks:
        layer(x)
    for tensor in (*layer.parameters(), *layer.buffers()):
        kept.pop(tensor.data_ptr(), None)
    # What is left: the input, which its producer keeps anyway, and sums or products of r columns.
    kept.pop(x.data_ptr(), None)
    assert {tuple(tensor.shape) for tensor in kept.values()} <= {(tokens, r)}
    assert len(kept) == (0 if kind.startswith("bat") else 1)


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that is made while this is active; views make nothing."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.values = max(self.values, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_made_in_forward_or_backward(kind):
    layer = make(kind, 256, 2048, 16, dtype=torch.float32)
    x = torch.randn(4, 256, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert x.grad.numel() <= largest.values <= layer.weight.numel() // 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_weight_beside_the_adapter_gets_its_gradient(kind):
    layer = make(kind, 24, 16, 8, bias=True)
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.bias))
    dense = dense_weight(kind, weight, {n: t.detach() for n, t in layer.tensors().items()}, layer.settings)
    F.linear(x, dense, bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_rounds_once(kind):
    layer = make(kind, 64, 64, 8, dtype=torch.bfloat16)
    before = layer.weight.clone()
    exact = copy.deepcopy(layer).double()
    exact = merged(exact)
    found = merged(layer)
    assert found.dtype == torch.bfloat16 and torch.equal(layer.weight, before)
    # fp32's own error may tip a value that lies halfway between two bf16 numbers, and nothing else.
    differing = found != exact.float().bfloat16()
    assert differing.float().mean() < 1e-3
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(512, 512), (512, 1024), (1024, 512)], ids=str)
def test_thousands_of_tokens_which_go_through_in_chunks_get_the_gradients_of_float64(kind, sizes, wrapped):
    """At this width a chunk holds 160 to 640 tokens or more, so there are 5 to 20 of them, and the last is shorter."""
    layer = make(kind, *sizes, 64, dtype=torch.float32, std=0.05)
    if wrapped:
        layer, plain = quantised(layer)
        weight = plain.weight.detach().double()
    else:
        weight = layer.weight.detach().double()
    x, g = torch.randn(3001, sizes[0]), torch.randn(3001, sizes[1])
    found = gradients(layer, x, g)
    # The merge is compared with the definition above. In float64, PyTorch makes the gradients of it.
    tensors = {name: tensor.detach().double().requires_grad_() for name, tensor in layer.tensors().items()}
    x = x.double().requires_grad_()
    y = x @ layer.merged(weight, tensors, layer.settings).t()
    expected = torch.autograd.grad(y, (x, *(tensors[name] for name in layer.parameter_names)), g.double())
    for ours, exact in zip(found, (y.detach(), *expected), strict=True):
        assert (ours.double() - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_product_over_thousands_of_tokens_in_bf16_loses_less_than_by_rounding_it(device):
    # With a part in common, as gradients have: partial products are smaller than their sum, and so is the rounding.
    a, b = ((torch.randn(3001, n, device=device) + 0.3).bfloat16() for n in (64, 512))
    exact = a.double().t() @ b.double()
    rounded = (exact.bfloat16() - exact).norm() / exact.norm()
    error = (token_product(a, b).double() - exact).norm() / exact.norm()
    assert error < (0.6 * rounded if device == "cpu" or not HAS_OUT_DTYPE else 1e-5)


def test_pissas_start_is_the_same_on_any_number_of_threads():
    weights = {sizes: torch.randn(*sizes, generator=torch.Generator().manual_seed(0)) for sizes in PISSA_SIZES}
    threads, starts = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for sizes, weight in weights.items():
                base = nn.Linear(*reversed(sizes), bias=False)
                base.weight.data = weight
                generator = torch.Generator().manual_seed(0)
                layer = PissaLinear(base, AdapterSettings("pissa", 16), generator=generator)
                starts.append((sizes, layer.lora_A.detach(), layer.lora_B.detach()))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for (sizes, *one), (_, *other) in zip(starts, starts[len(weights) :], strict=False):
        assert all(map(torch.equal, one, other)), sizes


def test_the_scale_of_lora_is_alpha_over_r_or_over_its_root():
    assert AdapterSettings("lora", 8).scale == 1
    assert AdapterSettings("lora", 8, alpha=16).scale == 2
    assert AdapterSettings("lora", 16, alpha=8, rslora=True).scale == 2
    assert AdapterSettings("lora", 16, alpha=0, rslora=True).scale == 4  # alpha 0 is r here too
    for kind in ("lora", "pissa"):
        layer = make(kind, 12, 10, 4)
        layer.settings = AdapterSettings(kind, 4, alpha=6, rslora=True)
        x = torch.randn(3, 12, dtype=torch.float64)
        dense = dense_weight(kind, layer.weight, layer.tensors(), layer.settings)
        torch.testing.assert_close(layer(x), x @ dense.t())


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_dropout_acts_before_a_in_training_and_nowhere_else(kind):
    layer = make(kind, 32, 24, 4, dtype=torch.float32)
    x = torch.randn(6, 32)
    expected = layer(x)
    layer.settings = AdapterSettings(kind, 4, alpha=3.0, dropout=0.5)
    assert torch.equal(layer.eval()(x), expected)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    update = merged(layer) - layer.weight
    torch.testing.assert_close(found, x @ layer.weight.t() + dropped @ update.t())
    found.sum().backward()
    tensors, trained = copies(layer)
    dense = dense_weight(kind, layer.weight, tensors, layer.settings)
    (dropped @ (dense - layer.weight).t()).sum().backward()
    for name, tensor in zip(layer.parameter_names, trained, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, tensor.grad)


def test_the_same_generator_gives_the_same_lora_and_another_one_another():
    def drawn(seed):
        base = nn.Linear(16, 24)
        return LoraLinear(base, settings_for("lora", 4), generator=torch.Generator().manual_seed(seed)).lora_A

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    bound = (1 / 16) ** 0.5  # kaiming_uniform with a = sqrt 5: sqrt(6 / (1 + 5) / in)
    assert 0.9 * bound < drawn(0).abs().max() <= bound


@pytest.mark.parametrize("sizes", [(40, 24), (700, 600)])
def test_pissa_starts_from_the_principal_components(sizes):
    torch.manual_seed(0)
    base = nn.Linear(*sizes, bias=False)
    # A spectrum that falls like that of trained weights, so that the leading components stand out.
    u, s, v = torch.linalg.svd(base.weight.data, full_matrices=False)
    base.weight.data = u * torch.arange(1, len(s) + 1) ** -1.0 @ v
    layer = PissaLinear(base, AdapterSettings("pissa", 4, alpha=8), generator=torch.Generator().manual_seed(0))
    principal = (u[:, :4] / torch.arange(1, 5)) @ v[:4]
    torch.testing.assert_close(2 * layer.init_lora_B @ layer.init_lora_A, principal, rtol=0, atol=2e-4)
    assert torch.equal(layer.lora_A, layer.init_lora_A) and torch.equal(layer.lora_B, layer.init_lora_B)
    again = PissaLinear(base, AdapterSettings("pissa", 4, alpha=8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.lora_A, again.lora_A)


def test_pissa_is_the_same_function_as_lora_on_the_residual_weight():
    # The definition of the paper: W - s B0 A0 is frozen, and s B A is trained.
    layer = make("pissa", 24, 40, 8)
    tensors, s = layer.tensors(), layer.settings.scale
    residual = nn.Linear(24, 40, bias=False).double()
    residual.weight.data = layer.weight.data - s * tensors["init_lora_B"] @ tensors["init_lora_A"]
    lora = LoraLinear(residual, settings_for("lora", 8), initialise=False).double()
    lora.lora_A.data, lora.lora_B.data = layer.lora_A.data, layer.lora_B.data
    x, g = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    for found, wanted in zip(gradients(layer, x, g), gradients(lora, x, g), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_small_change_of_pissa_is_not_rounded_away_in_half_precision():
    layer = PissaLinear(nn.Linear(64, 64, bias=False).bfloat16(), settings_for("pissa", 8))
    layer.lora_B.data.mul_(1 + 2**-12)  # far less than bf16 tells apart
    x = torch.randn(9, 64).bfloat16()
    effect = (layer.merged(layer.weight.float(), layer.tensors(), layer.settings) - layer.weight.float()).detach()
    update = layer.forward_wrapped(torch.zeros_like, x, layer.tensors(), layer.settings, 0.0).detach()
    assert (update.float() - x.float() @ effect.t()).norm() < 0.02 * (x.float() @ effect.t()).norm()


@pytest.mark.parametrize("kind", ["bat", "bat-col"])
def test_bat_refuses_sizes_that_r_does_not_divide_and_names_them(kind):
    for sizes in ((24, 20), (20, 24)):
        with pytest.raises(UserError, match=rf"blocks\.0\.att\.key.*as {kind} needs: use --bone_r 4,") as caught:
            ADAPTERS[kind](nn.Linear(*sizes), AdapterSettings(kind, 8), "blocks.0.att.key")
        assert all(str(size) in str(caught.value) for size in sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_or_rank_that_does_not_fit_is_refused(kind):
    flag = "lora_r" if kind in ("lora", "pissa") else "bone_r"
    with pytest.raises(UserError, match=f"--{flag} 0: expected at least 1"):
        ADAPTERS[kind](nn.Linear(16, 16), AdapterSettings(kind, 0))
    if kind != "lora":  # whose rank may be anything
        message = "17 is larger than the 16 inputs of att.key" if flag == "bone_r" else "17: the weight of att.key"
        with pytest.raises(UserError, match=f"--{flag} {message}"):
            ADAPTERS[kind](nn.Linear(16, 34), AdapterSettings(kind, 17), "att.key")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(kind, dtype):
    layer = make(kind, 256, 320, 64, dtype=torch.float32, std=0.05)
    layer.weight.data = layer.weight.data.to(dtype)
    x, g = torch.randn(5000, 256).to(dtype), torch.randn(5000, 320).to(dtype)
    expected = gradients(layer, x, g)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    # A copy, since .cuda() takes the expected gradients along with their parameters.
    on_gpu = gradients(copy.deepcopy(layer).cuda(), x.cuda(), g.cuda())
    for found, wanted in zip(on_gpu, expected, strict=True):
        assert (found.cpu().double() - wanted.double()).norm() < tolerance * wanted.double().norm()


def test_the_benchmarks_correctness_check_passes():
    command = [sys.executable, REPOSITORY / "benchmarks" / "adapters.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
