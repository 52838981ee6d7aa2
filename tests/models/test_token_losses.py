"""The loss of each token, in every kind of model that is trained: that of plain logits, with every gradient."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.models import EVERY_BLOCK, Recompute
from rwkv_bone.models.load import load_base_into
from rwkv_bone.training.context import chunked_loss
from tests.conftest import random_model
from tests.live_bytes import LiveBytes
from tests.models.test_packed_rows import documents, gradients, packed, worst_difference
from tests.training.conftest import one_thread  # noqa: F401
from tests.training.host_syncs import HostSyncs

BLOCKS = ("att", "ffn")
# kind of adapter, generation, targets, train_parts, quantised base
MODELS = {
    "bone": ("bone", 7, BLOCKS, ("ln", "time", "state"), "none"),
    "bat": ("bat", 6, BLOCKS, ("state",), "none"),
    "lora": ("lora", 5, BLOCKS, (), "none"),
    "pissa": ("pissa", 7, BLOCKS, (), "none"),
    "state": ("state", 6, BLOCKS, (), "none"),
    "adapted head": ("bone", 7, (*BLOCKS, "head"), (), "none"),
    "adapted head, lora": ("lora", 6, (*BLOCKS, "head"), ("emb",), "none"),
    "trained head": ("bone", 7, BLOCKS, ("head",), "none"),
    "nf4": ("bone", 7, (*BLOCKS, "head"), ("state",), "nf4"),
    "int8": ("lora", 5, BLOCKS, (), "int8"),
}


def model_of(name: str):
    """A model whose adapter and initial state are not zero."""
    kind, version, targets, parts, quant = MODELS[name]
    model = random_model(seed=1, version=version)
    if quant != "none":
        load_base_into(model, {key: tensor.clone() for key, tensor in model.state_dict().items()}, quant=quant)
    generator = torch.Generator().manual_seed(1)
    inject(model, settings=AdapterSettings(kind, 8), targets=targets, train_parts=parts, generator=generator)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.endswith((".bone", "lora_A", "lora_B", "time_state")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(pack: bool):
    """(ids, labels, cu_seqlens, label_rows out of order, a factor for each, as a loss of whole answers would have)"""
    ids, labels, cu_seqlens = packed(documents())
    if not pack:
        ids, labels, cu_seqlens = ids[:, :78].reshape(3, 26), labels[:, :78].reshape(3, 26), None
    generator = torch.Generator().manual_seed(2)
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return ids, labels, cu_seqlens, rows, torch.randn(len(rows), generator=generator)


@pytest.mark.parametrize(
    ("name", "pack"), [*((name, True) for name in MODELS), ("bat", False), ("adapted head", False)]
)
def test_the_losses_of_tokens_and_their_gradients_equal_those_of_plain_logits(name, pack):
    model, (ids, labels, cu_seqlens, rows, factors) = model_of(name), batch_of(pack)
    logits = model(ids, cu_seqlens=cu_seqlens).flatten(0, 1)[rows]
    plain = F.cross_entropy(logits, labels.flatten()[rows], reduction="none")
    expected = gradients(model, (plain * factors).sum())
    how = {"labels": labels, "label_rows": rows, "cu_seqlens": cu_seqlens, "per_token": True}
    found = model(ids, **how)
    torch.testing.assert_close(found, plain)
    whole = gradients(model, (found * factors).sum())
    assert worst_difference(whole, expected) < 1e-5
    for recompute in (Recompute(wkv=True), EVERY_BLOCK):
        again = model(ids, **how, recompute=recompute)
        assert torch.equal(again, found)
        again = gradients(model, (again * factors).sum())
        assert all(torch.equal(again[key], whole[key]) for key in whole)
    chunked = chunked_loss(model, ids, **how, chunk=16, widest=0 if pack else 33)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    assert worst_difference(gradients(model, (chunked * factors).sum()), expected) < 3e-5


@pytest.mark.parametrize("name", ["bone", "adapted head", "trained head"])
def test_the_losses_of_tokens_sum_to_the_loss(name):
    model, (ids, labels, cu_seqlens, *_) = model_of(name), batch_of(True)
    total = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    each = model(ids, labels=labels, cu_seqlens=cu_seqlens, per_token=True)
    torch.testing.assert_close(each.sum(), total)
    expected = gradients(model, total)
    assert worst_difference(gradients(model, each.sum()), expected) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_a_truncated_gradient_of_token_losses_is_cut_where_that_of_their_sum_is(pack):
    model, (ids, labels, cu_seqlens, *_) = model_of("bone"), batch_of(pack)
    how = {"cu_seqlens": cu_seqlens, "chunk": 5, "bptt_chunks": 2}
    expected = gradients(model, chunked_loss(model, ids, labels, **how))
    found = gradients(model, chunked_loss(model, ids, labels, **how, per_token=True).sum())
    assert worst_difference(found, expected) < 1e-5
    whole = gradients(model, chunked_loss(model, ids, labels, **how | {"bptt_chunks": 0}))
    assert worst_difference(whole, expected) > 1e-3


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("name", ["bone", "adapted head", "trained head"])
def test_a_batch_without_labels_has_no_losses_and_a_gradient_of_zero(name, chunk):
    """A rank that has less to do goes through the same layers as the others."""
    model, (ids, labels, cu_seqlens, *_) = model_of(name), batch_of(True)
    labels = torch.full_like(labels, -100)
    how = {"labels": labels, "cu_seqlens": cu_seqlens, "per_token": True}
    found = chunked_loss(model, ids, chunk=chunk, **how) if chunk else model(ids, **how)
    assert found.shape == (0,)
    found = gradients(model, found.sum())
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("chunk", [1, 5, 16, 79, 500])
@pytest.mark.parametrize("widest", [0, 93])
@pytest.mark.parametrize("pack", [True, False])
def test_chunks_give_the_losses_in_the_order_of_the_labels_that_were_asked_for(pack, widest, chunk):
    ids, labels, cu_seqlens, rows, _ = batch_of(pack)
    labels = torch.where(labels == -100, -100, torch.arange(labels.numel()).view_as(labels))  # each its own place

    def model(part, *, labels, label_rows, per_token, **_):
        assert per_token
        return labels.flatten()[label_rows].float(), []  # a model without layers has no state

    how = {"label_rows": rows, "cu_seqlens": cu_seqlens, "chunk": chunk, "widest": widest, "per_token": True}
    with HostSyncs() as syncs:
        found = chunked_loss(model, ids, labels, **how)
    assert not syncs.found and torch.equal(found, rows.float())


@pytest.mark.parametrize("chunk", [0, 160])
@pytest.mark.parametrize("name", ["bone", "adapted head"])
def test_a_step_with_token_losses_takes_the_memory_of_a_step_with_their_sum(name, chunk, monkeypatch):
    monkeypatch.setattr("rwkv_bone.models.layers.CHUNK_ROWS", 32)
    monkeypatch.setattr("rwkv_bone.ops.cross_entropy.CHUNK", 32 * 8192)
    kind, version, targets, *_ = MODELS[name]
    model = random_model(version=version, vocab_size=8192)
    inject(model, settings=AdapterSettings(kind, 8), targets=targets)
    ids = torch.randint(1, 8192, (1, 640), generator=torch.Generator().manual_seed(0))

    def peak(**options) -> int:
        model.zero_grad()
        with LiveBytes() as live:
            how = {"labels": ids, **options}
            (chunked_loss(model, ids, chunk=chunk, **how) if chunk else model(ids, **how)).sum().backward()
        return live.peak

    assert peak(per_token=True) < 1.01 * peak() < 13 * 2**20  # all logits would be 20 MiB


def test_token_losses_need_labels_and_refuse_what_acts_on_their_sum():
    model, ids = random_model(), torch.ones(1, 4, dtype=torch.long)
    for options in ({}, {"labels": ids, "l2wrap": 1e-4}, {"labels": ids, "loss_scale": 0.5}):
        with pytest.raises(ValueError, match="per_token is for labels"):
            model(ids, per_token=True, **options)
