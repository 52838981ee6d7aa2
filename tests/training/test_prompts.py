"""Prompts that both answers of a pair share, computed once: the same losses and gradients as of whole documents."""

import numpy as np
import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.data import Batch
from rwkv_bone.data.sampler import Answers
from rwkv_bone.models import EVERY_BLOCK, NOTHING
from rwkv_bone.training import prompts
from tests.conftest import random_model

# Each pair: its prompt, chosen and rejected. Two answers may begin alike; one prompt is too short to be shared.
PAIRS = [("abcdefgh", "ijk", "lm"), ("no", "pqr", "s"), ("tuvwxyz", "same first", "same last"), ("abcdef", "g", "h")]


def packed(pairs, unused=3):
    """A packed micro-batch: two documents for each pair, and a document of nothing behind them."""
    ids, labels, bounds = [], [], [0]
    for prompt, *answers in pairs:
        for answer in answers:
            text = [ord(letter) % 61 for letter in prompt + answer]
            ids += text[:-1]
            labels += [-100] * (len(prompt) - 1) + text[len(prompt) :]
            bounds.append(len(ids))
    if unused:
        ids, labels, bounds = ids + [0] * unused, labels + [-100] * unused, [*bounds, len(ids) + unused]
    rows = torch.tensor([place for place, label in enumerate(labels) if label != -100], dtype=torch.int64)
    cu_seqlens = torch.tensor(bounds)
    answers = Answers(
        torch.searchsorted(cu_seqlens, rows, right=True) - 1, torch.arange(len(pairs)), 2, window_units=len(pairs)
    )
    made = Batch(
        torch.tensor([ids]), torch.tensor([labels]), rows, [], len(ids), len(rows), len(ids), cu_seqlens, answers
    )
    return made.to("cpu")


@pytest.fixture(autouse=True)
def short_prompts_count(monkeypatch):
    monkeypatch.setattr(prompts, "LEAST", 4)
    monkeypatch.setattr(prompts, "LEAST_RECOMPUTED", 4)


def gradients(model, losses):
    """Of a sum in which every label has another weight."""
    model.zero_grad()
    (losses * torch.linspace(-1, 2, len(losses))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [NOTHING, EVERY_BLOCK], ids=["kept", "recomputed"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_losses_and_gradients_are_those_of_whole_documents(version, recompute):
    model = random_model(version=version)
    inject(model, settings=AdapterSettings("bone", 8))
    model.add_time_state()
    for name, parameter in model.named_parameters():
        if name.endswith(("bone", "time_state")):
            torch.nn.init.normal_(parameter.requires_grad_(True), std=0.1)
    batch = packed(PAIRS)
    where = {"label_rows": batch.label_rows, "cu_seqlens": batch.cu_seqlens}
    whole = model(batch.ids, labels=batch.labels, per_token=True, **where)
    expected = gradients(model, whole)
    once = prompts.shared_prompts(model, batch, recompute=recompute)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-5)
    found = gradients(model, once)
    assert found.keys() == expected.keys() and any(name.endswith("time_state") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))


def test_what_is_shared_goes_through_the_model_once():
    batch, model, seen = packed(PAIRS), random_model(), []

    def counting(ids, **options):
        seen.append(np.diff(options["cu_seqlens"]).tolist())
        return model(ids, **options)

    prompts.shared_prompts(counting, batch, recompute=NOTHING)
    # A prompt's last id predicts the first of the answer, so that is where the answers begin. At the end of a row there
    # may be a document that fills it up.
    assert [lengths[:count] for lengths, count in zip(seen, (3, 8), strict=True)] == [
        [7, 6, 5],
        [3, 2, 10, 9, 1, 1, 4, 2],
    ]
    assert sum(map(sum, seen)) <= 18 + 32 + 2 * len(batch.ids[0]) // 32


def test_a_prompt_is_shared_that_is_worth_its_states(monkeypatch):
    pairs = [(prompt * 9, *answers) for prompt, *answers in PAIRS]  # 72, 18, 63 and 54 ids
    seen, model = [], random_model()

    def counting(ids, **options):
        seen.append(len(options["cu_seqlens"]) - 1)
        return model(ids, **options)

    batch = packed(pairs)
    monkeypatch.setattr(prompts, "LEAST", 60)
    monkeypatch.setattr(prompts, "LEAST_RECOMPUTED", 70)
    for recompute in (NOTHING, EVERY_BLOCK):
        prompts.shared_prompts(counting, batch, recompute=recompute)
    assert seen[0] - 2 in (0, 1) and seen[2] - 1 in (0, 1)


@pytest.mark.parametrize("pairs", [[], PAIRS[1:2]], ids=["no pair", "a short prompt"])
def test_a_row_that_shares_nothing_calls_the_model_as_often(pairs):
    batch, model, seen = packed(pairs), random_model(), []

    def counting(ids, **options):
        seen.append(ids.shape)
        return model(ids, **options)

    losses = prompts.shared_prompts(counting, batch, recompute=NOTHING)
    where = {"label_rows": batch.label_rows, "cu_seqlens": batch.cu_seqlens}
    torch.testing.assert_close(losses, model(batch.ids, labels=batch.labels, per_token=True, **where))
    assert len(seen) == 2
