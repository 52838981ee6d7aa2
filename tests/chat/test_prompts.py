"""Prompts from files and pipes, in the forms of training data, become JSON lines."""

import io
import json
import os
import subprocess
import sys

import pytest

from rwkv_bone import checkpoints
from rwkv_bone.chat.batch import answer_prompts
from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import load_voices
from rwkv_bone.chat.prompts import read_prompts, text_of
from rwkv_bone.chat.session import Session
from rwkv_bone.data import load_template
from rwkv_bone.errors import UserError
from rwkv_bone.inference.sampling import Sampling
from tests.conftest import python_path, random_model

# (row, what the model reads with the template world)
ROWS = [
    ({"prompt": "hi"}, "User: hi\n\nAssistant:"),
    ({"prompt": "hi", "response": "not read", "id": 7}, "User: hi\n\nAssistant:"),
    ({"prompt": "hi", "response": ""}, "User: hi\n\nAssistant:"),
    ({"prompt": "hi", "system": "Be kind."}, "System: Be kind.\n\nUser: hi\n\nAssistant:"),
    ({"instruction": "Sum up.", "input": "A text."}, "User: Sum up.\nA text.\n\nAssistant:"),
    ({"question": "1+1?", "answer": "2"}, "User: 1+1?\n\nAssistant:"),
    ({"text": "Once upon"}, "Once upon"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "User: hi\n\nAssistant:"),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "not read"}]},
        "User: a\n\nAssistant:",
    ),
    ({"conversations": [{"from": "human", "value": "hi"}]}, "User: hi\n\nAssistant:"),
]


def read(path, batch=32):
    def bad(error):
        raise error

    return [prompt for group in read_prompts(str(path), batch, bad) for prompt in group]


@pytest.mark.parametrize("row,expected", ROWS)
def test_a_row_is_written_as_in_training_up_to_its_response(tmp_path, row, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (prompt,) = read(path)
    assert prompt.fields == row
    assert text_of(prompt, load_template("world", "bytes"), str, ()) == expected


def test_ones_own_fields_are_named_as_for_training(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "hi", "note": "x"}) + "\n")
    (prompt,) = read(path)
    assert text_of(prompt, load_template("raw", "bytes"), str, ("q", "a")) == "hi"
    with pytest.raises(UserError, match="rows.jsonl:1: neither 'text' nor 'messages'"):
        text_of(prompt, load_template("raw", "bytes"), str, ())


def test_a_text_has_a_prompt_a_line_and_a_table_a_prompt_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff2577 in words: \r\n\n{not json\n".encode())
    assert [prompt.text for prompt in read(tmp_path / "a.txt")] == ["2577 in words: ", "{not json"]
    assert [prompt.where for prompt in read(tmp_path / "a.txt")] == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:3"]
    (tmp_path / "a.csv").write_text("prompt,id\nhi,1\nho,2\n")
    assert [prompt.fields for prompt in read(tmp_path / "a.csv")] == [
        {"prompt": "hi", "id": "1"},
        {"prompt": "ho", "id": "2"},
    ]
    groups = list(read_prompts(str(tmp_path / "a.csv"), 1, print))
    assert [len(group) for group in groups] == [1, 1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A random model of bytes."""
    path = tmp_path_factory.mktemp("model") / "base.pth"
    checkpoints.write_state(path, random_model(seed=5, vocab_size=256).state_dict())
    return str(path)


@pytest.fixture
def config(base):
    def make(**settings) -> ChatConfig:
        return ChatConfig(**{"load_model": base, "temperature": 0.0, "max_new": 12, **settings})

    return make


@pytest.fixture
def chat(base):
    def run(*arguments: str, text: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rwkv_bone.chat.main", "--load_model", base, *arguments]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        return subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=120)

    return run


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_many_prompts_at_a_time_get_the_answers_that_each_gets_alone(tmp_path, capsys, config):
    prompts = ["The people of the", "x", "Laws and", "No State shall, without the Consent", "We"]
    rows = [json.dumps({"prompt": prompt, "id": i}) for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    answer_prompts(config(prompts=str(tmp_path / "prompts.jsonl"), template="world", stop=("o",), batch=3))
    found = lines_of(capsys)
    assert [(row["prompt"], row["id"]) for row in found] == [(p, i) for i, p in enumerate(prompts)]
    voice = load_voices(config(template="world"))[0]
    for prompt, row in zip(prompts, found, strict=True):
        session = Session(voice, Sampling(temperature=0.0, max_new=12), stops=("o",))
        reply = session.answer(prompt)
        assert row["generated"] == "".join(reply).strip()
        assert row["finish_reason"] == ("stop" if reply.ended == "text" else "length")
    assert len({row["finish_reason"] for row in found}) == 2


def test_a_row_that_cannot_be_used_is_named_or_skipped_and_counted(tmp_path, capsys, config):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n{"generated": "x", "prompt": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:2: .*--bad_rows skip"):
        answer_prompts(config(prompts=str(path)))
    capsys.readouterr()
    answer_prompts(config(prompts=str(path), bad_rows="skip"))
    out, err = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "c"]
    assert "2 answers, 2 rows skipped (--bad_rows skip)" in err
    assert f"skipped: {path}:3: it has a field 'generated', which the answer would replace" in err


def test_an_output_file_is_kept_unless_it_may_be_replaced(tmp_path, config):
    (tmp_path / "prompts.txt").write_text("a\n")
    output = tmp_path / "answers.jsonl"
    answer_prompts(config(prompts=str(tmp_path / "prompts.txt"), output=str(output)))
    before = output.read_text()
    assert json.loads(before)["prompt"] == "a"
    with pytest.raises(UserError, match="exists and is kept"):
        answer_prompts(config(prompts=str(tmp_path / "prompts.txt"), output=str(output)))
    assert output.read_text() == before
    answer_prompts(config(prompts=str(tmp_path / "prompts.txt"), output=str(output), overwrite=True, max_new=1))
    assert len(json.loads(output.read_text())["generated"]) <= 1
    deeper = tmp_path / "made" / "answers.jsonl"
    answer_prompts(config(prompts=str(tmp_path / "prompts.txt"), output=str(deeper)))
    assert json.loads(deeper.read_text())["prompt"] == "a"


def test_a_pipe_gives_nothing_but_json_on_standard_output(chat):
    result = chat("--max_new", "5", "--temperature", "3", text="2577 in words: \nA\n")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["2577 in words: ", "A"]
    assert "warning: --temperature 3 is unusually large" in result.stderr and "2 answers" in result.stderr


def test_what_is_wrong_is_a_sentence_and_status_2(chat):
    empty = chat(text="")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert empty.stderr.endswith("error: standard input: no prompt that can be used\n")


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"load_model": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"adapter": "nowhere/rwkv-0.pth"}, "nowhere/rwkv-0.pth does not exist"),
        ({"template": "nonsense"}, "--template nonsense: expected auto, raw"),
        ({"tokenizer": "nonsense"}, "--tokenizer nonsense: no such file"),
        ({"system": "Be kind."}, "--template raw cannot write a system turn"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt does not exist"),
    ],
)
def test_each_mistake_names_what_is_wrong(settings, sentence, monkeypatch, config):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match=sentence):
        answer_prompts(config(**{"prompts": "nowhere.txt", **settings}))


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"load_model": ""}, "--load_model is missing: expected model to talk to"),
        ({"max_new": 0}, "--max_new 0: expected a number of at least 1|--max_new 0"),
        ({"top_p": 0.0}, "--top_p 0"),
        ({"quant": "int3"}, "--quant int3: expected one of auto, none, int8"),
        ({"stop": ("",)}, "--stop has an empty text"),
        ({"sft_field": ("a", "b", "c")}, "--sft_field a b c: expected one or two names"),
    ],
)
def test_each_setting_says_what_it_may_be(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        ChatConfig(**{"load_model": "m.pth", **settings})


def test_neither_lightning_nor_deepspeed_is_loaded(base):
    code = (
        "import sys, io\n"
        "import rwkv_bone.chat.talk, rwkv_bone.chat.batch, rwkv_bone.chat.lines\n"
        "from rwkv_bone.chat.load import load_voices; from rwkv_bone.chat.flags import ChatConfig\n"
        f"load_voices(ChatConfig(load_model={base!r}))\n"
        "print({name.split('.')[0] for name in sys.modules} & "
        "{'lightning', 'deepspeed', 'transformers', 'peft', 'matplotlib', 'jinja2', 'datasets'})"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "set()\n", done.stderr
