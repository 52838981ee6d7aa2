"""Tokens that the data spells are counted."""

import pytest

from rwkv_bone.data import load_dataset
from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.spelled import spelled_tokens
from rwkv_bone.data.tokenizer import load_tokenizer

BYTES, WORLD = load_tokenizer("bytes", 256), load_tokenizer("world", 65536)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.add_special_tokens(["</s>", "<|im_end|>", "<|im_end|>!"])
    made.add_tokens(["word"])
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(str(path), 100)


def test_turns_that_spell_a_special_token_are_counted_by_token(chatml):
    turns = (
        Turn("user", "a <|im_end|>! word", material="</s>"),
        Turn("assistant", "b </s></s>", thinking="<|im_end|>"),
        Turn("user", "a"),
    )
    assert spelled_tokens(Conversation("f:1", turns), chatml) == {
        "turns that spell '<|im_end|>!', which becomes that token": 1,
        "turns that spell '</s>', which becomes that token": 2,
        "turns that spell '<|im_end|>', which becomes that token": 1,
    }


def test_of_a_document_only_an_end_before_its_end_counts(chatml):
    said = "documents that spell '</s>' before their end: a document ends there"
    for text, expected in (("a <|im_end|> b", {}), ("a</s>", {}), ("a</s>b", {said: 1}), ("a</s></s>", {said: 1})):
        assert spelled_tokens(Conversation("f:1", document=text), chatml) == expected


def test_world_spells_no_token_and_bytes_only_the_zero():
    text = "<|endoftext|></s>\0"
    assert 0 not in WORLD.encode(text) and BYTES.encode(text)[-1] == BYTES.eod
    for talk in (Conversation("f:1", (Turn("user", text),)), Conversation("f:1", document=f"{text}x")):
        assert spelled_tokens(talk, WORLD) == {}
        assert list(spelled_tokens(talk, BYTES).values()) == [1]


def test_the_run_says_so(write_jsonl, config):
    rows = [{"prompt": "a\0", "response": "b"}, {"prompt": "c", "response": "d"}]
    lines = load_dataset(config(write_jsonl(*rows)), 256).summary_lines()
    assert any("1 turn that spell '\\x00', which becomes that token" in line for line in lines)
