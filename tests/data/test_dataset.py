"""What is trained of each sample, templates, and what is cut or left out."""

import numpy as np
import pytest

from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
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


def test_the_template_follows_the_tokenizer(write_jsonl, config):
    path = write_jsonl({"prompt": "one", "response": "two"})
    tokenizer = load_tokenizer("world", 65536)
    sample = load_dataset(config(path, tokenizer="auto"), 65536)[0]
    assert tokenizer.decode(sample.ids.tolist()) == "User: one\n\nAssistant: two"
    assert tokenizer.decode(sample.ids[sample.trained].tolist()) == " two"
    assert bytes(load_dataset(config(path, tokenizer="auto"), 256)[0].ids.tolist()) == b"onetwo\0"


def test_a_long_sample_is_cut_and_counted(write_jsonl, config):
    path = write_jsonl({"text": "abcdefgh"}, {"text": "abc"})
    dataset = load_dataset(config(path, ctx_len=4, long_samples="cut"), 256)
    assert [bytes(sample.ids.tolist()) for sample in dataset] == [b"abcde", b"abc\0"]
    assert dataset.trained_counts.tolist() == [4, 3]
    assert dataset.summary_lines()[1:3] == [
        "2 samples, 9 tokens, 7 of them trained; longest 5",
        f"warning: {path}: cut at --ctx_len 4: 1 sample, 4 tokens left out, 36.4% of the trained tokens",
    ]


def test_a_sample_whose_response_is_cut_away_is_left_out_and_named(write_jsonl, config):
    long, short = {"prompt": "p" * 20, "response": "r"}, {"prompt": "p", "response": "r"}
    path = write_jsonl(long, short, long, long, long, short)
    dataset = load_dataset(config(path, ctx_len=19, max_lost=1), 256)
    assert [sample.origin for sample in dataset] == [f"{path}:2", f"{path}:6"]
    assert dataset.trained_counts.tolist() == [2, 2]
    named = ", ".join(f"{path}:{line}" for line in (1, 3, 4))
    assert [line for line in dataset.summary_lines() if "ctx_len 19" in line] == [
        f"warning: {path}: cut at --ctx_len 19: 4 samples, 8 tokens left out, 66.7% of the trained tokens",
        f"{path}: left out, no token to train on within --ctx_len 19: 4 of these samples, 66.7% of all ({named}, ...)",
    ]
    assert load_dataset(config(path, ctx_len=20), 256).trained_counts.tolist() == [1, 2, 1, 1, 1, 2]


def test_nothing_left_to_train_on_is_an_error(write_jsonl, config):
    path = write_jsonl({"prompt": "p" * 20, "response": "r"})
    with pytest.raises(UserError, match=r"data.jsonl:1 .*--ctx_len 5 \(longest sample: 22 tokens\): raise --ctx_len"):
        load_dataset(config(path, ctx_len=5), 256)
    with pytest.raises(UserError, match="check --loss_mask, which marks nothing"):
        load_dataset(config(write_jsonl({"text": "no turns"}), loss_mask="qa"), 256)


def test_counts_are_those_of_the_masks(write_jsonl, config):
    rows = [{"prompt": "p" * (7 * i % 23), "response": "r" * (1 + 5 * i % 17)} for i in range(200)]
    for ctx_len in (1, 8, 16, 64):
        dataset = load_dataset(config(write_jsonl(*rows), ctx_len=ctx_len, max_lost=1), 256)
        assert dataset.trained_counts.tolist() == [int(sample.trained.sum()) for sample in dataset]
        assert all(2 <= len(sample.ids) <= ctx_len + 1 and sample.trained.any() for sample in dataset)


LONG = [
    {"prompt": "p" * (i * 5 % 13), "response": "".join(chr(97 + (i + k) % 26) for k in range(1 + i * 7 % 40))}
    for i in range(60)
]


def test_long_samples_may_be_dropped_and_are_counted(write_jsonl, config):
    path = write_jsonl({"text": "abcd"}, {"text": "abc"}, {"text": "abcdef"})
    dataset = load_dataset(config(path, ctx_len=4, long_samples="drop"), 256)
    assert [bytes(sample.ids.tolist()) for sample in dataset] == [b"abcd\0", b"abc\0"]
    what = f"{path}: dropped (--long_samples drop): 1 sample longer than --ctx_len 4 ({path}:3)"
    assert dataset.summary_lines()[2] == f"warning: {what}, 46.2% of the trained tokens"


@pytest.mark.parametrize("ctx_len", [1, 2, 3, 8, 31, 64])
@pytest.mark.parametrize("mask", ["response", "none"])
def test_long_samples_may_be_split_without_losing_or_repeating_a_target(write_jsonl, config, ctx_len, mask):
    path = write_jsonl(*LONG)
    whole = load_dataset(config(path, ctx_len=1000, loss_mask=mask), 256)
    dataset = load_dataset(config(path, ctx_len=ctx_len, loss_mask=mask, long_samples="split"), 256)
    assert dataset.trained_counts.sum() == whole.trained_counts.sum()
    assert dataset.trained_counts.tolist() == [int(sample.trained.sum()) for sample in dataset]
    assert dataset.lengths.tolist() == [len(sample.ids) for sample in dataset]
    pieces = {}
    for sample, group in zip(dataset, dataset.groups.tolist(), strict=True):
        assert 2 <= len(sample.ids) <= ctx_len + 1 and sample.trained.any() and not sample.trained[0]
        ids, groups = pieces.setdefault(sample.origin, ([], set()))
        ids += sample.ids[sample.trained].tolist()
        groups.add(group)
    assert {origin: ids for origin, (ids, _) in pieces.items()} == {
        sample.origin: sample.ids[sample.trained].tolist() for sample in whole
    }
    assert all(len(groups) == 1 for _, groups in pieces.values())  # held out together or not at all


def test_a_split_is_counted(write_jsonl, config):
    path = write_jsonl({"text": "abcdefgh"}, {"text": "ab"})
    dataset = load_dataset(config(path, ctx_len=3, long_samples="split"), 256)
    assert [bytes(sample.ids.tolist()) for sample in dataset] == [b"abcd", b"defg", b"gh\0", b"ab\0"]
    line = f"{path}: split (--long_samples split): 1 sample longer than --ctx_len 3 became 3"
    assert dataset.summary_lines()[2] == line


def test_equal_prompts_have_equal_groups(write_jsonl, config):
    rows = [("one", "1"), ("two", "1"), ("one", "2"), ("one ", "1"), ("", "1"), ("", "1"), ("", "2")]
    path = write_jsonl(*({"prompt": prompt, "response": response} for prompt, response in rows))
    names = load_dataset(config(path), 256).groups.tolist()
    assert [names.index(name) for name in names] == [0, 1, 0, 3, 4, 4, 6]
    texts = load_dataset(config(write_jsonl({"text": "a"}, {"text": "b"}, {"text": "a"})), 256)
    names = texts.groups.tolist()
    assert texts.groups.dtype == np.uint64 and [names.index(name) for name in names] == [0, 1, 0]


def test_several_files_are_one_set_with_weights(write_jsonl, config):
    first = write_jsonl({"text": "a"}, {"text": "b"}, name="first.jsonl")
    second = write_jsonl({"prompt": "c", "response": "d"}, name="second.jsonl")
    dataset = load_dataset(config((first, second), data_weights=("2", "0.5")), 256)
    assert [(bytes(s.ids.tolist()), s.origin) for s in dataset] == [
        (b"a\0", f"{first}:1"),
        (b"b\0", f"{first}:2"),
        (b"cd\0", f"{second}:1"),
    ]
    assert dataset.repeats.tolist() == [2, 2, 0.5]
    assert [line.split(":")[0] for line in dataset.summary_lines()[:2]] == [first, second]
    assert [line.split("; ")[-1] for line in dataset.summary_lines()[:2]] == ["weight 2", "weight 0.5"]
    assert load_dataset(config((first, second)), 256).repeats is None
    assert load_dataset(config((first, second), data_weights=("2", "1")), 256, first).repeats is None
    with pytest.raises(UserError, match="--data_weights has no meaning with --dataload get"):
        load_dataset(config((first, second), data_weights=("2", "1"), dataload="get"), 256)


def test_a_subset_keeps_everything_that_belongs_to_a_sample(write_jsonl, config):
    files = write_jsonl(*LONG, name="a.jsonl"), write_jsonl(*LONG[::-1], name="b.jsonl")
    dataset = load_dataset(config(files, ctx_len=16, long_samples="split", data_weights=("1", "3")), 256)
    chosen = np.array([5, 0, len(dataset) - 1, 40])
    part = dataset.subset(chosen)
    for index, sample in zip(chosen, part, strict=True):
        assert sample.ids.tolist() == dataset[index].ids.tolist() and sample.origin == dataset[index].origin
    for name in ("lengths", "trained_counts", "groups", "repeats"):
        assert getattr(part, name).tolist() == getattr(dataset, name)[chosen].tolist()
    assert part.summary_lines()[2].startswith("4 samples, ")


def test_the_stream_of_a_subset_lacks_what_was_left_out(write_jsonl, config):
    files = (
        write_jsonl(*({"text": text} for text in ("ab", "c", "def", "g")), name="a.jsonl"),
        write_jsonl({"text": "h"}),
    )
    dataset = load_dataset(config(files, dataload="get"), 256)
    assert bytes(dataset.tokens[0:99].tolist()) == b"ab\0c\0def\0g\0h\0" and len(dataset.tokens) == 13
    part = dataset.subset(np.array([0, 1, 3, 4]))
    stream = part.tokens
    assert bytes(stream[0:99].tolist()) == b"ab\0c\0g\0h\0"
    for start in range(len(stream)):
        for stop in range(start, len(stream) + 1):
            assert bytes(stream[start:stop].tolist()) == b"ab\0c\0g\0h\0"[start:stop]
    assert part.windows and not part.subset(np.array([0]), windows=False).windows


def test_pairs_of_a_dataset_are_those_of_its_rows(write_jsonl, config):
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    path = write_jsonl(
        {"messages": turns}, {"messages": turns[2:]}, {"messages": [turns[2], {**turns[3], "content": "x" * 99}]}
    )
    for tokenizer, size in (("bytes", 256), ("world", 65536)):
        cfg = config(path, tokenizer=tokenizer, template="world", ctx_len=60, max_lost=1)
        encoder = load_tokenizer(tokenizer, size)
        expected = load_pairs(cfg, path, encoder)
        assert expected[1] == ("User: c\n\nAssistant:", " d")
        # A sample that is cut has no whole response to compare with.
        uncut = expected[:2] if tokenizer == "bytes" else expected
        assert load_dataset(cfg, size).pairs(encoder) == uncut
        assert load_dataset(cfg, size).pairs(encoder, limit=1) == expected[:1]
        assert (
            load_dataset(config(path, loss_mask="none", template="world"), 256).pairs(load_tokenizer("bytes", 256))
            == []
        )


@pytest.mark.parametrize("loss_mask", ["response", "last", "none", "pad", "qa", "se"])
@pytest.mark.parametrize("dataload", ["pack", "pad", "only", "get"])
def test_every_mask_and_way_to_load_works_or_says_why_not(write_jsonl, config, dataload, loss_mask):
    """No combination ends in a traceback, with a single sample and batches of eight."""
    mask_id = '{"mask0": "User:", "mask1": "Assistant:"}' if loss_mask == "se" else ""
    settings = dict(dataload=dataload, loss_mask=loss_mask, mask_id=mask_id, micro_bsz=1 if dataload == "only" else 8)
    path = write_jsonl({"text": "User: hi\n\nAssistant: ho"}, name="texts.jsonl")
    if loss_mask == "last":
        with pytest.raises(UserError, match=r"--loss_mask last has no meaning here, as .*texts.jsonl \(rows"):
            load_dataset(config(path, **settings), 256)
        return
    if dataload == "get" and loss_mask in ("qa", "se"):
        with pytest.raises(
            UserError, match=f"--dataload get .* --loss_mask {loss_mask} cannot hold: use --dataload pack"
        ):
            load_dataset(config(path, **settings), 256)
        return
    trained = b" ho\0" if loss_mask in ("qa", "se") else b"ser: hi\n\nAssistant: ho\0"
    assert trained_bytes(load_dataset(config(path, **settings), 256)[0]) == trained


def test_a_mistake_in_the_settings_is_not_taken_for_bad_rows(write_jsonl, config):
    path = write_jsonl({"text": "a"})
    for settings, flag in (({"loss_mask": "se"}, "--mask_id"), ({"template": "nowhere"}, "--template nowhere")):
        with pytest.raises(UserError, match=flag) as error:
            load_dataset(config(path, bad_rows="skip", **settings), 256)
        assert "no row can be used" not in str(error.value)


def test_random_windows_refuse_to_part_responses_from_their_prompts(write_jsonl, config):
    path = write_jsonl({"prompt": "one", "response": "two"})
    with pytest.raises(UserError, match="--dataload get .*--loss_mask none"):
        load_dataset(config(path, dataload="get"), 256)


def test_held_out_data_is_read_with_the_same_settings(write_jsonl, config):
    train, held_out = write_jsonl({"q": "1", "a": "one"}), write_jsonl({"q": "2", "a": "two"}, name="held_out.jsonl")
    sample = load_dataset(config(train, sft_field=("q", "a")), 256, held_out)[0]
    assert trained_bytes(sample) == b"two\0" and sample.origin == f"{held_out}:1"
