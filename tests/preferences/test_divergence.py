"""How far a model has moved: against torch.distributions on all logits, at positions found by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from rwkv_bone.data.sampler import Answers, Batch
from rwkv_bone.preferences import divergence as module
from rwkv_bone.preferences.divergence import Places, Rows, divergence, places


def linear(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_it_is_the_divergence_of_the_two_distributions_over_the_vocabulary(at_a_time, monkeypatch):
    N, C, V = 7, 5, 11
    now, start, weight = linear(N, C, 0), linear(N, C, 1), 3 * linear(V, C, 2)
    shapes = []

    def head(rows):
        shapes.append(len(rows))
        return rows @ weight.T

    monkeypatch.setattr(module, "LOGITS", at_a_time * V)
    found = divergence(now, start, head, V)
    expected = kl_divergence(Categorical(logits=now @ weight.T), Categorical(logits=start @ weight.T))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert max(shapes) == min(at_a_time, N), "more logits at a time than there may be"


def test_it_is_nothing_for_equal_rows_and_float32_for_rows_in_fewer_bits():
    rows, weight = linear(4, 5, 0).bfloat16(), linear(9, 5, 1).bfloat16()
    found = divergence(rows, rows.clone(), lambda part: part @ weight.T, 9)
    assert found.dtype == torch.float32 and found.tolist() == [0, 0, 0, 0]


class Data:
    """A dataset of pairs, or with `good` of answers. answers: for each unit [prompt ids, answer ids] of its first."""

    def __init__(self, answers, good=None):
        self.answers, self.good = answers, None if good is None else np.array(good)

    def __len__(self):
        return len(self.answers)

    def sequences(self, unit):
        prompt, answer = self.answers[unit]
        trained = np.arange(prompt + answer) >= prompt
        return (SimpleNamespace(trained=trained), None)


def test_places_are_those_that_predict_the_chosen_answers():
    found = places(Data([(2, 3), (4, 1)]))
    assert found.units.tolist() == [0, 0, 0, 1] and found.offsets.tolist() == [1, 2, 3, 3]


def test_of_answers_with_labels_the_good_ones_count_or_all_where_none_is_good():
    data = [(2, 1), (3, 1), (4, 1)]
    assert places(Data(data, [False, True, False])).offsets.tolist() == [2]
    assert places(Data(data, [False, False, False])).offsets.tolist() == [1, 2, 3]


def test_places_are_spread_evenly_over_units_and_their_tokens():
    found = places(Data([(2, 6)] * 10), count=4)
    # Units 0, 2, 5 and 7 have 24 tokens; every sixth of them is the first of its answer.
    assert found.units.tolist() == [0, 2, 5, 7] and found.offsets.tolist() == [1, 1, 1, 1]
    found = places(Data([(2, 3), (2, 5)]), count=4)
    assert found.units.tolist() == [0, 0, 1, 1] and found.offsets.tolist() == [1, 3, 2, 4]


@pytest.mark.parametrize("piece", [3, 6, 100])
def test_rows_are_taken_from_each_batch_in_pieces_too_and_come_in_the_order_of_the_places(piece):
    layer = torch.nn.Identity()
    rows = Rows(layer, Places(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 3])))
    # Unit 2 comes first: sequences of 4 and 1 positions, then unit 0 with 3 and 2, and two that nothing is made of.
    batches = [([2, 0], [0, 4, 5, 8, 10, 12]), ([1], [0, 2, 3])]
    for number, (units, bounds) in enumerate(batches):
        answers = Answers(torch.empty(0), torch.tensor(units), 2, 3)
        nothing = torch.empty(0)
        batch = Batch(nothing, nothing, nothing, [], 0, 0, 0, torch.tensor(bounds), answers)
        hidden = 100 * number + torch.arange(bounds[-1], dtype=torch.float64).view(1, -1, 1)
        with rows.of(batch):
            for part in hidden.split(piece, dim=1):
                layer(part)
    assert rows.all().flatten().tolist() == [5, 7, 101, 3]
    assert not layer._forward_hooks, "outside of a batch the layer is as it was"
