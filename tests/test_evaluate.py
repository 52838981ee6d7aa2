"""Held-out loss and exact match, against the same numbers computed sample by sample."""

import json

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
from rwkv_bone.evaluate import exact_match, heldout_loss
from tests.conftest import random_model

PAIRS = [("one -> ", "1"), ("twenty-two -> ", "22"), ("", "7"), ("three hundred -> ", "300"), ("five -> ", "5")]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=5, vocab_size=256).eval()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    return DataConfig(data_file=(str(path),), ctx_len=64)


@torch.no_grad()
@pytest.mark.parametrize("micro_bsz", [1, 2, 5, 8])
def test_heldout_loss_is_the_mean_over_all_trained_tokens_whatever_the_batch(model, config, micro_bsz):
    dataset = load_dataset(config, 256)
    total, tokens = 0.0, 0
    for index in range(len(dataset)):
        sample = dataset[index]
        ids = torch.from_numpy(sample.ids).long()
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        keep = torch.from_numpy(sample.trained[1:])
        total, tokens = total + losses[keep].sum().item(), tokens + int(keep.sum())
    loss, counted = heldout_loss(model, dataset, micro_bsz=micro_bsz)
    assert counted == tokens == sum(len(r) + (1 if p else 0) for p, r in PAIRS)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


class Oracle:
    """A "model" that answers by table: the next byte of the row whose beginning it has been shown."""

    def __init__(self, rows: dict[str, str]):
        self.texts = [(prompt + answer).encode() + b"\0" for prompt, answer in rows.items()]

    def __call__(self, ids, state=None, return_state=False):
        seen = state[0][0].clone() if state else torch.full((len(ids), 64), -1)
        logits = torch.zeros(len(ids), ids.shape[1], 256)
        for row, new in enumerate(ids.tolist()):
            history = [token for token in seen[row].tolist() if token >= 0] + new
            seen[row, : len(history)] = torch.tensor(history)
            text = next(text for text in self.texts if text.startswith(bytes(history)))
            logits[row, -1, text[len(history)]] = 1.0
        return logits, [(seen, seen, seen)]


def test_exact_match_counts_whole_answers_only():
    rows = {"one -> ": "1", "two -> ": "22", "three -> ": "3", "four -> ": "", "five -> ": "5"}
    pairs = [("one -> ", "1"), ("two -> ", "2"), ("three -> ", "33"), ("four -> ", "4"), ("five -> ", "5")]
    fraction, answers = exact_match(Oracle(rows), load_tokenizer("bytes", 256), pairs, batch=2)
    assert fraction == 2 / 5
    assert [answer.prompt for answer in answers] == [prompt for prompt, _ in pairs]
    assert [answer.got for answer in answers] == ["1", "22", "3", "", "5"]
    assert [answer.correct for answer in answers] == [True, False, False, False, True]


def test_prompts_of_a_data_file_can_be_answered_by_a_model(model, config):
    tokenizer = load_tokenizer("bytes", 256)
    pairs = load_pairs(config, config.data_file[0], tokenizer)
    fraction, answers = exact_match(model, tokenizer, pairs)
    assert 0 <= fraction <= 1
    assert [(answer.prompt, answer.expected) for answer in answers] == PAIRS
    together = exact_match(model, tokenizer, pairs, batch=2)
    assert together == (fraction, answers)
