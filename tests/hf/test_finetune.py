"""What `train_hf.py` does: rows to tokens, training, measuring, saving and merging, with and without DeepSpeed."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from rwkv_bone.config.acts import HF
from rwkv_bone.config.flags import parse_section
from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.lost import check_lost
from rwkv_bone.errors import Interrupted, UserError
from rwkv_bone.hf import BoneModel, saved
from rwkv_bone.hf.data import IGNORED_LABEL, OWN_FLAGS, Limits, RowsOf, collate, load_samples, render
from rwkv_bone.hf.flags import IGNORED_FLAGS, HfConfig
from tests.conftest import clean_environment
from tests.hf.conftest import CHAT

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

REPOSITORY = Path(__file__).resolve().parents[2]


FLAGS = {f"--{field.name}" for field in fields(HfConfig)}


def flags_named(text: object) -> set[str]:
    return set(re.findall(r"(?<!\S)--[a-z_]+(?![a-z_-])", str(text)))


def texts_of(module: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(module, text) of every text in a module that reads data, and in those it imports, but no docstrings."""
    seen.add(module)
    tree = ast.parse((REPOSITORY / "src" / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield module, node.value
        if isinstance(node, ast.ImportFrom):
            source = str(node.module)
            is_folder = (REPOSITORY / "src" / source.replace(".", "/")).is_dir()
            names = [f"{source}.{alias.name}" for alias in node.names] if is_folder else [source]
            for name in names:
                if name.startswith(("rwkv_bone.data.", "rwkv_bone.checkpoints.hub")) and name not in seen:
                    yield from texts_of(name, seen)


def trained_text(tokenizer, segments) -> list[str]:
    return [tokenizer.decode(ids) for ids, trained in segments if trained]


def talk(*texts) -> Conversation:
    roles = ("user", "assistant")
    return Conversation("rows:1", tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))


def test_without_a_template_the_response_and_the_end_are_trained(tokenizer):
    segments, _ = render(talk("What?", "That."), tokenizer)
    assert [tokenizer.decode(ids) for ids, _ in segments] == ["What?", "That.<eos>"]
    assert trained_text(tokenizer, segments) == ["That.<eos>"]
    segments, _ = render(Conversation("rows:1", document="All of it"), tokenizer)
    assert trained_text(tokenizer, segments) == ["All of it<eos>"]
    with pytest.raises(UserError, match="rows:1: several turns need a tokenizer with a chat template"):
        render(talk("a", "b", "c", "d"), tokenizer)


def test_a_chat_template_trains_every_response_and_is_reproduced_exactly(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    turns = talk("Hi", "Hello", "Bye", "See you")
    segments, last_only = render(turns, tokenizer)
    assert trained_text(tokenizer, segments) == ["Hello<eos>", "See you<eos>"] and not last_only
    messages = [{"role": turn.role, "content": turn.text} for turn in turns.turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(tokenizer.decode(ids) for ids, _ in segments) == whole
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert "".join(tokenizer.decode(ids) for ids, _ in segments[:-1]) == prompt


def test_a_template_that_changes_earlier_turns_trains_the_last_one(tokenizer, monkeypatch):
    hides = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}")
    monkeypatch.setattr(tokenizer, "chat_template", hides)
    segments, last_only = render(talk("Hi", "Hello", "Bye", "See you"), tokenizer)
    assert trained_text(tokenizer, segments) == ["See you<eos>"] and last_only
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("<assistant>{% endif", "<assistant><think>{% endif"))
    with pytest.raises(UserError, match="what is to be trained cannot be told apart"):
        render(talk("Hi", "Hello"), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match="rows:1: the tokenizer's chat template refuses this row: no system here"):
        render(talk("Hi", "Hello"), tokenizer)


def test_long_samples_are_cut_or_left_out_and_counted(tokenizer):
    rows = [(f"rows:{i}", {"prompt": p, "response": r}) for i, (p, r) in enumerate([("ab", "cd"), ("abcdef", "g")])]
    samples = load_samples(rows, (), tokenizer, max_length=4)
    assert samples.rows == [
        {"input_ids": tokenizer("abcd")["input_ids"], "labels": [IGNORED_LABEL] * 2 + samples[0]["labels"][2:]}
    ]
    assert samples.facts() == ["1 sample with 2 trained tokens"]
    whole = load_samples(rows, (), tokenizer, max_length=99)
    trained = sum(label != IGNORED_LABEL for i in range(2) for label in whole[i]["labels"])
    (lost,) = samples.lost("rows.jsonl")
    assert lost.line() == (
        "warning: rows.jsonl: 2 samples cut to model_max_length, 1 of them left out because the prompt alone fills it, "
        f"{1 - 2 / trained:.1%} of the trained tokens"
    )
    with pytest.raises(UserError, match="rows.jsonl: .*more than --max_lost 0.5 .*raise --model_max_length"):
        check_lost("rows.jsonl", [lost], 0.5)
    assert whole.lost("rows.jsonl") == []
    with pytest.raises(UserError, match="rows:1: up to here no row has a response within --model_max_length 2"):
        load_samples(rows, (), tokenizer, max_length=2)
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [IGNORED_LABEL, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad=0
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 6, 7], [8, IGNORED_LABEL, IGNORED_LABEL]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_rows_come_from_lines_lists_and_parts_of_them(tmp_path):
    rows = [{"query": str(i), "response": "r"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        assert [row for _, row in RowsOf(str(tmp_path / name), "train[1:3]")] == rows[1:3]
    (tmp_path / "a.txt").write_text("just text")
    with pytest.raises(UserError, match="expected rows of prompt and response"):
        list(RowsOf(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    "row,named",
    [
        ({"q": "a", "r": "b"}, ()),
        ({"prompt": "a", "response": "b", "text": "c"}, ()),
        ({"prompt": "a", "response": "b"}, ("question", "answer")),
        ({"messages": "none"}, ()),
        ({"messages": [{"role": "robot", "content": "x"}]}, ()),
        ({"prompt": "a", "response": " "}, ()),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_flags_that_the_program_has(tokenizer, row, named):
    with pytest.raises(UserError, match="^rows:1: ") as caught:
        load_samples([("rows:1", row)], named, tokenizer, max_length=99)
    assert flags_named(caught.value) <= FLAGS, str(caught.value)


@pytest.mark.parametrize("name,split", [("nowhere", ""), ("a.other", ""), ("a.jsonl", "[x"), ("a.jsonl", "[:200%]")])
def test_what_is_wrong_with_a_file_is_said_with_flags_that_the_program_has(tokenizer, tmp_path, name, split):
    (tmp_path / "a.other").write_bytes(b"\x00\x01\x02")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    with pytest.raises(UserError) as caught:
        load_samples(RowsOf(str(tmp_path / name), split), (), tokenizer, max_length=99)
    assert flags_named(caught.value) <= FLAGS, str(caught.value)


def test_no_message_about_data_advises_a_flag_that_the_program_lacks():
    seen: set[str] = set()
    advice = []
    for module, text in texts_of("rwkv_bone.hf.data", seen):
        for theirs, ours in OWN_FLAGS.items():
            text = text.replace(theirs, ours)
        text = re.sub(r"train\.py --[a-z_]+", "train.py", text)  # what another program can do
        if "is a file: --data_type hf" not in text:  # said to those who give it
            advice += [f"{module}: {text}" for flag in flags_named(text) if flag not in FLAGS]
    assert not advice, "add these to OWN_FLAGS"
    assert {
        "rwkv_bone.data.conversations.layouts",
        "rwkv_bone.data.conversations.fields",
        "rwkv_bone.data.conversations.turns",
    } <= seen and len(seen) > 8


def test_query_and_response_are_a_usual_pair(tokenizer):
    rows = [("rows:1", {"query": "Half of 90?", "response": "45", "type": "rephrased"})]
    assert load_samples(rows, (), tokenizer, max_length=99).facts() == ["1 sample with 3 trained tokens"]


@pytest.mark.parametrize(
    "stored",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        },
    ],
)
def test_truncation_and_padding_stored_in_a_tokenizer_do_nothing(tokenizer, tmp_path, stored):
    rows = [("rows:1", {"prompt": "What is it called?", "response": "A tokenizer."})]
    expected = load_samples(rows, (), tokenizer, max_length=99).rows
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    assert load_samples(rows, (), transformers.AutoTokenizer.from_pretrained(tmp_path), max_length=99).rows == expected


def test_tokens_beyond_the_embedding_and_rows_beyond_the_positions_are_refused(tokenizer):
    rows = [("rows:1", {"prompt": "ab", "response": "c"}), ("rows:2", {"prompt": "abcdef", "response": "zz"})]
    last = max(tokenizer("abcdefz")["input_ids"])
    fits = Limits(vocab_size=last + 1, positions=9)  # eight characters and the end
    assert len(load_samples(rows, (), tokenizer, 99, fits)) == len(load_samples(rows, (), tokenizer, 99)) == 2
    with pytest.raises(
        UserError, match=f"^rows:2: token {last} is outside the model's vocabulary of {last} .'z' has no row"
    ):
        load_samples(rows, (), tokenizer, 99, Limits(vocab_size=last))
    message = "^rows:2: 9 tokens, but the model has 8 positions: give --model_max_length 8, .* instead of 99$"
    with pytest.raises(UserError, match=message):
        load_samples(rows, (), tokenizer, 99, Limits(positions=8))
    assert load_samples(rows, (), tokenizer, 8, Limits(positions=8)).cut == 1


def test_the_limits_of_a_model_are_read_from_its_configuration():
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4}
    llama = transformers.LlamaConfig
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    extended = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e4,
    }
    gemma = transformers.Gemma3Config(text_config={**sizes, "max_position_embeddings": 48})
    for config, positions in (
        (llama(**sizes, max_position_embeddings=32), 32),
        (llama(**sizes, max_position_embeddings=32, rope_parameters=yarn), 128),
        (llama(**sizes, max_position_embeddings=128, rope_parameters=yarn), 128),
        (llama(**sizes, max_position_embeddings=32, rope_parameters=linear), 64),
        (llama(**sizes, max_position_embeddings=128, rope_parameters=extended), 128),
        (transformers.GPT2Config(vocab_size=100, n_positions=24), 24),
        (transformers.BloomConfig(vocab_size=100), 0),  # positions are distances there
        (transformers.RwkvConfig(vocab_size=100, max_position_embeddings=24), 0),
        (gemma, 48),
    ):
        assert Limits.of(config) == Limits(100, positions), config


def flags(folder, output, **changes) -> dict[str, str]:
    usual = {
        "model_name_or_path": folder / "base",
        "data_path": folder / "train.jsonl",
        "eval_path": folder / "held.jsonl",
        "output_dir": folder / output,
        "bone_r": 8,
        "learning_rate": 0.02,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "precision": "fp32",
        "warmup_ratio": 0,
        "merge": 0,
        **changes,
    }
    return {name: str(value) for name, value in usual.items()}


def parse(given: dict[str, str], *more: str) -> HfConfig:
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return parse_section("train_hf.py", "", HfConfig, [*words, *more], IGNORED_FLAGS)


def measured(text: str) -> list[float]:
    """Every loss that a run prints."""
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", text)]


def test_a_run_learns_saves_for_peft_merges_and_resumes(folder, tokenizer, ids, capsys):
    peft = pytest.importorskip("peft")
    from rwkv_bone.hf.finetune import finetune

    config = parse(flags(folder, "out", merge=1, deepspeed="none", save_steps=2, logging_steps=1))
    finetune(config)
    text = capsys.readouterr().out
    assert "warning: " not in text
    before, after = re.search(r"before.*?(\d\.\d+)", text), re.search(r"after.*?(\d\.\d+)", text)
    assert float(after.group(1)) < float(before.group(1)) - 0.2
    assert "16 samples with" in text and "bone with r 8: " in text
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    expected = peft.PeftModel.from_pretrained(base, folder / "out")(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "out" / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(folder / "out" / "merged").chat_template == CHAT

    with pytest.raises(UserError, match="out is not empty and is kept: give another --output_dir, --resume 1 or"):
        finetune(parse(flags(folder, "out", merge=1, deepspeed="none"), "--resume", "never"))
    finetune(config)
    assert capsys.readouterr().out.startswith("nothing is left to do: the run in ")
    saved = torch.load(folder / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    (folder / "out" / "checkpoint-4").rename(folder / "last")
    # As if it had been killed before the last one.
    record = folder / "out" / "run.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    finetune(parse(flags(folder, "out", deepspeed="none")))
    assert measured(capsys.readouterr().out)[1:] == measured(text)[3:]  # the later steps, and the loss after them
    again = torch.load(folder / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert torch.equal(again["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_to_go_on_from(folder, number, capsys, monkeypatch):
    from rwkv_bone.hf.callbacks import Reporter
    from rwkv_bone.hf.finetune import finetune

    finetune(parse(flags(folder, "whole", deepspeed="none")))
    expected, written = measured(capsys.readouterr().out), Reporter.on_log

    def interrupt(self, args, state, control, logs, **kwargs):
        written(self, args, state, control, logs, **kwargs)
        if state.global_step == 1 and not signals:
            signals.append(number)
            signal.raise_signal(number)

    signals: list[int] = []
    monkeypatch.setattr(Reporter, "on_log", interrupt)
    # One that the run does not hear must not end these tests, which may themselves run under nohup.
    before = signal.signal(number, lambda *_: None)
    try:
        handler = signal.getsignal(number)
        with pytest.raises(Interrupted) as stopped:
            finetune(parse(flags(folder, "out", deepspeed="none")))
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert stopped.value.signum == number
    assert str(stopped.value) == (
        f"stopped after step 2 of 4, which is saved in {folder}/out/checkpoint-2\nthe same command goes on"
    )
    first = measured(capsys.readouterr().out)
    finetune(parse(flags(folder, "out", deepspeed="none")))
    assert [*first, *measured(capsys.readouterr().out)[1:]] == expected


@pytest.mark.slow
def test_the_script_trains_under_deepspeed_with_the_same_losses(folder, capsys):
    from rwkv_bone.hf.finetune import finetune

    finetune(parse(flags(folder, "plain", deepspeed="none", eval_path="")))
    expected = measured(capsys.readouterr().out)
    given = flags(folder, "deep", deepspeed="zero2", eval_path="", merge=1)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    environment = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = ["sh", REPOSITORY / "scripts" / "run_bone_hf.sh", *words]
    # With the warnings that Python does not show by default, too.
    environment["PYTHONWARNINGS"] = "default"
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours = re.compile(r"(.*: \d+ samples with|bone with r|step +\d+ of|before |after  |adapter |merged  |setup: )|$")
    assert [line for line in (done.stdout + done.stderr).splitlines() if not ours.match(line)] == []
    assert measured(done.stdout) == pytest.approx(expected, rel=1e-4) and len(expected) == 4
    states = folder / "deep" / "checkpoint-4" / "global_step4" / "mp_rank_00_model_states.pt"
    saved = torch.load(states, weights_only=False)["module"]
    assert any(key.endswith("q_proj.bone") for key in saved)
    assert not any(key.endswith("proj.weight") for key in saved)  # the frozen base is left out
    adapted = BoneModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "deep"
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "deep" / "merged")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed, number", [("none", signal.SIGINT), ("zero2", signal.SIGUSR1), ("none", signal.SIGKILL)]
)
def test_a_signal_to_a_run_of_two_processes_ends_all_and_the_same_command_goes_on(folder, deepspeed, number):
    """SIGKILL, which only the process that has started the others gets, leaves the last checkpoint."""

    def start():
        given = flags(folder, "out", deepspeed=deepspeed, devices=2, num_train_epochs=20, save_steps=3, eval_path="")
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        command = [sys.executable, REPOSITORY / "train_hf.py", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # As a terminal starts it: a shell that starts tests in the background has them ignore Ctrl-C.
        return subprocess.Popen(
            command,
            env=clean_environment(),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            start_new_session=True,
            **pipes,
        )

    run = start()
    said = iter(run.stdout.readline, "")
    next(line for line in said if line.startswith("step     4 "))
    (run.send_signal if number == signal.SIGKILL else lambda number: os.killpg(run.pid, number))(number)
    _, errors = run.communicate(timeout=300)  # which ends when no process is left that could write
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        whole = [path for path in (folder / "out").glob("checkpoint-*") if not saved.damage(path)]
        step = max(int(path.name.removeprefix("checkpoint-")) for path in whole)
    else:
        assert run.returncode == 128 + number, errors
        assert errors.count("stopping after this step") == errors.count("stopped after step ") == 1, errors
        checkpoint = Path(re.search(r"is saved in (.*)\n", errors).group(1))
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step < 20

    run = start()
    text, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    steps = [int(number) for number in re.findall(r"step +(\d+) of", text)]
    assert steps == list(range(step + 1, steps[-1] + 1)) and f"of {steps[-1]}" in text
    adapted = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    BoneModel.from_pretrained(adapted, folder / "out")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_its_message(folder):
    given = flags(folder, "out", deepspeed="none", devices=2, bone_r=33)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    command = [sys.executable, REPOSITORY / "train_hf.py", *words]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "error: a process has failed; its message is above" in done.stderr
    assert "r 33 is larger than the 32 inputs" in done.stderr and "Traceback" not in done.stderr


def test_checkpoints_and_lines_that_the_run_never_reaches_are_warned_of(folder, capsys):
    from rwkv_bone.hf.finetune import finetune

    finetune(parse(flags(folder, "out", deepspeed="none", eval_path="", save_steps=5, logging_steps=6)))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: --save_steps 5 saves the end alone: the whole run has 4 optimiser steps",
        "warning: --logging_steps 6 shows no step: the whole run has 4 optimiser steps",
    ]
    assert [path.name for path in (folder / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_flags_of_the_bone_repositorys_script_are_understood(folder, capsys):
    words = (
        "--model_name_or_path base --use_bone True --target_modules q_proj,v_proj --bone_r 64 --data_path rows "
        "--dataset_field query response --dataset_split train[:5000] --output_dir out --num_train_epochs 1 "
        "--model_max_length 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --save_strategy steps "
        "--save_steps 1000 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0. "
        "--logging_steps 1 --lr_scheduler_type cosine --merge True"
    )
    config = parse_section("train_hf.py", "", HfConfig, words.split(), IGNORED_FLAGS)
    assert config.targets == ["q_proj", "v_proj"] and config.dataset_field == ("query", "response") and config.merge
    assert capsys.readouterr().out == (
        "note: --use_bone True changes nothing here\nnote: --save_strategy steps changes nothing here\n"
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"mode": "bat"}, "--mode bat: expected one of bone, bat-col, bat-row"),
        ({"bone_r": 0}, "--bone_r 0: expected at least 1"),
        ({"num_train_epochs": 0}, "expected more than 0"),
        ({"warmup_ratio": 2}, "expected less than 1"),
        ({"data_path": ""}, "--data_path is missing"),
        ({"dataset_field": "a b c"}, "takes the names of prompt and response"),
        ({"resume": 1, "overwrite": 1}, "--resume 1 has no effect|--overwrite 1 has no effect"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(folder, changes, message):
    given = flags(folder, "out") | {name: str(value) for name, value in changes.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", *(value.split() or [""]))]
    with pytest.raises(UserError, match=message):
        parse_section("train_hf.py", "", HfConfig, words, IGNORED_FLAGS, table=HF)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_name_or_path": "nowhere"}, "is no folder with a config.json"),
        ({"resume": 1}, "--resume 1: .*out holds no run to continue; start without it"),
        ({"deepspeed": "zero4"}, "expected zero1, zero2, zero3, none or a JSON file"),
        ({"bone_r": 33}, "r 33 is larger than the 32 inputs"),
    ],
)
def test_what_is_found_wrong_before_training_leaves_nothing_behind(folder, changes, message, monkeypatch):
    from rwkv_bone.hf.finetune import finetune

    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=message):
        finetune(parse(flags(folder, "out", **{"deepspeed": "none", **changes})))
    assert not (folder / "out").exists()
    with pytest.raises(UserError, match="is the base's own folder"):
        finetune(parse(flags(folder, "base", deepspeed="none", overwrite=1)))
    assert (folder / "base" / "model.safetensors").is_file()


def test_a_model_that_cannot_read_the_rows_is_refused_before_it_is_loaded(folder, make_model, tokenizer, monkeypatch):
    from rwkv_bone.hf.finetune import finetune

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    config = json.loads((folder / "base" / "config.json").read_text())
    for change, message in (
        (
            {"vocab_size": 200},
            r"train.jsonl:1: token \d+ is outside the model's vocabulary of 200 .*: use the token",
        ),
        (
            {"max_position_embeddings": 20},
            r"train.jsonl:1: 35 tokens.* 20 positions: give --model_max_length 20, which",
        ),
        ({"model_type": "rwkv7", "auto_map": {"AutoConfig": "a.B"}}, "its code .* is not run.: train it with sh scri"),
        ({"model_type": "unheard-of"}, "transformers has no model of type unheard-of"),
    ):
        (folder / "base" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            finetune(parse(flags(folder, "out", deepspeed="none")))
        assert not (folder / "out").exists()


def test_tokens_that_were_added_to_the_tokenizer_alone_are_refused_by_name(folder):
    from rwkv_bone.hf.finetune import finetune

    added = transformers.AutoTokenizer.from_pretrained(folder / "base")
    added.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    written = CHAT.replace("<{{ m.role }}>", "<|im_start|>{{ m.role }} ")
    added.chat_template = written.replace("<assistant>", "<|im_start|>assistant ")
    added.save_pretrained(folder / "base")
    with pytest.raises(UserError, match=r"train.jsonl:1: token 259 is .* of 259 \('<\|im_start\|>' has no row"):
        finetune(parse(flags(folder, "out", deepspeed="none")))


def test_padding_with_a_token_that_the_model_has_no_row_for_is_done_with_another(folder, make_model, tokenizer, capsys):
    from rwkv_bone.hf.finetune import finetune

    added = transformers.AutoTokenizer.from_pretrained(folder / "base")
    added.add_special_tokens({"pad_token": "<extra>"})
    assert added.pad_token_id == 259
    added.save_pretrained(folder / "base")
    finetune(parse(flags(folder, "out", deepspeed="none", eval_path="", num_train_epochs=0.5)))
    assert len(measured(capsys.readouterr().out)) == 1
