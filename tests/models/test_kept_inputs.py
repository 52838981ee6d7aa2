"""Inputs that adapters keep are made again in backward: the same bits, and less memory."""

import contextlib

import pytest
import torch
from torch import nn

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.models import EVERY_BLOCK, Recompute
from rwkv_bone.models.layers import keeps_input
from rwkv_bone.ops.regions.rebuild import Recipe, rebuilt
from rwkv_bone.training.context import chunked_loss
from tests.conftest import random_model
from tests.live_bytes import LiveBytes
from tests.models.test_packed_rows import documents, gradients, packed
from tests.training.conftest import one_thread  # noqa: F401

# The others show nothing of the generations that LoRA does not.
CASES = [
    (5, "lora", ()),
    (6, "lora", ("time",)),
    (7, "lora", ()),
    (7, "bat", ("time",)),
    (7, "bone", ("ln", "time")),
    (7, "full", ()),
]


def adapted(version: int, kind: str, parts=()) -> nn.Module:
    """A bf16 model whose adapter is not zero; `full` trains everything."""
    model = random_model(seed=1, version=version)
    for block in model.blocks:
        block.att.op = block.ffn.op = "cpu"
    if kind != "full":
        settings = AdapterSettings(kind, 8, alpha=8.0) if kind == "lora" else AdapterSettings(kind, 8)
        inject(model, settings=settings, train_parts=list(parts), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".bone", "lora_B")):
                parameter.normal_(0, 0.05, generator=generator)
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    model.dtype = model.emb.dtype = torch.bfloat16
    return model


def batch() -> tuple:
    return packed(documents([9, 1, 17, 5], masked=False))


@pytest.mark.parametrize("version, kind, parts", CASES)
def test_gradients_are_those_of_kept_inputs_bit_by_bit(version, kind, parts, monkeypatch):
    model = adapted(version, kind, parts)
    ids, labels, cu_seqlens = batch()

    def all_gradients() -> list[dict]:
        runs = [Recompute(), Recompute(wkv=True), Recompute(1), EVERY_BLOCK]
        found = [gradients(model, model(ids, labels=labels, cu_seqlens=cu_seqlens, recompute=how)) for how in runs]
        # In a checkpoint of the caller's, whose hooks are around those of the inputs.
        return [*found, gradients(model, chunked_loss(model, ids, labels, chunk=13, cu_seqlens=cu_seqlens))]

    found = all_gradients()
    assert all(torch.equal(run[key], found[0][key]) for run in found[:4] for key in found[0])
    monkeypatch.setattr("rwkv_bone.models.layers.rebuilt", lambda _: contextlib.nullcontext())
    for run, expected in zip(found, all_gradients(), strict=True):
        assert [key for key in expected if not torch.equal(run[key], expected[key])] == []


@pytest.mark.parametrize("version", [5, 6, 7])
def test_less_is_alive_than_with_kept_inputs(version, monkeypatch):
    model = adapted(version, "lora")
    ids, labels, cu_seqlens = batch()

    def alive() -> int:
        with LiveBytes() as live:
            loss = model(ids, labels=labels, cu_seqlens=cu_seqlens)
            now = live.now
        del loss
        return now

    less = alive()
    monkeypatch.setattr("rwkv_bone.models.layers.rebuilt", lambda _: contextlib.nullcontext())
    tokens, arch = ids.numel(), model.arch
    # Relu squared, and the lerps of the projections, for which their one input is kept.
    lerps = {5: 4, 6: 4, 7: 2}[version]
    assert alive() - less >= 2 * tokens * arch.n_layer * (arch.dim_ffn + lerps * arch.n_embd) * 0.9


def test_only_layers_that_need_their_input_keep_it():
    model = adapted(7, "bone")
    assert not keeps_input(model.blocks[0].att.key)
    model.blocks[0].att.key.weight.requires_grad_(True)
    assert keeps_input(model.blocks[0].att.key)
    assert all(keeps_input(adapted(7, kind).blocks[0].att.key) for kind in ("lora", "bat", "full"))


def test_a_recipe_is_used_for_views_of_its_tensor_alone():
    """What is kept of others is kept as it is; hooks around these are given the sources, once for each use."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    doubled, other = x * 2, x * 3
    made, packed_by_others = [], []

    def make(source):
        made.append(source)
        return source * 2

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed_by_others.append(t) or t, lambda t: t)
    with hooks, rebuilt([Recipe(doubled, (x,), make)]):
        y = doubled.view(2, 2, 6) @ weight + (doubled[:2] @ weight).sum() + (other @ weight).sum()
    assert made == [] and {t.data_ptr() for t in packed_by_others} >= {x.data_ptr(), other.data_ptr()}
    (found,) = torch.autograd.grad(y.sum(), weight)
    assert len(made) == 1
    y = doubled.view(2, 2, 6) @ weight + (doubled[:2] @ weight).sum() + (other @ weight).sum()
    assert torch.equal(found, torch.autograd.grad(y.sum(), weight)[0])
