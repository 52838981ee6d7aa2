"""Prompts from files and pipes, in the forms of training data, become JSON lines."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.chat.batch import answer_prompts
from rwkv_bone.chat.flags import ChatConfig
from rwkv_bone.chat.load import load_voices
from rwkv_bone.chat.main import main
from rwkv_bone.chat.prompts import read_prompts, text_of
from rwkv_bone.chat.session import Session
from rwkv_bone.data import load_template
from rwkv_bone.errors import UserError, exit_status
from rwkv_bone.inference.generate import generate
from rwkv_bone.inference.sampling import Sampling
from rwkv_bone.inference.wording import Wording
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
    assert text_of(prompt, load_template("world", "bytes"), str, ())[0] == expected


def test_ones_own_fields_are_named_as_for_training(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "hi", "note": "x"}) + "\n")
    (prompt,) = read(path)
    assert text_of(prompt, load_template("raw", "bytes"), str, ("q", "a"))[0] == "hi"
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


@pytest.fixture
def typed(monkeypatch, tmp_path, base):
    """The program with these arguments, a pipe with this text as its standard input, and no terminal."""

    def run(*arguments: str, text: str = "") -> int:
        (tmp_path / "piped").write_text(text)
        monkeypatch.setattr("sys.argv", ["chat", "--load_model", base, *arguments])
        with open(tmp_path / "piped", encoding="utf-8") as file:
            monkeypatch.setattr("sys.stdin", file)
            return exit_status(main)

    return run


@pytest.mark.parametrize("arguments", [(), ("--prompts", "EMPTY"), ("--output", "answers.jsonl")])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_prompt_at_all_is_said_before_the_model_is_read(tmp_path, monkeypatch, typed, capsys, text, arguments):
    (tmp_path / "empty.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rwkv_bone.chat.batch.load_voices", lambda cfg: pytest.fail("the model is read"))
    words = [str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in arguments]
    assert typed(*words, text=text) == 2
    out, err = capsys.readouterr()
    place = words[1] if "--prompts" in words else "standard input"
    assert (out, err) == (
        "",
        f"error: {place}: no prompt that can be used; expected one a line, or a JSON object a line\n",
    )
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("flag", [("--undo", "5"), ("--history", "0"), ("--compare", "m.pth"), ("--thinking", "hide")])
def test_a_setting_of_conversations_is_refused_where_prompts_come_through_a_pipe(typed, capsys, flag):
    assert typed(*flag, text="hi\n") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"{flag[0]} {flag[1]} has no effect with --prompts -; it acts in a conversation" in err


def test_a_setting_of_a_script_that_the_prompts_leave_without_effect_is_left_out_with_a_note(typed, capsys):
    assert typed("--undo", "5", "--max_new", "1", "--typed", text="hi\n") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt"] == "hi"
    assert "note: undo=5 of the script is left out: it has no effect with --prompts -" in err


def test_the_system_text_goes_to_rows_that_bring_none_and_the_others_are_counted(tmp_path, capsys, config, monkeypatch):
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "system": "Of the row."},
        {"messages": [{"role": "system", "content": "Its own."}, {"role": "user", "content": "c"}]},
        {"messages": [{"role": "user", "content": "d"}]},
        {"text": "e"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = []

    def answers(model, prompts, *, ended, **how):
        read.extend(bytes(list(ids)).decode() for ids in prompts)
        return [ended("end") or [] for _ in prompts]

    monkeypatch.setattr("rwkv_bone.inference.voice.generate", answers)
    answer_prompts(config(prompts=str(tmp_path / "rows.jsonl"), template="world", system="Be kind."))
    assert read == [
        "System: Be kind.\n\nUser: a\n\nAssistant:",
        "System: Of the row.\n\nUser: b\n\nAssistant:",
        "System: Its own.\n\nUser: c\n\nAssistant:",
        "System: Be kind.\n\nUser: d\n\nAssistant:",
        "e",
    ]
    assert "--system was left out of 3 rows: a system turn of their own, or a document" in capsys.readouterr().err


def test_an_old_output_file_stays_whole_until_the_first_answer_can_be_written(tmp_path, config):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "a"}\n' * 40 + '{"prompt": 3, "generated": "x"}\n')
    output.write_text("old\n")
    for changes in ({}, {"load_model": "nowhere.pth"}, {"template": "nonsense"}):
        with pytest.raises(UserError):
            answer_prompts(config(prompts=str(prompts), output=str(output), overwrite=True, **changes))
        assert output.read_text() == "old\n"
    with pytest.raises(UserError, match="prompts.jsonl is the file of --prompts"):
        answer_prompts(config(prompts=str(prompts), output=str(prompts), overwrite=True))


def test_what_was_answered_before_an_interruption_is_kept_and_counted(tmp_path, config, monkeypatch, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("a\nb\nc\nd\ne\n")
    whole, calls = generate, []

    def interrupted(model, prompts, **how):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(model, prompts, **how)

    monkeypatch.setattr("rwkv_bone.inference.voice.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(config(prompts=str(prompts), output=str(output), batch=2, max_new=2))
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["a", "b", "c", "d"]
    assert f"4 of 5 prompts answered, in {output}, which is kept" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists and is kept: give another name, or --overwrite"):
        answer_prompts(config(prompts=str(prompts), output=str(output)))


def test_an_answer_that_a_stop_text_ends_with_its_last_token_has_stopped(tmp_path, capsys, config, monkeypatch):
    """Of two tokens the second holds three letters and the stop text: four tokens of a letter are kept."""

    class Pieces:
        eod, vocab_size, name, has_marks = 0, 256, "pieces", False
        texts = {1: "o", 2: "xyz END"}

        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return "".join(self.texts.get(i) or chr(i) for i in ids)

    (tmp_path / "p.txt").write_text("a\n")
    model = iter([1, 2])

    def voices(cfg):
        (voice,) = load_voices(cfg)
        wording = Wording(voice.wording.template, Pieces())

        def call(*arguments, **how):
            logits, state = voice.model(*arguments, **how)
            return torch.nn.functional.one_hot(torch.full(logits.shape[:1], next(model)), 256).float(), state

        call.arch = voice.model.arch
        return [replace(voice, model=call, wording=wording)]

    monkeypatch.setattr("rwkv_bone.chat.batch.load_voices", voices)
    answer_prompts(config(prompts=str(tmp_path / "p.txt"), stop=(" END",), max_new=2))
    (row,) = lines_of(capsys)
    assert (row["generated"], row["finish_reason"]) == ("oxyz", "stop")


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
def test_each_mistake_names_what_is_wrong(settings, sentence, tmp_path, config):
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(UserError, match=sentence):
        answer_prompts(config(**{"prompts": str(tmp_path / "prompts.txt"), **settings}))


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
