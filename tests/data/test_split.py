"""Held-out samples out of the training data: disjoint, by prompt, and the same ones again."""

import numpy as np
import pytest

from rwkv_bone.data.split import split_heldout
from rwkv_bone.errors import UserError


def groups_of(count: int, prompts: int, seed: int = 0) -> np.ndarray:
    """Like Dataset.groups: `count` samples of `prompts` different prompts."""
    random = np.random.default_rng(seed)
    return random.integers(0, 2**64, prompts, dtype=np.uint64)[random.integers(0, prompts, count)]


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.98, 0.9999])
@pytest.mark.parametrize("count, prompts", [(2, 40), (50, 3), (400, 400), (1000, 300)])
def test_every_sample_is_on_one_side_and_a_prompt_never_on_both(share, count, prompts):
    groups = groups_of(count, prompts)
    train, heldout = split_heldout(groups, share, seed=1)
    assert len(train) and len(heldout)
    assert sorted([*train, *heldout]) == list(range(count))
    assert not set(groups[train]) & set(groups[heldout])


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_about_the_share_is_held_out(share):
    _, heldout = split_heldout(groups_of(20_000, 20_000), share, seed=0)
    spread = (share * (1 - share) / 20_000) ** 0.5
    assert abs(len(heldout) / 20_000 - share) < 4 * spread


def test_consecutive_group_numbers_are_held_out_no_less_evenly():
    _, heldout = split_heldout(np.arange(20_000, dtype=np.uint64), 0.1, seed=0)
    assert abs(len(heldout) - 2000) < 200
    assert abs(np.corrcoef(np.bincount(heldout // 1000), np.arange(20))[0, 1]) < 0.6


def test_the_seed_and_the_content_decide_and_the_order_of_rows_does_not():
    groups = groups_of(500, 400)
    train, heldout = split_heldout(groups, 0.1, seed=3)
    for one, other in zip((train, heldout), split_heldout(groups, 0.1, seed=3), strict=True):
        assert np.array_equal(one, other)
    _, reversed_rows = split_heldout(groups[::-1], 0.1, seed=3)
    assert set(groups[::-1][reversed_rows]) == set(groups[heldout])
    _, other_seed = split_heldout(groups, 0.1, seed=4)
    assert set(other_seed) != set(heldout)


def test_rows_that_are_added_move_no_sample_to_the_other_side():
    groups = groups_of(2000, 2000)
    _, before = split_heldout(groups[:1000], 0.05, seed=0)
    _, after = split_heldout(groups, 0.05, seed=0)
    assert [index for index in after if index < 1000] == before.tolist()


@pytest.mark.parametrize("count, prompts", [(1, 1), (7, 1)])
def test_data_of_one_prompt_cannot_be_split(count, prompts):
    with pytest.raises(UserError, match=f"--eval_split 0.02: .*{count} usable samples with 1 different prompts"):
        split_heldout(groups_of(count, prompts), 0.02, seed=0)
