"""Which token is chosen: against sums by hand, and against a plain loop over all tokens."""

import math
import random
from collections import Counter

import pytest
import torch

from rwkv_bone.inference.sampling import LIKELIEST, Sampler, Samplers, Sampling, _drawn


def by_hand(logits: list[float], number: float, temperature: float, top_p: float, top_k: int) -> int:
    """The token at this number of the distribution, likeliest first."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    total = sum(weights)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept, reached = [], 0.0
    for i in order[: top_k or len(order)]:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    if top_p == 1 and not top_k:
        kept = list(range(len(logits)))
    aim, before = number * sum(weights[i] for i in kept), 0.0
    for i in kept:
        before += weights[i]
        if before > aim:
            return i
    return kept[-1]


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, LIKELIEST + 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize(("size", "spread"), [(9, 2.0), (LIKELIEST * 2, 3.0), (LIKELIEST * 2, 0.01)])
def test_a_drawn_token_is_the_one_at_its_number(top_k, top_p, size, spread):
    """Also where more tokens are needed than the likeliest ones: with almost equal logits."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, size, generator=generator) * spread).double().float()
    logits[::2] *= 5  # whose likeliest tokens are enough
    numbers = torch.tensor([[0.0], [0.2], [0.5], [0.77], [0.9], [0.96]])
    how = Sampling(temperature=0.8, top_p=top_p, top_k=top_k)
    found = _drawn(logits, how, numbers)
    for row, number, token in zip(logits.tolist(), numbers.flatten().tolist(), found.tolist(), strict=True):
        # Sums of thousands of float32 numbers: the token beside may be meant.
        near = {by_hand(row, max(0.0, number + shift), 0.8, top_p, top_k) for shift in (-2e-5, 0.0, 2e-5)}
        assert token in near


def test_the_first_and_the_last_number_draw_a_token_that_can_be_drawn():
    """A number just below 1 is 1 in float32."""
    logits = torch.tensor([[0.0, -1.0, -200.0, -math.inf], [-math.inf, 0.0, -math.inf, -math.inf]])
    for options in ({}, {"top_p": 0.999}, {"top_k": 4}):
        for number, expected in ((0.0, [0, 1]), (1 - 2**-24, [1, 1]), (1.0, [1, 1])):
            numbers = torch.full((2, 1), number)
            assert _drawn(logits, Sampling(temperature=1.0, **options), numbers).tolist() == expected


def test_drawn_tokens_are_as_frequent_as_they_are_probable():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(temperature=1.0, seed=1), 4)
    counts = Counter(sampler(probability.log()) for _ in range(4000))
    for token, share in enumerate(probability.tolist()):
        assert abs(counts[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_penalties_are_those_of_chatrwkv():
    """Its loop, with a dictionary of counts: logits[n] -= presence + count * frequency; counts decay; count + 1."""
    how = Sampling(presence_penalty=0.4, frequency_penalty=0.7, penalty_decay=0.9)
    generator, sampler, counts = torch.Generator().manual_seed(3), Sampler(how, 6), {}
    told = []
    for _ in range(60):
        logits = torch.randn(6, generator=generator)
        expected = logits.double().tolist()
        for token, count in counts.items():
            expected[token] -= 0.4 + count * 0.7
        token = sampler(logits)
        assert token == expected.index(max(expected))
        told.append(token != int(logits.argmax()))
        counts = {n: count * 0.9 for n, count in counts.items()}
        counts[token] = counts.get(token, 0.0) + 1
    assert 10 < sum(told) < 60
    sampler.forget()
    assert sampler(torch.arange(6.0)) == 5


def test_a_token_of_long_ago_keeps_its_presence():
    sampler = Sampler(Sampling(presence_penalty=2.0, penalty_decay=0.0), 3)
    assert [sampler(torch.tensor([3.0, 2.0, 0.5])) for _ in range(3)] == [0, 1, 0]
    assert sampler(torch.tensor([1.9, 0.0, 0.0])) == 2  # both others are penalised


def test_the_given_logits_stay_as_they_are():
    logits = torch.tensor([1.0, 2.0])
    sampler = Sampler(Sampling(presence_penalty=1.5, frequency_penalty=1.0), 2)
    assert [sampler(logits) for _ in range(2)] == [1, 0] and logits.tolist() == [1.0, 2.0]


def test_a_sequence_draws_the_same_beside_any_others():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 3, 30, generator=generator)
    how = Sampling(temperature=1.0, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5)

    def alone(row: int) -> list[int]:
        sampler = Samplers(how, [f"seed {row}"])
        return [int(sampler(step[row : row + 1])) for step in logits]

    together, found = Samplers(how, ["seed 0", "seed 1", "seed 2"]), [[], [], []]
    rows = [0, 1, 2]
    for i, step in enumerate(logits):
        if i == 10:
            together.keep([0, 2])
            rows = [0, 2]
        for row, token in zip(rows, together(step[rows]).tolist(), strict=True):
            found[row].append(token)
    assert found[0] == alone(0) and found[2] == alone(2) and found[1] == alone(1)[:10]


def test_seeds_repeat_and_differ():
    logits = torch.zeros(1000)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 1000)
        return [sampler(logits) for _ in range(8)]

    assert draw(1) == draw(1) != draw(2)
    # Python's own numbers for this seed: the same text comes back with every version.
    numbers = random.Random("1")
    assert draw(1) == [int(numbers.random() * 1000) for _ in range(8)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("temperature", value) for value in (-1.0, math.nan, math.inf)],
        *[("top_p", value) for value in (0.0, -0.1, 1.1, math.nan)],
        ("top_k", -1),
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (math.nan, math.inf)],
        *[("penalty_decay", value) for value in (-0.1, 1.1, math.nan)],
        ("max_new", -1),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} {value}: expected"):
        Sampling(**{setting: value})
