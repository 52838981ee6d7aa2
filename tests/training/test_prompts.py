"""Prompts that both answers of a pair share, computed once: the same losses and gradients as of whole documents."""

import json

import numpy as np
import pytest
import torch

from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.data import Batch
from rwkv_bone.data.sampler import Answers
from rwkv_bone.models import EVERY_BLOCK, NOTHING
from rwkv_bone.training import prompts
from tests.conftest import random_model
from tests.training.conftest import adapter_of, largest_difference, log_of

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


# Of 8 pairs half have a prompt that is shared, the others one that is not: with a pair at a time two processes differ.
ROWS = [
    ("each word of this prompt is read only once " * (n % 2) + f"{n}:", f"{n * n}", f"{n + n}") for n in range(11, 19)
]


@pytest.fixture(scope="module")
def runs(job):
    """Flags of a run on these pairs, and the folder of one whose batches are padded, where nothing is shared."""
    path = job.folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in ROWS))
    flags = {"task": "dpo", "data_file": path, "ctx_len": 60, "epoch_count": 4, "micro_bsz": 8, "adam_eps": 1e-3}
    return flags, job.run("padded", **flags, dataload="pad")


def assert_same(folder, other):
    ours, theirs = log_of(folder), log_of(other)
    assert len(ours) == len(theirs) == 4
    for key in ("loss", "grad_norm", "reward_margin", "logp_chosen", "logp_rejected"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4, abs=1e-6)
    assert largest_difference(adapter_of(folder, "rwkv-3.pth"), adapter_of(other, "rwkv-3.pth")) < 1e-5


def test_a_run_that_shares_prompts_trains_what_one_does_that_does_not(job, runs, monkeypatch):
    flags, padded = runs
    monkeypatch.undo()
    shared = []
    of_row = prompts.cut
    monkeypatch.setattr(prompts, "cut", lambda *given: shared.append(of_row(*given)) or shared[-1])
    assert_same(job.run("packed", **flags, dataload="pack"), padded)
    assert sum(made.pairs for made in shared) == 5 * len(ROWS) // 2  # of the reference, and of four epochs


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_processes_of_which_one_shares_a_prompt_train_the_same(job, runs, stage):
    flags, padded = runs
    more = {"dataload": "pack", "micro_bsz": 1, "accumulate_grad_batches": 4, "strategy": f"deepspeed_stage_{stage}"}
    folder, done = job.ranks(f"two {stage}", 2, **(flags | more))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder, padded)
