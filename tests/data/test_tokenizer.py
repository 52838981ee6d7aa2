"""Tokenizers against other implementations, on text that is awkward to cut."""

import json

import pytest

from rwkv_bone.data import load_dataset, load_tokenizer
from rwkv_bone.data.tokenizer import ByteTokenizer, WorldTokenizer
from rwkv_bone.errors import UserError

TEXTS = [
    "",
    "Hello world",
    "  two  spaces\n\n\n\tand a tab\r\n",
    "User: hi\n\nAssistant: hello",
    "naïve café, Ærø, Straße, ﬁ",
    "你好，世界。こんにちは 안녕하세요",
    "👩‍👩‍👧 🇩🇪 \U0001f600\x00\x01\x7f\u2028\u0085",
    "1234567890 3.14159 1e-10",
    "def f(x):\n    return {'a': [1, 2]}  # why\n" * 3,
]


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world", 65536)


@pytest.fixture(scope="module")
def upstream():
    """The author's Python tokenizer."""
    package = pytest.importorskip("rwkv.rwkv_tokenizer")
    vocabulary = package.__file__.replace("rwkv_tokenizer.py", "rwkv_vocab_v20230424.txt")
    return package.TRIE_TOKENIZER(vocabulary)


@pytest.mark.parametrize("text", TEXTS)
def test_world_agrees_with_the_rwkv_package(world, upstream, text):
    ids = world.encode(text)
    assert ids == upstream.encode(text)
    assert world.decode(ids) == text


def test_world_agrees_with_the_rwkv_package_on_real_data(world, upstream, shared):
    for line in (shared / "data" / "rwkv_demo" / "demo.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        text = json.loads(line)["text"]
        assert world.encode(text) == upstream.encode(text)


def test_every_world_token_decodes_as_in_the_rwkv_package(world, upstream):
    for number, piece in upstream.idx2token.items():
        assert world.decode([number]) == piece.decode("utf-8", errors="replace")


def test_world_decodes_incomplete_text_and_unknown_ids(world):
    smile = world.encode("\U0001f600x")
    assert "\N{REPLACEMENT CHARACTER}" in world.decode([i for i in world.encode("\U0001fae8")][:-1])
    assert world.decode([0, *smile, 65535]) == "\U0001f600x\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_utf8_of_the_text(text):
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)) == text.encode("utf-8")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_decode_incomplete_text_and_unknown_ids():
    assert ByteTokenizer().decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"
    assert ByteTokenizer().decode([0x61, 256]) == "a\N{REPLACEMENT CHARACTER}"


def test_auto_chooses_by_the_size_of_the_vocabulary():
    assert isinstance(load_tokenizer("auto", 256), ByteTokenizer)
    for size in (65529, 65530, 65536):
        assert isinstance(load_tokenizer("auto", size), WorldTokenizer)
    for size in (12, 255, 50277, 65537):
        with pytest.raises(UserError, match=f"vocabulary of {size} .*give --tokenizer the path"):
            load_tokenizer("auto", size)


def character_tokenizer(path, characters: str, special: str | None) -> str:
    """A tokenizer.json with one token per character, like that of the third-party model that reverses numbers."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {character: number for number, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=characters[-1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if special:
        tokenizer.add_special_tokens([special])
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizer_json_with_one_special_token_ends_documents_with_it(tmp_path, write_jsonl, config):
    path = character_tokenizer(tmp_path / "tokenizer.json", "0123456789,#", special="#")
    tokenizer = load_tokenizer(path, 12)
    assert tokenizer.eod == 11
    assert tokenizer.encode("4207,7024") == [4, 2, 0, 7, 10, 7, 0, 2, 4]
    assert tokenizer.decode([4, 2, 10, 11]) == "42,#"
    data = write_jsonl({"prompt": "4207,", "response": "7024"})
    sample = load_dataset(config(data, tokenizer=path), 12)[0]
    assert sample.ids[sample.trained].tolist() == [7, 0, 2, 4, 11]


def test_a_tokenizer_json_without_an_end_token_is_refused(tmp_path):
    path = character_tokenizer(tmp_path / "tokenizer.json", "0123456789,#", special=None)
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(path, 12)


def test_the_usual_end_token_is_found(shared):
    assert load_tokenizer(str(shared / "tokenizers" / "20B_tokenizer.json"), 50277).eod == 0


def test_a_wrong_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokenizer wordl: no such file; expected auto, bytes, world"):
        load_tokenizer("wordl", 256)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), 256)


def test_a_text_with_tokens_outside_the_vocabulary_is_refused(write_jsonl, config):
    path = write_jsonl({"text": "\x01\x02"}, {"text": "hello"})
    with pytest.raises(UserError, match=r"data.jsonl:2: token 104 is outside the model's vocabulary of 12 .'h' has no"):
        load_dataset(config(path), 12)
