"""Generation continues from states exactly as if the whole text were read again for every token."""

import pytest
import torch

from rwkv_bone.generate import generate
from tests.conftest import random_model

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13], [30, 31]]


@pytest.fixture(scope="module")
def model():
    return random_model(seed=3).eval()


@torch.no_grad()
def slowly(model, prompt: list[int], max_new: int, stop_id: int | None) -> list[int]:
    """Greedy decoding without any state."""
    ids = list(prompt)
    for _ in range(max_new):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token == stop_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_batch_equals_reading_everything_again_for_each_prompt(model):
    expected = [slowly(model, prompt, 12, None) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new=12, stop_id=None) == expected
    assert len(set(map(tuple, expected))) > 1


def test_each_answer_ends_before_its_own_stop_token(model):
    free = [slowly(model, prompt, 12, None) for prompt in PROMPTS]
    stop = free[0][4]
    answers = generate(model, PROMPTS, max_new=12, stop_id=stop)
    assert answers == [slowly(model, prompt, 12, stop) for prompt in PROMPTS]
    assert {len(answer) for answer in answers} != {12}


def test_one_token_and_no_token_and_no_prompt(model):
    assert generate(model, PROMPTS, max_new=1, stop_id=None) == [slowly(model, p, 1, None) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new=0) == [[] for _ in PROMPTS]
    assert generate(model, [], max_new=5) == []


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        generate(model, [[1], []], max_new=2)


def test_sampling_repeats_with_its_seed_and_changes_with_it(model):
    def draw(seed):
        return generate(model, PROMPTS, max_new=16, stop_id=None, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_small_top_p_leaves_only_the_likeliest_token(model):
    greedy = generate(model, PROMPTS, max_new=8, stop_id=None)
    assert generate(model, PROMPTS, max_new=8, stop_id=None, temperature=1.0, top_p=1e-6) == greedy


def test_tokens_outside_top_p_are_never_drawn():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def fixed(ids, state=None, return_state=False):
        return logits[:, None].expand(ids.shape[0], ids.shape[1], 4), []

    drawn = set()
    for seed in range(40):
        drawn.update(generate(fixed, [[0]], max_new=5, stop_id=None, temperature=1.0, top_p=0.7, seed=seed)[0])
    assert drawn == {0, 1}


def test_no_gradient_is_recorded(model):
    calls = []

    def spy(ids, **kwargs):
        result = model(ids, **kwargs)
        calls.append(result[0].requires_grad)
        return result

    generate(spy, PROMPTS, max_new=3, stop_id=None)
    assert calls and not any(calls)
