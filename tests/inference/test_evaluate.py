"""Held-out loss and exact match, against the same numbers computed sample by sample."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
from rwkv_bone.inference.evaluate import exact_match, heldout_loss
from rwkv_bone.training.context import chunked_loss
from tests.conftest import random_model
from tests.live_bytes import LiveBytes

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


def test_heldout_loss_in_chunks_is_the_same_and_needs_no_more_memory_for_longer_rows(tmp_path):
    """One document of 1,200 tokens against three chunks of 100: the rows of the whole would take four times as much."""
    model, peaks = random_model(n_embd=64, vocab_size=256).eval(), {}
    text = "".join(chr(97 + number * number % 26) for number in range(1199))
    for length in (299, 1199):
        path = tmp_path / f"{length}.jsonl"
        path.write_text(json.dumps({"text": text[:length]}) + "\n")
        dataset = load_dataset(DataConfig(data_file=(str(path),), ctx_len=1200), 256)
        whole = heldout_loss(model, dataset, micro_bsz=1)
        with LiveBytes() as live:
            chunked = heldout_loss(partial(chunked_loss, model, chunk=100), dataset, micro_bsz=1)
        assert chunked == (pytest.approx(whole[0], rel=1e-5), length)
        peaks[length] = live.peak
    assert peaks[1199] <= 1.05 * peaks[299]


def test_heldout_loss_waits_for_the_device_once(model, config):
    """Counted is what fetches a number: `item` and its kind."""
    fetched = []

    class Fetches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                fetched.append(args[0])
            return func(*args, **(kwargs or {}))

    with Fetches():
        heldout_loss(model, load_dataset(config, 256), micro_bsz=1)
    assert len(fetched) == 1


class Oracle:
    """A "model" that answers by table: the next byte of the row whose beginning it has been shown."""

    def __init__(self, rows: dict[str, str]):
        self.texts = [(prompt + answer).encode() + b"\0" for prompt, answer in rows.items()]

    def __call__(self, ids, state=None, return_state=False, last_only=False, cu_seqlens=None):
        documents = ids if cu_seqlens is None else ids[0].tensor_split(cu_seqlens[1:-1])
        before = [] if state is None else state[0][0].tolist()
        seen, logits = torch.full((len(documents), 64), -1), torch.zeros(len(documents), 256)
        for row, new in enumerate(documents):
            known = before[row] if row < len(before) else []
            history = [token for token in known if token >= 0] + new.tolist()
            seen[row, : len(history)] = torch.tensor(history)
            text = next(text for text in self.texts if text.startswith(bytes(history)))
            logits[row, text[len(history)]] = 1.0
        return logits, [(seen, seen, seen)]


def test_exact_match_counts_whole_answers_only():
    rows = {"one -> ": "1", "two -> ": "22", "three -> ": "3", "four -> ": "", "five -> ": "5"}
    pairs = [("one -> ", "1"), ("two -> ", "2"), ("three -> ", "33"), ("four -> ", "4"), ("five -> ", "5")]
    fraction, answers = exact_match(Oracle(rows), load_tokenizer("bytes", 256), pairs, batch=2)
    assert fraction == 2 / 5
    assert [answer.prompt for answer in answers] == [prompt for prompt, _ in pairs]
    assert [answer.got for answer in answers] == ["1", "22", "3", "", "5"]
    assert [answer.correct for answer in answers] == [True, False, False, False, True]


def test_an_answer_that_goes_on_after_the_longest_response_is_wrong():
    pairs = [("two -> ", "2")]
    fraction, answers = exact_match(Oracle({"two -> ": "222"}), load_tokenizer("bytes", 256), pairs)
    assert (fraction, answers[0].got) == (0, "22")
    assert exact_match(Oracle({"two -> ": "2"}), load_tokenizer("bytes", 256), pairs)[0] == 1


def test_prompts_of_a_data_file_can_be_answered_by_a_model(model, config):
    tokenizer = load_tokenizer("bytes", 256)
    pairs = load_pairs(config, config.data_file[0], tokenizer)
    fraction, answers = exact_match(model, tokenizer, pairs)
    assert 0 <= fraction <= 1
    assert [(answer.prompt, answer.expected) for answer in answers] == PAIRS
    together = exact_match(model, tokenizer, pairs, batch=2)
    assert together == (fraction, answers)
