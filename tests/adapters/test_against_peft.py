"""Hugging Face PEFT's MiSS as an independent implementation of Bone, and as what Bat is not."""

import pytest
import torch
from torch import nn

from rwkv_bone.adapters import BatLinear, BoneLinear

peft = pytest.importorskip("peft")


def peft_layer(linear, r, init_weights=True):
    """(the MiSS model around `linear`, its adapter parameter), with a non-zero adapter."""
    model = peft.get_peft_model(
        nn.Sequential(linear), peft.MissConfig(r=r, target_modules=["0"], init_weights=init_weights)
    )
    block = next(parameter for name, parameter in model.named_parameters() if "miss_block" in name)
    nn.init.normal_(block, std=0.2)
    return model, block


def make_linear(in_features, out_features):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=False)


@pytest.mark.parametrize("in_features,out_features,r", [(24, 24, 8), (24, 40, 8), (22, 13, 8), (16, 9, 16)])
def test_bone_equals_peft_in_forward_gradients_and_merge(in_features, out_features, r):
    theirs, block = peft_layer(make_linear(in_features, out_features), r)
    ours = BoneLinear(make_linear(in_features, out_features), r)
    assert block.shape == ours.bone.shape
    ours.bone.data.copy_(block.data)
    x, g = torch.randn(2, 7, in_features), torch.randn(2, 7, out_features)
    results = []
    for layer, parameter in ((theirs, block), (ours, ours.bone)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        results.append((y, leaf.grad, parameter.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(ours.merged(ours.weight, ours.bone.detach()), merged.detach())


def test_bat_is_not_pefts_bat():
    theirs, block = peft_layer(make_linear(32, 32), 8, "bat")
    ours = BatLinear(make_linear(32, 32), 8)
    # On a square weight the tensor has the same shape, so only its meaning tells them apart.
    assert block.shape == ours.bone.shape
    ours.bone.data.copy_(block.data)
    x = torch.randn(7, 32)
    expected = theirs(x)
    assert (ours(x) - expected).norm() > 0.2 * expected.norm()
