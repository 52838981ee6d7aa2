"""The tokenizer and the chat template of a model's folder, and tokenizer.json files that ask for odd things."""

import json
from pathlib import Path

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data import load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.tokenizer import (
    END_MARK,
    ByteTokenizer,
    JsonTokenizer,
    WorldTokenizer,
    byte_letters,
    decode_marked,
    encode_marked,
    folder_text,
    world_tokens,
)
from rwkv_bone.data.world_json import write_bytes_json, write_tokenizer_config, write_world_json
from rwkv_bone.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %} {{ m.content }}{{ eos_token }}
{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}
"""


@pytest.fixture(scope="module")
def world_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "tokenizer.json"
    write_world_json(path)
    return path


def changed(source: Path, target: Path, change) -> Path:
    """A copy of a tokenizer.json, after change(its content)."""
    content = json.loads(source.read_text(encoding="utf-8"))
    change(content)
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


@pytest.fixture
def plain(tmp_path):
    """A byte-level tokenizer with a token for the end at 256."""
    letters = {letter: number for number, letter in enumerate(byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<|im_end|>"])
    path = tmp_path / "plain.json"
    tokenizer.save(str(path))
    return path


def test_truncation_and_padding_of_the_file_are_switched_off(plain, tmp_path):
    expected = load_tokenizer(str(plain), 300)
    for name, change in (("truncating", "enable_truncation"), ("padding", "enable_padding")):
        asked = tokenizers.Tokenizer.from_file(str(plain))
        getattr(asked, change)(**({"max_length": 16} if name == "truncating" else {"length": 64}))
        path = tmp_path / f"{name}.json"
        asked.save(str(path))
        assert len(tokenizers.Tokenizer.from_file(str(path)).encode("x" * 30).ids) == {"t": 16, "p": 64}[name[0]]
        tokenizer = load_tokenizer(str(path), 300)
        for text in ("", "short", "a text of more than sixteen tokens " * 4):
            assert tokenizer.encode(text) == expected.encode(text)


def test_the_end_is_the_one_that_tokenizer_config_names(plain, tmp_path):
    assert load_tokenizer(str(plain), 300).eod == 256
    before = load_tokenizer(str(plain), 300).identity()
    for token in ("<|im_end|>", {"content": "<|im_end|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load_tokenizer(str(plain), 300).eod == 257
    assert load_tokenizer(str(plain), 300).identity() != before
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|not there|>"}')
    assert load_tokenizer(str(plain), 300).eod == 256
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: cannot be read"):
        load_tokenizer(str(plain), 300)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(UserError, match="tokenizer_config.json: a token has half of a surrogate pair"):
        load_tokenizer(str(plain), 300)


def test_a_file_with_the_vocabulary_of_world_is_world(world_file, tmp_path):
    def as_word_pieces(content):
        # Another form in which World can be published: exact, too, but of quadratic time.
        vocabulary = content["model"]["vocab"]
        content["model"] = {"type": "WordPiece", "unk_token": "<|rwkv_tokenizer_end_of_text|>", "vocab": vocabulary}
        content["model"] |= {"continuing_subword_prefix": "", "max_input_chars_per_word": 10**9}
        content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][0]
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    def renamed(content):
        text = json.dumps(content).replace("<|rwkv_tokenizer_end_of_text|>", "<|endoftext|>")
        content.clear()
        content.update(json.loads(text))

    def padded(content):
        content["model"]["vocab"] |= {f"<pad{number}>": number for number in range(65530, 65536)}

    expected = WorldTokenizer()
    text = "".join(token.decode("utf-8", errors="ignore") for token in world_tokens()[1:60000:7]) + "<|endoftext|>"
    for name, change in (("a", lambda content: None), ("b", as_word_pieces), ("c", renamed), ("d", padded)):
        tokenizer = load_tokenizer(str(changed(world_file, tmp_path / f"{name}.json", change)), 65536)
        assert isinstance(tokenizer, WorldTokenizer)
        assert tokenizer.identity() == expected.identity()
        assert tokenizer.encode(text) == expected.encode(text)


def test_a_file_that_differs_from_world_in_anything_is_itself(world_file, tmp_path):
    def swap_two_tokens(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["hello"], vocabulary["world"] = vocabulary["world"], vocabulary["hello"]

    def add_a_token(content):
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 65530, "content": "<|im_start|>"})

    def lower_case(content):
        content["normalizer"] = {"type": "Lowercase"}

    def another_cut(content):
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation", "behavior": "Isolated"})

    for change in (swap_two_tokens, add_a_token, lower_case, another_cut):
        path = changed(world_file, tmp_path / f"{change.__name__}.json", change)
        tokenizer = load_tokenizer(str(path), 65536)
        assert isinstance(tokenizer, JsonTokenizer), change.__name__
        assert tokenizer.encode("Hello world!") == tokenizers.Tokenizer.from_file(str(path)).encode("Hello world!").ids


def test_a_file_with_the_ids_of_bytes_is_bytes(tmp_path):
    write_bytes_json(tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer(str(tmp_path / "tokenizer.json"), 256), ByteTokenizer)


def test_a_model_without_a_folder_or_files_in_it_keeps_the_settings(tmp_path):
    data = DataConfig(data_file=("x",))
    assert folder_text(None, data) == (data, [])
    assert folder_text(tmp_path, data) == (data, [])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert folder_text(tmp_path, data) == (data, [])


def test_what_the_user_names_comes_before_what_the_folder_has(tmp_path):
    write_bytes_json(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    typed = DataConfig(data_file=("x",), tokenizer="bytes", template="raw")
    assert folder_text(tmp_path, typed) == (typed, [])
    half, lines = folder_text(tmp_path, DataConfig(data_file=("x",), tokenizer="bytes"))
    assert (half.tokenizer, half.template) == ("bytes", str(tmp_path / "chat_template.jinja"))
    assert lines == [f"template  {tmp_path / 'chat_template.jinja'} (--template auto: the model's own)"]


def test_the_files_of_the_folder_are_used_and_said(tmp_path, world_file):
    (tmp_path / "tokenizer.json").write_bytes(world_file.read_bytes())
    write_tokenizer_config(tmp_path / "tokenizer_config.json", TEMPLATE)
    data, lines = folder_text(tmp_path, DataConfig(data_file=("x",)))
    assert data.tokenizer == str(tmp_path / "tokenizer.json")
    assert data.template == str(tmp_path / "tokenizer_config.json")
    assert lines == [
        f"tokenizer {data.tokenizer}, which is RWKV World (--tokenizer auto: the model's own)",
        f"template  {data.template} (--template auto: the model's own)",
    ]
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert folder_text(tmp_path, DataConfig(data_file=("x",)))[0].template == str(tmp_path / "chat_template.jinja")


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
TURNS += [{"role": "user", "content": "<|endoftext|>?"}, {"role": "assistant", "content": "No. "}]


@pytest.mark.parametrize("kind", ["world", "plain"])
def test_the_ids_of_a_folder_are_those_of_transformers(kind, tmp_path, world_file, plain, write_jsonl, config):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((world_file if kind == "world" else plain).read_bytes())
    write_tokenizer_config(folder / "tokenizer_config.json")
    if kind == "plain":
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TURNS, tokenize=True, return_dict=False)

    path = write_jsonl({"messages": TURNS})
    data, _ = folder_text(folder, config(path, tokenizer="auto"))
    tokenizer = load_tokenizer(data.tokenizer, 65536)
    sample = load_dataset(data, 65536)[0]
    # The template has written the end of the last response, and a line break after it. The document ends after that.
    assert sample.ids.tolist() == [*expected, tokenizer.eod]
    assert expected.count(tokenizer.eod) == (3 if kind == "world" else 2)

    # What the model is measured with has the same ids, from the rows and from the samples.
    for prompt, response in (load_pairs(data, path, tokenizer)[0], load_dataset(data, 65536).pairs(tokenizer)[0]):
        ids = encode_marked(tokenizer, prompt)
        assert ids == sample.ids[: len(ids)].tolist()
        assert ids == theirs.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)
        assert response == " No. "


def test_an_end_that_the_template_writes_last_is_the_only_one(tmp_path, write_jsonl, config):
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    write_tokenizer_config(tmp_path / "tokenizer_config.json")
    data = config(write_jsonl({"prompt": "a", "response": "b"}), template=str(template))
    assert load_dataset(data, 256)[0].ids.tolist() == [97, 0, 98, 0]
    (tmp_path / "tokenizer_config.json").unlink()
    # Without a name for it the template writes none.
    assert load_dataset(data, 256)[0].ids.tolist() == [97, 98, 0]


def test_marked_text_and_ids_are_each_other():
    for tokenizer in (WorldTokenizer(), ByteTokenizer()):
        for ids in ([], [0], [0, 0, 66], [66, 0, 68, 0]):
            assert encode_marked(tokenizer, decode_marked(tokenizer, ids)) == ids
    assert encode_marked(ByteTokenizer(), f"a{END_MARK}b") == [97, 0, 98]


def test_the_cache_is_made_anew_when_tokenizer_or_template_change(tmp_path, write_jsonl, config, monkeypatch):
    monkeypatch.setattr("rwkv_bone.data.part.SMALL", 0)
    folder = tmp_path / "model"
    folder.mkdir()
    write_bytes_json(folder / "tokenizer.json")
    write_tokenizer_config(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    data, _ = folder_text(folder, config(write_jsonl({"prompt": "a", "response": "b"}), tokenizer="auto"))

    def ids() -> list[int]:
        return load_dataset(data, 300)[0].ids.tolist()

    assert ids() == ids() == [97, 0, 98, 0]
    template.write_text("{% for m in messages %}-{{ m.content }}{{ eos_token }}{% endfor %}")
    assert ids() == [45, 97, 0, 45, 98, 0]
    (folder / "tokenizer_config.json").write_text('{"eos_token": ""}')
    assert ids() == [45, 97, 45, 98, 0]

    def shift(content):
        vocabulary = content["model"]["vocab"]
        vocabulary.update({token: number + 1 for token, number in vocabulary.items() if number})

    changed(folder / "tokenizer.json", folder / "tokenizer.json", shift)
    assert ids() == [46, 98, 46, 99, 0]
