"""A packed row is its documents, one by one: loss, every gradient, and the state that each leaves."""

import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.data import Batch
from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK, Recompute
from rwkv_bone.training.context import chunked_loss
from tests.conftest import random_model
from tests.training.conftest import one_thread  # noqa: F401
from tests.training.host_syncs import HostSyncs

LENGTHS = [9, 1, 17, 2, 33, 16, 1]  # one token, and around the operators' chunks of 16 and 32
every_generation = pytest.mark.parametrize("version", [5, 6, 7])


def noisy_model(version: int, kind: str = "bone", parts=("ln", "time", "state")):
    """A model whose adapter and initial state are not zero."""
    model = random_model(seed=1, version=version)
    inject(model, settings=AdapterSettings(kind, 8), train_parts=list(parts))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".bone", "time_state")):
                parameter.normal_(0, 0.05, generator=generator)
    return model


def documents(lengths=LENGTHS, masked: bool = True):
    """(ids, labels) of each document, [1, L]; masked: prompts of different lengths, and one document without labels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for number, length in enumerate(lengths):
        ids, labels = torch.randint(1, 61, (2, 1, length), generator=generator)
        if masked:
            labels[:, : number % 4 * length // 4] = -100
            if number == 3:
                labels[:] = -100
        result.append((ids, labels))
    return result


def packed(parts):
    ids, labels = (torch.cat(rows, dim=1) for rows in zip(*parts, strict=True))
    return ids, labels, torch.tensor([0, *(row.shape[1] for row, _ in parts)]).cumsum(0)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Of everything trained, with the loss itself."""
    model.zero_grad()
    loss.backward()
    trained = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {"loss": loss.detach()}


def worst_difference(ours: dict, expected: dict) -> float:
    """Relative, of whole tensors. A gradient of nothing is no evidence, and is an error."""
    assert ours.keys() == expected.keys() and all(value.norm() > 0 for value in expected.values())
    return max(float((ours[key] - expected[key]).norm() / expected[key].norm()) for key in expected)


def one_by_one(model, parts, **options) -> dict[str, torch.Tensor]:
    return gradients(model, sum(model(ids, labels=labels, **options) for ids, labels in parts))


@every_generation
@pytest.mark.parametrize("kind, op", [("bone", "torch"), ("bat", "torch"), ("bone", "cpu")])
def test_loss_and_every_gradient_are_the_sums_over_the_documents(version, kind, op):
    model, parts = noisy_model(version, kind), documents()
    for block in model.blocks:
        block.att.op = op
    expected = one_by_one(model, parts)
    ids, labels, cu_seqlens = packed(parts)
    ours = gradients(model, model(ids, labels=labels, cu_seqlens=cu_seqlens))
    assert worst_difference(ours, expected) < 1e-5
    recomputed = gradients(model, model(ids, labels=labels, cu_seqlens=cu_seqlens, recompute=EVERY_BLOCK))
    assert all(torch.equal(recomputed[key], ours[key]) for key in ours)


@every_generation
def test_in_float64_the_reference_operator_agrees_to_its_rounding(version):
    model, parts = noisy_model(version, parts=("ln", "time")).double(), documents()
    model.dtype = model.emb.dtype = torch.float64
    for block in model.blocks:
        block.att.op = "reference"
    ids, labels, cu_seqlens = packed(parts)
    # Logits, since the loss is computed in float32.
    weights = torch.randn(ids.shape[1], 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = gradients(model, (model(ids, cu_seqlens=cu_seqlens)[0] * weights).sum())
    pieces = zip((ids for ids, _ in parts), weights.split(LENGTHS), strict=True)
    assert worst_difference(whole, gradients(model, sum((model(ids)[0] * w).sum() for ids, w in pieces))) < 1e-12


@every_generation
@pytest.mark.parametrize("chunk", [5, 16, 32, 64, 79, 500])
def test_chunks_of_a_packed_row_have_its_gradient(version, chunk):
    """Smaller than documents, as long as some, ending where one ends (64 and 79 tokens lie before the last two)."""
    model, parts = noisy_model(version), documents()
    expected = one_by_one(model, parts)
    ids, labels, cu_seqlens = packed(parts)
    for recompute in (Recompute(), EVERY_BLOCK) if chunk == 16 else (Recompute(),):
        loss = chunked_loss(model, ids, labels, chunk=chunk, cu_seqlens=cu_seqlens, recompute=recompute)
        assert worst_difference(gradients(model, loss), expected) < 1e-5


@pytest.mark.parametrize("chunk", [5, 16, 79, 500])
@pytest.mark.parametrize("widest", [0, 93])
@pytest.mark.parametrize("pack", [False, True])
def test_chunks_find_their_labels_without_looking_at_them(pack, widest, chunk):
    """Each chunk gets the rows of its own labels, whatever was added to the width, and nothing is fetched."""
    parts = documents()
    ids, labels, cu_seqlens = packed(parts)
    if not pack:
        ids, labels, cu_seqlens = ids[:, :78].reshape(3, 26), labels[:, :78].reshape(3, 26), None
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    seen = []

    def model(part, *, labels, label_rows, cu_seqlens, state, return_state):
        seen.append((labels, label_rows))
        return part.new_zeros((), dtype=torch.float32), []  # a model without layers has no state

    with HostSyncs() as syncs:
        chunked_loss(model, ids, labels, label_rows=rows, chunk=chunk, cu_seqlens=cu_seqlens, widest=widest)
    assert not syncs.found
    assert len(seen) == -(-max(widest, ids.shape[1]) // chunk)
    for targets, where in seen:
        expected = (targets.flatten() != -100).nonzero().squeeze(1)
        assert torch.equal(where.sort().values, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("targets", [["att", "ffn"], ["att", "ffn", "head"]])
def test_on_a_gpu_a_packed_batch_goes_forward_and_back_without_waiting(targets, chunk):
    model, (ids, labels, cu_seqlens) = random_model(), packed(documents())
    inject(model, settings=AdapterSettings("bone", 8), targets=targets)
    model.cuda()
    for block in model.blocks:
        block.att.op = "torch"
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    host = Batch(ids, labels, rows, [], ids.numel(), len(rows), ids.numel(), cu_seqlens).pinned()

    def step():
        batch = host.to("cuda")
        if chunk:
            how = {"chunk": chunk, "cu_seqlens": host.cu_seqlens, "label_rows": host.label_rows}
            loss = chunked_loss(model, batch.ids, batch.labels, **how)
        else:
            how = {"cu_seqlens": batch.cu_seqlens, "label_rows": batch.label_rows}
            loss = model(batch.ids, labels=batch.labels, **how)
        loss.backward()
        return loss

    step()  # what is built and allocated once
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert loss.isfinite()


@every_generation
@pytest.mark.parametrize("pack", [False, True])
def test_a_rank_with_less_to_do_runs_as_many_chunks_and_gets_the_same_gradient(version, pack):
    """At ZeRO stage 3 ranks with unequal numbers of chunks would wait for each other for ever."""
    model, parts = noisy_model(version), documents()[4:]
    ids, labels, cu_seqlens = packed(parts) if pack else (*parts[0], None)
    calls = []

    def counted(*args, **options):
        calls.append(args[0].shape[1])
        return model(*args, **options)

    expected = gradients(model, model(ids, labels=labels, cu_seqlens=cu_seqlens))
    loss = chunked_loss(counted, ids, labels, chunk=16, cu_seqlens=cu_seqlens, widest=100)
    assert calls == [16] * 6 + [4]
    assert worst_difference(gradients(model, loss), expected) < 1e-5


def test_a_truncated_gradient_of_a_packed_row_is_cut_within_documents_only():
    model, parts = noisy_model(7), documents([8, 8, 16, 8])
    ids, labels, cu_seqlens = packed(parts)
    expected = one_by_one(model, parts)
    cut = gradients(model, chunked_loss(model, ids, labels, chunk=8, bptt_chunks=1, cu_seqlens=cu_seqlens))
    assert worst_difference(cut, expected) > 1e-3
    ids, labels, cu_seqlens = packed(parts[:2])
    cut = gradients(model, chunked_loss(model, ids, labels, chunk=8, bptt_chunks=1, cu_seqlens=cu_seqlens))
    assert worst_difference(cut, one_by_one(model, parts[:2])) < 1e-5


@every_generation
def test_the_first_documents_go_on_from_given_states_and_all_states_come_back(version):
    model, parts = noisy_model(version), documents(masked=False)
    for given in (0, 1, 2, len(parts)):
        before = [model(ids, return_state=True)[1] for ids, _ in reversed(parts)][:given]
        befores = [*before, *[None] * (len(parts) - given)]
        alone = [model(ids, state=one, return_state=True) for (ids, _), one in zip(parts, befores, strict=True)]
        state = None
        if given:
            state = [type(layer[0])(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*before, strict=True)]
        ids, _, cu_seqlens = packed(parts)
        logits, after = model(ids, state=state, return_state=True, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(logits, torch.cat([out for out, _ in alone], dim=1), rtol=1e-4, atol=1e-5)
        for layer, block in enumerate(after):
            for name, rows in block._asdict().items():
                expected = torch.cat([getattr(new[layer], name) for _, new in alone])
                assert rows.dtype == torch.float32 and rows.untyped_storage().nbytes() == rows.numel() * 4
                torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_more_states_than_documents_are_an_error():
    model, ids = random_model(), torch.ones(3, 4, dtype=torch.long)
    _, state = model(ids, return_state=True)
    with pytest.raises(UserError, match="state: expected at most 2 rows, one a sequence, found 3"):
        model(ids[:1], state=state, cu_seqlens=torch.tensor([0, 1, 4]))


@every_generation
def test_another_document_in_the_row_changes_nothing(version):
    model, parts = noisy_model(version), documents(masked=False)
    changed = list(parts)
    changed[2] = (parts[2][0].flip(1) % 60 + 1, parts[2][1])
    with torch.no_grad():
        first, second = (model(ids, cu_seqlens=bounds)[0] for ids, _, bounds in map(packed, (parts, changed)))
    for number, (one, other) in enumerate(zip(first.split(LENGTHS), second.split(LENGTHS), strict=True)):
        assert torch.equal(one, other) == (number != 2)


def test_a_head_with_an_adapter_takes_packed_rows_too():
    model, parts = random_model(), documents()
    inject(model, settings=AdapterSettings("bone", 8), targets=["att", "ffn", "head"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".bone"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(key)))
    ids, labels, cu_seqlens = packed(parts)
    expected = one_by_one(model, parts, l2wrap=1e-4)
    assert "head.bone" in expected
    ours = gradients(model, model(ids, labels=labels, cu_seqlens=cu_seqlens, l2wrap=1e-4))
    assert worst_difference(ours, expected) < 1e-5
