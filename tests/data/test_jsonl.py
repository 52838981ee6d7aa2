"""Bad JSONL is refused with its file and line; good JSONL is recognised by its fields."""

import pytest

from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
from rwkv_bone.errors import UserError

GOOD = {"prompt": "2+2=", "response": "4"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "response": ', "not valid JSON"),
        ("[1, 2]", "found a list"),
        ('"text"', "found a string"),
        ("9" * 5000, "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ({"prompt": "a", "answer": "b"}, "no field 'response'; found: prompt, answer"),
        ({}, "no field 'prompt'; found: none"),
        ({"prompt": "a", "response": 4}, "field 'response' is a number, expected a string"),
        ({"prompt": None, "response": "b"}, "field 'prompt' is null, expected a string"),
        ({"prompt": "a", "response": ["b"]}, "field 'response' is a list, expected a string"),
        ({"prompt": "a", "response": ""}, "field 'response' is empty"),
        ({"prompt": "a", "response": " \n"}, "field 'response' is empty"),
        (b'{"prompt": "caf\xe9", "response": "b"}', "not UTF-8 (byte 0xe9 at 15)"),
        ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(write_jsonl, config, line, expected):
    path = write_jsonl(GOOD, "", line, GOOD)
    with pytest.raises(UserError) as error:
        load_dataset(config(path), 256)
    assert str(error.value).startswith(f"{path}:3: ") and expected in str(error.value)


def test_an_empty_text_is_refused(write_jsonl, config):
    path = write_jsonl({"text": "fine"}, {"text": ""})
    with pytest.raises(UserError, match=r"data.jsonl:2: field 'text' is empty"):
        load_dataset(config(path), 256)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_a_file_without_rows_is_refused(write_jsonl, config, lines):
    with pytest.raises(UserError, match="no rows"):
        load_dataset(config(write_jsonl(*lines), data_type="jsonl"), 256)


def test_a_missing_file_and_a_folder_are_refused(tmp_path, config):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist: --data_file"):
        load_dataset(config(str(tmp_path / "nowhere.jsonl")), 256)
    with pytest.raises(UserError, match="is a folder: --data_file"):
        load_dataset(config(str(tmp_path)), 256)


def test_a_byte_order_mark_and_foreign_line_ends_are_accepted(write_jsonl, config):
    path = write_jsonl(b'\xef\xbb\xbf{"text": "one"}\r', b'{"text": "two"}\r')
    assert [bytes(sample.ids.tolist()) for sample in load_dataset(config(path), 256)] == [b"one\0", b"two\0"]


@pytest.mark.parametrize(
    "names", ["prompt response", "prompt completion", "question answer", "instruction output", "input output"]
)
def test_usual_field_names_are_found(write_jsonl, config, names):
    prompt, response = names.split()
    path = write_jsonl({"id": "7", prompt: "one", response: "two"})
    sample = load_dataset(config(path), 256)[0]
    assert bytes(sample.ids[sample.trained].tolist()) == b"two\0"


def test_other_field_names_are_given_by_sft_field(write_jsonl, config):
    path = write_jsonl({"text": "not this", "query": "one", "reply": "two"})
    sample = load_dataset(config(path, sft_field=("query", "reply")), 256)[0]
    assert bytes(sample.ids.tolist()) == b"onetwo\0"
    with pytest.raises(UserError, match="no field 'q'; found: text, query, reply"):
        load_dataset(config(path, sft_field=("q", "reply")), 256)


def test_unknown_fields_are_listed(write_jsonl, config):
    with pytest.raises(UserError, match="fields found: query, reply. Name prompt and response with --sft_field"):
        load_dataset(config(write_jsonl({"query": "one", "reply": "two"})), 256)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "whole", "prompt": "one", "response": "two"},
        {"instruction": "one", "input": "more", "output": "two"},
    ],
)
def test_fields_with_two_meanings_need_a_choice(write_jsonl, config, row):
    with pytest.raises(UserError, match="the fields could be .* Choose with --sft_field"):
        load_dataset(config(write_jsonl(row)), 256)


def test_data_type_overrides_what_the_content_suggests(write_jsonl, config):
    path = write_jsonl({"text": "whole", "prompt": "one", "response": "two"})
    assert bytes(load_dataset(config(path, data_type="jsonl"), 256)[0].ids.tolist()) == b"whole\0"
    assert bytes(load_dataset(config(path, data_type="sft"), 256)[0].ids.tolist()) == b"onetwo\0"
    with pytest.raises(UserError, match="--sft_field has no meaning when .* --data_type jsonl"):
        load_dataset(config(path, data_type="jsonl", sft_field=("prompt", "response")), 256)


def test_pairs_for_evaluation_are_the_texts_that_are_trained_on(write_jsonl, config):
    tokenizer = load_tokenizer("bytes", 256)
    path = write_jsonl(GOOD, {"prompt": "a\n\nb", "response": "c"})
    assert load_pairs(config(path), path, tokenizer) == [("2+2=", "4"), ("a\n\nb", "c")]
    assert load_pairs(config(path, template="world"), path, tokenizer)[1] == ("User: a\nb\n\nAssistant:", " c")
    texts = write_jsonl({"text": "no pair"}, name="texts.jsonl")
    assert load_pairs(config(texts), texts, tokenizer) == []
