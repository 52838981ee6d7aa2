"""Templates in files: whatever encoding, and in the files that a model of the Hub brings."""

import codecs
import json
from dataclasses import replace

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import folder_text
from rwkv_bone.errors import UserError
from tests.data.test_templates import talk, texts, write

CHAT = "{% for m in messages %}\n{{ 'é' + m.content }}\n{% endfor %}"
WRITTEN = ["éa\n", "éb\n"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("break_", ["\n", "\r\n"])
def test_a_template_file_may_have_any_mark_and_line_break(tmp_path, encoding, break_):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    for name, text in (("a.jinja", CHAT), ("b.txt", "é{prompt}\n\n{response}\n.\n")):
        (tmp_path / name).write_bytes(mark + text.replace("\n", break_).encode(encoding))
    assert texts(str(tmp_path / "a.jinja"), talk("a", "b")) == WRITTEN
    assert texts(str(tmp_path / "b.txt"), talk("a", "b")) == ["éa\n\n", "b\n."]
    config = json.dumps({"chat_template": CHAT, "eos_token": "x"}, ensure_ascii=False)
    (tmp_path / "tokenizer_config.json").write_bytes(mark + config.encode(encoding))
    assert texts(str(tmp_path / "tokenizer_config.json"), talk("a", "b")) == WRITTEN


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "mine.json"])
def test_a_json_file_has_its_template_under_chat_template(tmp_path, name):
    path = write(tmp_path, json.dumps({"chat_template": CHAT, "eos_token": "<|end|>"}), name)
    assert texts(path, talk("a", "b")) == WRITTEN


def test_a_format_may_be_json(tmp_path):
    path = write(tmp_path, '{"q": "{prompt}", "a": "{response}"}', "mine.json")
    assert texts(path, talk("a", "b")) == ['{"q": "a", "a": "', 'b"}']


def test_a_folder_is_a_template_by_the_first_file_that_has_one(tmp_path):
    def template(letter: str) -> str:
        return CHAT.replace("é", letter)

    def written() -> str:
        return texts(str(tmp_path), talk("a", "b"))[1]

    with pytest.raises(UserError, match="no template in chat_template.jinja, chat_template.json, tok.* of this"):
        load_template(str(tmp_path), "")
    write(tmp_path, json.dumps({"chat_template": template("t")}), "tokenizer_config.json")
    assert written() == "tb\n"
    write(tmp_path, json.dumps({"chat_template": template("j")}), "chat_template.json")
    assert written() == "jb\n"
    write(tmp_path, template("f"), "chat_template.jinja")
    assert written() == "fb\n"
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", "{{ 'T' if tools }}" + template("t"), "tool_use.jinja")
    assert written() == "fb\n"
    offered = replace(talk("a", "b"), tools=({"name": "x"},))
    for path in (tmp_path, tmp_path / "chat_template.jinja"):
        assert texts(str(path), offered) == ["Tta\n", "tb\n"]


def test_a_folder_of_named_templates_needs_a_default(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "additional_chat_templates", CHAT, f"{name}.jinja")
    with pytest.raises(UserError, match="the templates a, b and none named default"):
        load_template(str(tmp_path), "")


def test_a_model_folder_whose_template_is_null_has_none(tmp_path):
    write(tmp_path, json.dumps({"chat_template": None, "eos_token": "x"}), "tokenizer_config.json")
    data = DataConfig(data_file=("x",))
    assert folder_text(tmp_path, data) == (data, [])


def test_files_that_are_no_templates_are_refused_with_the_reason(tmp_path):
    for name, text, words in (
        ("tokenizer_config.json", "{", "not JSON|cannot be read"),
        ("chat_template.json", "{", "not JSON"),
        ("chat_template.json", "[]", "expected a JSON object with chat_template"),
        ("chat_template.json", '{"chat_template": 3}', "no chat_template in it"),
    ):
        with pytest.raises(UserError, match=f"--template .*{name}: ({words})"):
            load_template(write(tmp_path, text, name), "")


@pytest.mark.parametrize("named", [False, True])
def test_the_template_inside_a_tokenizer_config_is_a_template(tmp_path, named):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": template}]
    content = {"chat_template": several if named else template, "eos_token": "<|end|>"}
    name = write(tmp_path, json.dumps(content), "tokenizer_config.json")
    assert texts(name, talk("a", "b")) == ["<|user|>a<|assistant|>", "b"]


def test_a_tokenizer_config_without_a_template_of_that_kind_is_refused(tmp_path):
    for content, words in (
        ({}, "no chat_template in it; choose --template world"),
        ({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}, "the templates a, b and"),
        ([], "expected a JSON object"),
    ):
        with pytest.raises(UserError, match=words):
            load_template(write(tmp_path, json.dumps(content), "tokenizer_config.json"), "")
