"""Files on which earlier versions went wrong, and what is right for each: tests/assets/cases."""

import re
from pathlib import Path

import pytest

from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.errors import UserError

VOCABULARY = 65536
WORLD = load_tokenizer("world", VOCABULARY)


@pytest.fixture(scope="module")
def cases(shared):
    return shared / "cases"


@pytest.fixture
def samples(cases, config):
    """Factory: (texts of the samples, their trained part in [[ ]]; the lines for the user) of a case."""

    def read(name: str, **settings):
        cfg = config(str(cases / name), **{"tokenizer": "world", **settings})
        data = load_dataset(cfg, VOCABULARY)
        return [_marked(data[i]) for i in range(len(data))], "\n".join(data.summary_lines())

    return read


def _marked(sample) -> str:
    text = ""
    for token, trained in zip(sample.ids, sample.trained, strict=True):
        piece = "<end>" if token == WORLD.eod else WORLD.decode([int(token)])
        text += f"[[{piece}]]" if trained else piece
    return text.replace("]][[", "")


def test_nulls_that_only_the_columnar_format_made_are_not_there(samples):
    expected, _ = samples("tool_nulls.jsonl", template="g1")
    assert '{"name":"dim","arguments":{"room":"hall","level":40}}' in expected[0] and "null" not in "".join(expected)
    for name in ("tool_nulls.parquet", "tool_nulls_saved"):
        assert samples(name, template="g1")[0] == expected


def test_turns_of_weight_0_are_not_trained_and_counted(samples):
    texts, lines = samples("turn_weight.jsonl")
    assert [re.findall(r"\[\[(.*?)\]\]", text) for text in texts] == [[" No: it is Lima.<end>"], [" four<end>"]]
    assert "2 responses that the data marks as not trained" in lines


def test_four_spellings_of_thinking_are_one_think_block(samples):
    texts, _ = samples("thinking.jsonl", template="g1-think")
    block = ">\nThree plus four makes seven.\n</think>\nThe answer is 7.<end>"
    assert texts == [f"User: 3+4?\n\nAssistant: <think[[{block}]]"] * 4


@pytest.mark.parametrize(
    ("name", "settings", "first", "line"),
    [
        (
            "prompt_completion.jsonl",
            {},
            "User: Name a river.\n\nAssistant:[[ The Elbe.<end>]]",
            "prompt and completion",
        ),
        (
            "numbers_and_two_prompt_fields.jsonl",
            {"sft_field": ("Body+Question", "Answer")},
            "User: A shelf holds 4 rows of 13 books.\nHow many books does it hold?\n\nAssistant:[[ 52.0<end>]]",
            "Body+Question and Answer",
        ),
        (
            "instruction_input_response.jsonl",
            {},
            "User: Sum up the text.\nThe mill stands by the river. It grinds rye.\n\nAssistant:"
            "[[ A mill by the river grinds rye.<end>]]",
            "with input",
        ),
        (
            "dolly.jsonl",
            {},
            "User: Who built it?\nThe lamp was built by Ines in 1931.\n\nAssistant:[[ Ines.<end>]]",
            "fields not used: category (1 row)",
        ),
        (
            "dolly.jsonl",
            {"sft_field": ("instruction", "response")},
            "User: Who built it?\n\nAssistant:[[ Ines.<end>]]",
            "fields not used: context (1 row), category (1 row)",
        ),
        (
            "query_response.jsonl",
            {},
            "User: What is 7 times 8?\n\nAssistant:[[ 7 times 8 is 56. The answer is: 56<end>]]",
            "fields not used: type (2 rows)",
        ),
        ("parquet_dates.parquet", {}, "User: a?\n\nAssistant:[[ a<end>]]", "prompt and response"),
        ("mixed_columns", {}, "User: a\n\nAssistant:[[ b<end>]]", "fields not used: source (1 row)"),
        ("quotes.tsv", {}, 'User: Was the "Mary Rose" a ship?\n\nAssistant:[[ yes<end>]]', "TSV"),
        ("no_header.tsv", {}, "User: Is snow cold?\n\nAssistant:[[ yes<end>]]", "is read as a row"),
        (
            "no_header.tsv",
            {"columns": ("question", "answer")},
            "User: Is snow cold?\n\nAssistant:[[ yes<end>]]",
            "question and answer",
        ),
        ("id.csv", {}, "User: Who are you?\n\nAssistant:[[ A small helper.<end>]]", "question and answer"),
        ("id2.csv", {}, "User: Who are you?\n\nAssistant:[[ A small helper.<end>]]", "prompt and response"),
    ],
)
def test_rows_are_read_as_they_are_meant_and_what_is_not_used_is_named(samples, name, settings, first, line):
    texts, lines = samples(name, **settings)
    assert texts[0] == first
    assert line in lines


def test_no_row_of_a_table_of_tabs_is_lost(samples):
    texts, _ = samples("quotes.tsv")
    assert [text.splitlines()[0] for text in texts] == [
        'User: Was the "Mary Rose" a ship?',
        'User: Did he say "no?',
        'User: Is 5" a size of nails?',
    ]


def test_numbers_are_read_as_they_are_written(samples):
    texts, _ = samples("numbers_and_two_prompt_fields.jsonl")
    assert [re.findall(r"\[\[(.*?)<end>\]\]", text) for text in texts] == [[" 52.0"], [" 15"]]


def test_preference_data_is_called_by_its_name(samples):
    with pytest.raises(UserError, match="preference.jsonl:1: preference data.*--task dpo.*--sft_field prompt chosen"):
        samples("preference.jsonl")


def test_a_folder_of_texts_is_a_document_a_file(samples, cases):
    texts, _ = samples("books")
    plain = [text.replace("[[", "").replace("]]", "") for text in texts]
    assert plain == [Path(cases, "books", name).read_text() + "<end>" for name in ("one.txt", "two.txt")]


def test_a_long_text_is_split_and_trained_whole(samples, tmp_path):
    novel = tmp_path / "novel.txt"
    novel.write_text("".join(f"Chapter {i}. The captain looked at the river.\n" for i in range(3000)))
    texts, lines = samples(str(novel))
    ids = len(WORLD.encode(novel.read_text())) + 1
    assert f"{ids - 1:,} of them trained" in lines and len(texts) == -(-(ids - 1) // 512)
    with pytest.raises(UserError, match=r"novel.txt: 9\d.\d% of the data would not be trained.*--max_lost"):
        samples(str(novel), long_samples="cut")


def test_held_out_rows_are_read_by_their_own_fields(cases, config):
    cfg = config(str(cases / "id.csv"), eval_data=(str(cases / "id2.csv"),), sft_field=("question", "answer"))
    cfg = config(str(cases / "id.csv"), eval_data=cfg.eval_data, sft_field=cfg.sft_field, tokenizer="world")
    train, held = load_dataset(cfg, VOCABULARY), load_dataset(cfg, VOCABULARY, *cfg.eval_data)
    assert [list(train[i].ids) for i in range(4)] == [list(held[i].ids) for i in range(4)]


@pytest.mark.parametrize("name", ["truncating", "padding"])
def test_truncation_and_padding_stored_in_a_tokenizer_change_nothing(cases, name):
    text = "A text that is longer than either of them. " * 20
    plain, other = (load_tokenizer(str(cases / "tokenizers" / f"{which}.json"), 1 << 20) for which in ("plain", name))
    assert other.encode(text) == plain.encode(text) and len(plain.encode(text)) > 64
    assert other.encode("a") == plain.encode("a")


def test_templates_are_those_of_transformers(samples, cases):
    texts, _ = samples("turn_weight.jsonl", template=str(cases / "date.jinja"))
    assert re.match(r"<\|system\|>\nToday: \d\d \w+ 20\d\d\n<\|user\|>\nCapital of Peru\?\n", texts[0])
    texts, _ = samples("turn_weight.jsonl", template=str(cases / "tokenizer_config.json"))
    assert texts[1] == "<|user|>2+2?<|assistant|>five<|user|>again<|assistant|>[[four<end>]]"
