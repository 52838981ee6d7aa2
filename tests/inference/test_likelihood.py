"""Log-likelihoods are those of the whole text, read at once in float64 with plain log-softmax over all its logits."""

import copy
import math

import numpy as np
import pytest
import torch

from rwkv_bone import load_model
from rwkv_bone.adapters import ADAPTERS, AdapterSettings, inject
from rwkv_bone.errors import UserError
from rwkv_bone.inference.generate import generate
from rwkv_bone.inference.likelihood import Likelihood, log_likelihoods, rolling
from rwkv_bone.quantization import QuantLinear
from tests.conftest import random_model
from tests.live_bytes import LiveBytes
from tests.rwkv_oracle import logits as oracle_logits

VOCABULARY = 61


def ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()


EXAMPLES, QUESTION, OTHER = ids(11, 1), ids(6, 2), ids(9, 3)
# Contexts of one token and of many; two questions behind the same examples, one with three choices; a context that is
# the beginning of another; an empty continuation, and the same pair twice.
PAIRS = [
    (EXAMPLES + QUESTION, ids(1, 4)),
    (EXAMPLES + QUESTION, ids(7, 5)),
    (EXAMPLES + QUESTION, ids(2, 6)),
    (EXAMPLES + OTHER, ids(3, 7)),
    (EXAMPLES, ids(4, 8)),
    ([0], ids(40, 9)),
    (ids(33, 10), []),
    ([5], ids(1, 11)),
    (ids(2, 12), ids(17, 13)),
    (EXAMPLES + OTHER, ids(3, 7)),
]


def of_dtype(model, dtype: torch.dtype):
    """A copy whose weights and arithmetic are of this dtype."""
    other = copy.deepcopy(model).to(dtype)
    other.dtype = other.emb.dtype = dtype
    return other.eval()


@torch.no_grad()
def exact(model, pairs=PAIRS) -> list[Likelihood]:
    """The definition: each text alone, whole, in float64."""
    model, found = of_dtype(model, torch.float64), []
    for context, continuation in pairs:
        rows = model(torch.tensor([[*context, *continuation]]))[0].log_softmax(dim=1)[len(context) - 1 :]
        steps = [
            (float(row[token]), int(row.argmax()) == token) for row, token in zip(rows, continuation, strict=False)
        ]
        found.append(Likelihood(math.fsum(p for p, _ in steps), len(continuation), all(right for _, right in steps)))
    return found


def assert_close(found: list[Likelihood], expected: list[Likelihood], limit: float) -> None:
    """limit: nats for each token."""
    assert [f[1:] for f in found] == [e[1:] for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert abs(one.total - other.total) <= limit * max(1, other.tokens), (one, other)


def with_greedy(model, pairs=PAIRS) -> list:
    """The pairs, and continuations that the model itself writes: some continuations must be greedy."""
    contexts = [context for context, _ in pairs]
    return [*pairs, *zip(contexts, generate(model, contexts, max_new=3, stop_id=None), strict=True)]


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("how", [{}, {"piece": 3, "batch": 4}, {"piece": 8, "batch": 1}, {"batch": 2}])
def test_a_likelihood_is_that_of_the_text_read_at_once_however_it_is_cut_and_batched(version, how):
    """Pieces smaller than a text, of several, and ending where one ends; from an initial state that is not zero."""
    model = of_dtype(random_model(seed=3, version=version), torch.float64)
    model.add_time_state()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(0))
    pairs = with_greedy(model)
    expected = exact(model, pairs)
    assert {one.greedy for one in expected if one.tokens} == {True, False}
    assert_close(log_likelihoods(model, pairs, **how), expected, 1e-5)


def test_pieces_of_one_token_give_the_same():
    model = random_model(seed=3).eval()
    assert_close(log_likelihoods(model, PAIRS[:6], piece=1), exact(model, PAIRS[:6]), 2e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_in_fp32_and_bf16_it_differs_by_their_rounding(version, dtype, limit):
    model = of_dtype(random_model(seed=5, version=version), dtype)
    found, expected = log_likelihoods(model, PAIRS, piece=16), exact(model)
    assert_close([one._replace(greedy=False) for one in found], [one._replace(greedy=False) for one in expected], limit)


@pytest.mark.parametrize(("kind", "quant"), [("bone", "none"), ("bat", "none"), ("lora", "int8"), ("bone", "nf4")])
def test_adapters_also_one_on_the_head_and_quantised_projections_count(tiny_checkpoint, kind, quant):
    model = load_model(tiny_checkpoint(n_embd=64, head_size=32, vocab_size=64, seed=7), quant=quant)
    assert quant == "none" or any(isinstance(module, QuantLinear) for module in model.modules())
    plain = exact(model)
    inject(model, settings=AdapterSettings(kind, 8, alpha=11.0), targets=["att", "ffn", "head"])
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, ADAPTERS[kind]):
            for name in layer.parameter_names:
                tensor = layer.get_parameter(name)
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    expected = exact(model)
    assert abs(expected[1].total - plain[1].total) > 1e-2
    assert_close(log_likelihoods(model, PAIRS, piece=16), expected, 5e-5)


def count_tokens(model) -> list[int]:
    """Grows by the number of tokens of each forward pass."""
    read: list[int] = []
    model.emb.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    return read


def test_what_pairs_have_in_common_is_read_once_and_only_continuations_go_through_the_head():
    model = random_model(seed=3).eval()
    read, rows = count_tokens(model), []
    model.head.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel() // args[0].shape[-1]))
    choices = [ids(2, 20 + i) for i in range(5)]
    pairs = [(EXAMPLES + question, choice) for question in (QUESTION, OTHER) for choice in choices]
    log_likelihoods(model, pairs)
    branches = len(pairs) * 2  # the last token of the context and the first of the continuation
    assert sum(read) == len(EXAMPLES) + len(QUESTION) - 1 + len(OTHER) - 1 + branches
    # And the last row of each context, since a forward pass gives logits of something.
    assert sum(rows) == branches + 3


def test_more_choices_than_a_batch_share_their_question_too():
    model = random_model(seed=3).eval()
    pairs = [(QUESTION, [token]) for token in range(10)] + [(OTHER, [token]) for token in range(3)]
    expected, counts = exact(model, pairs), []
    read = count_tokens(model)
    assert_close(log_likelihoods(model, pairs, batch=4, done=counts.append), expected, 2e-5)
    assert sum(read) == len(QUESTION) - 1 + len(OTHER) - 1 + len(pairs)
    assert counts == [10, 3]
    every_next_token = [
        math.exp(one.total) for one in log_likelihoods(model, [(OTHER, [t]) for t in range(VOCABULARY)])
    ]
    assert sum(every_next_token) == pytest.approx(1, abs=1e-5)


def test_a_whole_text_is_read_from_the_end_of_document_token_on():
    model = random_model(seed=4).eval()
    texts = [ids(30, 1), ids(1, 2), [], ids(57, 3)]
    expected = exact(model, [([2], text) for text in texts])
    assert_close(rolling(model, texts, eod=2, piece=16), expected, 2e-5)
    assert rolling(model, texts[:1]) == log_likelihoods(model, [([0], texts[0])])


def test_memory_does_not_grow_with_the_length_of_a_text():
    model = random_model(seed=4, n_layer=1, vocab_size=4096).eval()

    def peak(length: int) -> int:
        with LiveBytes() as live:
            rolling(model, [ids(length, 1)], piece=64)
        return live.peak

    peak(40)  # what is made once
    logits = 64 * 4096 * 4
    assert logits < peak(128) < peak(640) < 1.2 * logits


def test_a_large_vocabulary_makes_the_pieces_of_continuations_smaller():
    """2^24 logits at a time on a CPU: 256 rows of 65536, whatever `piece` is."""
    model = random_model(seed=4, n_layer=1, vocab_size=65536).eval()
    read = count_tokens(model)
    rolling(model, [ids(600, 1)], piece=1024)
    assert read == [256, 256, 88]


def test_no_pair_no_likelihood():
    assert log_likelihoods(random_model().eval(), []) == []


@pytest.mark.parametrize(
    ("pairs", "how", "words"),
    [
        ([([1], [2]), ([], [1])], {}, "pair 1: its context is empty"),
        ([([1], [61])], {}, "pair 0: token 61: expected 0 to 60"),
        ([([-1], [6])], {}, "pair 0: token -1"),
        ([], {"piece": 0}, "piece 0"),
        ([], {"batch": 0}, "batch 0"),
    ],
)
def test_what_cannot_be_read_is_refused(pairs, how, words):
    with pytest.raises(ValueError, match=words):
        log_likelihoods(random_model().eval(), pairs, **how)


def test_numbers_that_are_not_finite_are_no_likelihood():
    model = random_model(seed=3).eval()
    model.ln_out.weight.data[3] = math.nan
    with pytest.raises(UserError, match="pair 0 has the log-likelihood nan"):
        log_likelihoods(model, PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("version", [5, 6, 7])
def test_likelihoods_are_those_of_the_rwkv_package(version, tiny_checkpoint):
    path = tiny_checkpoint(version=version, n_embd=128, head_size=64, vocab_size=256)
    text = ids(70, 1)
    logits = oracle_logits(path, text, version).astype(np.float64)
    steps = [row[token] - np.logaddexp.reduce(row) for row, token in zip(logits, text[1:], strict=False)]
    found = log_likelihoods(load_model(path), [(text[:50], text[50:]), (text[:1], text[1:])], piece=16)
    assert found[0].total == pytest.approx(sum(steps[49:]), abs=1e-3)
    assert found[1].total == pytest.approx(sum(steps), abs=3e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("version", [7, 6, 5])
def test_likelihoods_are_the_same_on_a_gpu(tiny_checkpoint, version, device):
    path = tiny_checkpoint(version=version, n_embd=64, head_size=32, seed=3)
    expected = log_likelihoods(load_model(path, op="torch"), PAIRS)
    assert_close(log_likelihoods(load_model(path, device=device), PAIRS, device=device), expected, 1e-4)
