"""Hugging Face PEFT as an independent implementation of every adapter but Bat, and as what Bat is not."""

import pytest
import torch
from torch import nn

from rwkv_bone.adapters import ADAPTERS, AdapterSettings, BatLinear

peft = pytest.importorskip("peft")

# kind -> (PEFT's settings, our name of each of its parameters)
THEIRS = {
    "bone": (lambda r: peft.MissConfig(r=r, target_modules=["0"]), {"miss_block": "bone"}),
    "bat-col": (lambda r: peft.MissConfig(r=r, target_modules=["0"], init_weights="bat"), {"miss_block": "bone"}),
    "lora": (
        lambda r: peft.LoraConfig(r=r, lora_alpha=3, target_modules=["0"]),
        {"lora_A": "lora_A", "lora_B": "lora_B"},
    ),
    "rslora": (
        lambda r: peft.LoraConfig(r=r, lora_alpha=3, target_modules=["0"], use_rslora=True),
        {"lora_A": "lora_A", "lora_B": "lora_B"},
    ),
    "pissa": (
        lambda r: peft.LoraConfig(r=r, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa"),
        {"lora_A": "lora_A", "lora_B": "lora_B"},
    ),
}
OURS = {
    "lora": lambda r: AdapterSettings("lora", r, alpha=3),
    "rslora": lambda r: AdapterSettings("lora", r, alpha=3, rslora=True),
    "pissa": lambda r: AdapterSettings("pissa", r, alpha=3),
}


def make_linear(in_features, out_features):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=False)


def peft_model(kind, in_features, out_features, r):
    """(the model of PEFT around a linear, our name -> its parameter)"""
    config, names = THEIRS[kind]
    model = peft.get_peft_model(nn.Sequential(make_linear(in_features, out_features)), config(r))
    parameters = {
        ours: parameter
        for theirs, ours in names.items()
        for name, parameter in model.named_parameters()
        if theirs in name.split(".")
    }
    assert len(parameters) == len(names)
    return model, parameters


def results(layer, parameters, x, g):
    """[y, dx, gradient of each parameter]"""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in parameters)]


@pytest.mark.parametrize(
    "kind,in_features,out_features,r",
    [
        *(("bone", *sizes) for sizes in ((24, 24, 8), (24, 40, 8), (22, 13, 8), (16, 9, 16))),
        *(("bat-col", *sizes) for sizes in ((24, 24, 8), (24, 40, 8), (40, 16, 8), (6, 9, 3))),
        *((kind, *sizes) for kind in ("lora", "rslora", "pissa") for sizes in ((24, 24, 8), (22, 13, 3))),
    ],
)
def test_it_equals_peft_in_forward_gradients_and_merge(kind, in_features, out_features, r):
    theirs, parameters = peft_model(kind, in_features, out_features, r)
    settings = OURS[kind](r) if kind in OURS else AdapterSettings(kind, r)
    ours = ADAPTERS[settings.kind](make_linear(in_features, out_features), settings)
    x, g = torch.randn(2, 7, in_features), torch.randn(2, 7, out_features)
    if kind == "pissa":
        # Both find the principal components; the signs of singular vectors are nobody's to choose.
        product = ours.init_lora_B @ ours.init_lora_A
        torch.testing.assert_close(parameters["lora_B"] @ parameters["lora_A"], product, rtol=1e-4, atol=1e-5)
        for name, parameter in parameters.items():
            getattr(ours, f"init_{name}").data.copy_(parameter.data)
    torch.manual_seed(1)
    for name, parameter in parameters.items():
        assert parameter.shape == getattr(ours, name).shape
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        getattr(ours, name).data.copy_(parameter.data)
    expected = results(theirs, parameters.values(), x, g)
    found = results(ours, [getattr(ours, name) for name in parameters], x, g)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    merged = ours.merged(ours.weight, ours.tensors(), settings).detach()
    torch.testing.assert_close(theirs.merge_and_unload()[0].weight.detach(), merged, rtol=1e-5, atol=1e-5)


def test_bat_is_not_pefts_bat():
    theirs, parameters = peft_model("bat-col", 32, 32, 8)
    nn.init.normal_(parameters["bone"], std=0.2)
    ours = BatLinear(make_linear(32, 32), AdapterSettings("bat", 8))
    # On a square weight the tensor has the same shape, so only its meaning tells them apart.
    assert parameters["bone"].shape == ours.bone.shape
    ours.bone.data.copy_(parameters["bone"].data)
    x = torch.randn(7, 32)
    expected = theirs(x)
    assert (ours(x) - expected).norm() > 0.2 * expected.norm()
