"""What is trained of each sample, templates, and what is cut or left out."""

import numpy as np
import pytest

from rwkv_bone.data import load_dataset, load_tokenizer, render
from rwkv_bone.errors import UserError


def trained_bytes(sample) -> bytes:
    return bytes(sample.ids[sample.trained].tolist())


def test_the_response_and_its_end_are_trained_and_the_prompt_is_not(write_jsonl, config):
    sample = load_dataset(config(write_jsonl({"prompt": "2+2=", "response": "four"})), 256)[0]
    assert bytes(sample.ids.tolist()) == b"2+2=four\0"
    assert trained_bytes(sample) == b"four\0"
    assert sample.ids.dtype == np.int32 and sample.origin.endswith("data.jsonl:1")


@pytest.mark.parametrize("mask", ["none", "pad"])
def test_without_a_mask_every_token_but_the_first_is_trained(write_jsonl, config, mask):
    sample = load_dataset(config(write_jsonl({"prompt": "2+2=", "response": "four"}), loss_mask=mask), 256)[0]
    assert trained_bytes(sample) == b"+2=four\0"


@pytest.mark.parametrize("mask", ["response", "none", "pad"])
def test_a_text_is_trained_with_its_end(write_jsonl, config, mask):
    sample = load_dataset(config(write_jsonl({"text": "four"}), loss_mask=mask), 256)[0]
    assert trained_bytes(sample) == b"our\0"


def test_an_empty_prompt_is_allowed(write_jsonl, config):
    sample = load_dataset(config(write_jsonl({"prompt": "", "response": "four"})), 256)[0]
    assert trained_bytes(sample) == b"our\0"


def test_prompt_and_response_are_tokenised_as_at_generation(write_jsonl, config):
    """Joined before tokenising, the World tokenizer would merge the end of the prompt with the response."""
    tokenizer = load_tokenizer("world", 65536)
    prompt, response = "The colour is gre", "en"
    assert tokenizer.encode(prompt + response) != tokenizer.encode(prompt) + tokenizer.encode(response)
    path = write_jsonl({"prompt": prompt, "response": response})
    sample = load_dataset(config(path, tokenizer="auto", template="raw"), 65536)[0]
    assert sample.ids[~sample.trained].tolist() == tokenizer.encode(prompt)
    assert sample.ids[sample.trained].tolist() == [*tokenizer.encode(response), 0]


def test_the_world_template_has_blank_lines_only_between_turns():
    prompt, response = render("world", "  one\n\n\ntwo\r\n\r\n  three\n", "four\n \n\tfive ")
    assert prompt == "User: one\ntwo\n  three\n\nAssistant:"
    assert response == " four\n\tfive"


def test_the_template_follows_the_tokenizer(write_jsonl, config):
    path = write_jsonl({"prompt": "one", "response": "two"})
    tokenizer = load_tokenizer("world", 65536)
    sample = load_dataset(config(path, tokenizer="auto"), 65536)[0]
    assert tokenizer.decode(sample.ids.tolist()) == "User: one\n\nAssistant: two"
    assert tokenizer.decode(sample.ids[sample.trained].tolist()) == " two"
    assert bytes(load_dataset(config(path, tokenizer="auto"), 256)[0].ids.tolist()) == b"onetwo\0"


def test_a_long_sample_is_cut_and_counted(write_jsonl, config):
    dataset = load_dataset(config(write_jsonl({"text": "abcdefgh"}, {"text": "abc"}), ctx_len=4), 256)
    assert [bytes(sample.ids.tolist()) for sample in dataset] == [b"abcde", b"abc\0"]
    assert dataset.trained_counts.tolist() == [4, 3]
    assert dataset.lines()[1:] == [
        "2 samples, 9 tokens, 7 of them trained; longest 5",
        "cut at --ctx_len 4: 1 samples, 4 tokens left out",
    ]


def test_a_sample_whose_response_is_cut_away_is_left_out_and_named(write_jsonl, config):
    long, short = {"prompt": "p" * 20, "response": "r"}, {"prompt": "p", "response": "r"}
    path = write_jsonl(long, short, long, long, long, short)
    dataset = load_dataset(config(path, ctx_len=19), 256)
    assert [sample.origin for sample in dataset] == [f"{path}:2", f"{path}:6"]
    assert dataset.trained_counts.tolist() == [2, 2]
    named = ", ".join(f"{path}:{line}" for line in (1, 3, 4))
    assert dataset.lines()[-1] == f"left out, no token to train on within --ctx_len 19: 4 samples ({named}, ...)"
    assert load_dataset(config(path, ctx_len=20), 256).trained_counts.tolist() == [1, 2, 1, 1, 1, 2]


def test_nothing_left_to_train_on_is_an_error(write_jsonl, config):
    path = write_jsonl({"prompt": "p" * 20, "response": "r"})
    with pytest.raises(UserError, match=r"data.jsonl:1 .*--ctx_len 5 \(longest sample: 22 tokens\)"):
        load_dataset(config(path, ctx_len=5), 256)


def test_counts_are_those_of_the_masks(write_jsonl, config):
    rows = [{"prompt": "p" * (7 * i % 23), "response": "r" * (1 + 5 * i % 17)} for i in range(200)]
    for ctx_len in (1, 8, 16, 64):
        dataset = load_dataset(config(write_jsonl(*rows), ctx_len=ctx_len), 256)
        assert dataset.trained_counts.tolist() == [int(sample.trained.sum()) for sample in dataset]
        assert all(2 <= len(sample.ids) <= ctx_len + 1 and sample.trained.any() for sample in dataset)


def test_random_windows_refuse_to_part_responses_from_their_prompts(write_jsonl, config):
    path = write_jsonl({"prompt": "one", "response": "two"})
    with pytest.raises(UserError, match="--dataload get .*--loss_mask none"):
        load_dataset(config(path, dataload="get"), 256)


def test_held_out_data_is_read_with_the_same_settings(write_jsonl, config):
    train, held_out = write_jsonl({"q": "1", "a": "one"}), write_jsonl({"q": "2", "a": "two"}, name="held_out.jsonl")
    sample = load_dataset(config(train, sft_field=("q", "a")), 256, held_out)[0]
    assert trained_bytes(sample) == b"two\0" and sample.origin == f"{held_out}:1"
