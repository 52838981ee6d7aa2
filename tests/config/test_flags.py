"""The command line and config.json are made from sections.py and lose nothing of it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from rwkv_bone.config import MergeConfig, PreferenceConfig, flags
from rwkv_bone.config.acts import TRAIN
from rwkv_bone.config.saved import from_json, to_json
from rwkv_bone.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ["--load_model", "base.pth", "--data_file", "rows.jsonl"]
MERGE = ["--base_model", "base.pth", "--peft_checkpoint", "out/rwkv-0.pth", "--output", "merged.pth"]
SPECS = [spec for section in flags.SECTIONS.values() for spec in fields(section)]
# Settings of preference tuning, {task: what acts with it}: no two tasks go together.
PREFERENCES = {
    "dpo": {"beta": 0.5, "label_smoothing": 0.25, "sft_weight": 0.5, "reference": "base"},
    "orpo": {"beta": 0.5, "sft_weight": 0.0},
    "simpo": {"beta": 10.0, "gamma": 0.0, "label_smoothing": 0.25, "sft_weight": 0.5},
    "kto": {"beta": 0.5, "desirable_weight": 0.0, "undesirable_weight": 1.5, "reference": "base"},
}
OF_TASKS = {"task"}.union(*PREFERENCES.values())


def train(*words):
    return flags.parse_train([*NEEDED, *words])


def other_value(spec):
    """A valid value of a setting that is not its default."""
    choices = [choice for choice in spec.metadata["choices"] or ("first", "second") if choice not in (spec.default, "")]
    return {
        bool: lambda: not spec.default,
        int: lambda: spec.default + 1,
        float: lambda: 0.5,
        tuple: lambda: tuple(choices[:2]),
        str: lambda: choices[0],
    }[type(spec.default)]()


def changed_everywhere():
    """(command line, expected settings) with every setting away from its default, as far as they go together."""
    unread = {name for name in TRAIN if name.startswith("lora_")} | {
        "long_samples",
        "max_lost",
        "data_weights",
        "eval_data",
        "eval_field",
        "save_minutes",
        "resume_with",
        *OF_TASKS,
    }
    expected = {spec.name: other_value(spec) for spec in SPECS if spec.name not in unread}
    expected["eval_steps"] = 5  # 0 leaves --early_stop without effect
    expected |= {"cards": "0,1", "peft": "bone", "dataload": "get", "resume": "never"}  # there is no run to continue
    expected |= {"data_type": "sft", "lr_schedule": "linear", "loss_mask": "se", "my_testing": "x070"}
    words = []
    for name, value in expected.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return words, expected


def settings(config):
    return {name: value for section in asdict(config).values() for name, value in section.items()}


def test_no_two_settings_share_a_name():
    names = [spec.name for spec in SPECS]
    assert len(names) == len(set(names))


def test_flags_left_out_take_the_defaults_of_the_config():
    expected = {spec.name: spec.default for spec in SPECS} | {"load_model": "base.pth"}
    expected["data_file"] = ("rows.jsonl",)
    assert settings(train()) == expected


def test_every_setting_is_a_flag():
    words, expected = changed_everywhere()
    unread = {spec.name: spec.default for spec in SPECS if spec.name not in expected}
    assert settings(flags.parse_train(words)) == expected | unread
    others = {spec.name: other_value(spec) for spec in SPECS if spec.name in unread.keys() - OF_TASKS}
    others |= {"data_weights": ("0.5", "2"), "resume_with": ("lr_init", "data_file")}
    words = []
    for name, value in others.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    assert settings(train("--peft", "lora", "--data_file", "a", "b", *words)).items() >= others.items()
    for task, given in PREFERENCES.items():
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        config = train("--task", task, "--peft_load", "a.pth", *words)
        assert settings(config).items() >= ({"task": task} | given).items()
        assert from_json(to_json(config)) == config
    assert OF_TASKS == {"task", *PreferenceConfig.__dataclass_fields__}
    assert unread and unread.keys() | expected.keys() == {spec.name for spec in SPECS}


def test_help_explains_every_flag_with_choices_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse_train(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for spec in SPECS:
        assert re.search(rf"--{spec.name}[ ,]", text)  # a comma: its other name follows
        assert spec.metadata["help"].split(";")[0][:40] in text
        for choice in spec.metadata["choices"] or ():
            assert choice in text
    assert "(default: auto)" in text and "(default: bone)" in text


def test_json_round_trip_keeps_every_setting():
    config = flags.parse_train(changed_everywhere()[0])
    assert from_json(to_json(config)) == config


def test_config_file_is_the_start_and_flags_override_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(train("--bone_r", "32", "--lr_init", "1e-3", "--targets", "ffn", "--grad_cp")))
    config = flags.parse_train(["--config", str(path), "--lr_init", "5e-4", "--targets", "--grad_cp", "0"])
    assert (config.adapter.bone_r, config.optim.lr_init, config.adapter.targets) == (32, 5e-4, ())
    assert config.model.load_model == "base.pth" and config.model.grad_cp == "0"


def test_config_file_of_an_older_version_gets_defaults_for_what_it_lacks():
    text = json.dumps({"model": {"load_model": "a.pth"}, "data": {"data_file": ["b"]}, "optim": {"lr_init": 1}})
    config = from_json(text)
    assert config.optim.lr_init == 1.0 and config.adapter.bone_r == 64
    assert (config.data.task, config.preference) == ("sft", PreferenceConfig())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "c.json: not JSON"),
        ("[]", "expected an object of sections"),
        ('{"model": 1}', "expected an object of sections"),
        ('{"trainer": {}}', "unknown section 'trainer'"),
        ('{"adapter": {"bone_rr": 1}}', "unknown setting adapter.bone_rr"),
        ('{"adapter": {"bone_r": "64"}}', 'adapter.bone_r: expected a number, got "64"'),
        ('{"adapter": {"bone_r": true}}', "adapter.bone_r: expected a number, got true"),
        ('{"adapter": {"targets": "ffn"}}', "adapter.targets: expected a list of strings"),
        ('{"run": {"overwrite": 1}}', "run.overwrite: expected true or false"),
        ('{"model": {"grad_cp": 1}}', "model.grad_cp: expected a string, got 1"),
        ('{"model": {"grad_cp": "all"}}', "--grad_cp all: expected one of 0, 1, wkv, auto"),
        ('{"model": {"n_layer": -1}}', "--n_layer -1: expected at least 0"),
    ],
)
def test_broken_config_file_is_named_with_what_is_wrong(text, message):
    with pytest.raises(UserError) as error:
        from_json(text, "c.json")
    assert message in str(error.value)


def test_missing_config_file_is_an_error():
    with pytest.raises(UserError, match="--config nowhere.json: cannot be read"):
        flags.parse_train(["--config", "nowhere.json"])


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--grad_cp"], "1"),
        (["--grad_cp", "1"], "1"),
        (["--grad_cp=true"], "1"),
        (["--grad_cp", "True"], "1"),
        (["--grad_cp", "0"], "0"),
        (["--grad_cp", "false"], "0"),
        (["--grad_cp", "wkv"], "wkv"),
        (["--grad_cp", "1", "--grad_cp", "0"], "0"),
        (["--overwrite"], True),
        (["--overwrite", "yes"], True),
        (["--overwrite", "0"], False),
    ],
)
def test_switches_are_written_with_or_without_a_value(words, expected):
    config, name = train(*words), words[0].removeprefix("--").partition("=")[0]
    assert (vars(config.model) | vars(config.run))[name] == expected


@pytest.mark.parametrize("saved, choice", [("false", "0"), ("true", "1"), ('"wkv"', "wkv")])
def test_a_config_file_from_before_a_switch_had_other_choices_means_what_it_meant(saved, choice):
    text = f'{{"model": {{"load_model": "a.pth", "grad_cp": {saved}}}, "data": {{"data_file": ["b"]}}}}'
    assert from_json(text).model.grad_cp == choice


@pytest.mark.parametrize(
    "words, expected",
    [
        (["ln", "time"], ("ln", "time")),
        (["ln"], ("ln",)),
        ([], ()),
        (["[]"], ()),
        ([""], ()),
        (['["time", "ln"]'], ("time", "ln")),
        (["[time,", "ln]"], ("time", "ln")),  # what a shell makes of ["time", "ln"]
        (["[time,ln]"], ("time", "ln")),
        (["['time']"], ("time",)),
    ],
)
def test_lists_are_written_as_words_or_as_in_the_field(words, expected):
    assert train("--train_parts", *words).adapter.train_parts == expected


def test_field_names_with_spaces_stay_whole():
    assert train("--sft_field", "my prompt", "the answer").data.sft_field == ("my prompt", "the answer")
    assert train("--sft_field", '["my prompt", "the answer"]').data.sft_field == ("my prompt", "the answer")


def test_of_a_flag_given_twice_the_last_one_counts():
    assert train("--bone_r", "16", "--targets", "att", "--bone_r", "32", "--targets", "ffn").adapter.bone_r == 32


@pytest.mark.parametrize(
    "words, message",
    [
        (["--bone_rr", "1"], "--bone_rr is not a flag of train.py; did you mean --bone_r?"),
        (["--epoch_stps=3"], "--epoch_stps is not a flag of train.py; did you mean --epoch_steps?"),
        (["--qqqqqqq"], "--qqqqqqq is not a flag of train.py (--help"),
        (["--bone"], "--bone is not a flag"),  # no abbreviations
        (["--help=2"], "--help: ignored explicit argument"),
        (["--bone_r", "many"], "--bone_r: expected a whole number, got 'many'"),
        (["--bone_r", "1.5"], "--bone_r: expected a whole number"),
        (["--lr_init", "fast"], "--lr_init: expected a number or auto, got 'fast'"),
        (["--lr_init", "nan"], "--lr_init: expected a number or auto, got 'nan'"),
        (["--lr_init", "1e999"], "--lr_init inf: expected a finite number"),
        (["--grad_cp", "maybe"], "--grad_cp maybe: expected one of 0, 1, wkv, auto"),
        (["--overwrite", "maybe"], "--overwrite: expected 1 or 0, got 'maybe'"),
        (["--bone_r"], "--bone_r: expected one argument"),
        (["--bone_mode", "col"], "--bone_mode col: expected one of bone, bat"),
        (["--train_parts", "att"], "--train_parts att: expected one of emb, head, ln, time"),
        (["--bone_r", "1", "loose"], "loose is not a flag"),
    ],
)
def test_mistakes_name_the_flag_and_what_was_expected(words, message):
    with pytest.raises(UserError) as error:
        train(*words)
    assert message in str(error.value)


def test_merge_takes_the_fields_name_of_the_adapter():
    expected = MergeConfig(base_model="base.pth", peft_checkpoint="out/rwkv-0.pth", output="merged.pth")
    assert flags.parse_merge(MERGE) == expected
    assert flags.parse_merge([word.replace("peft_checkpoint", "lora_checkpoint") for word in MERGE]) == expected


def test_merge_says_what_is_missing_or_unknown():
    with pytest.raises(UserError, match="--output is missing"):
        flags.parse_merge(MERGE[:4])
    with pytest.raises(UserError, match="--outputs is not a flag of merge.py; did you mean --output"):
        flags.parse_merge([*MERGE, "--outputs", "x"])


def test_notes_are_printed_by_the_first_process_only(capsys, monkeypatch):
    train("--head_chunk", "0", "--peft", "bone")
    assert "note: --head_chunk 0 is ignored: the head's loss is always computed in pieces\n" in capsys.readouterr().out
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    train("--head_qk", "0")
    assert capsys.readouterr().out == ""


def test_program_reports_a_mistake_without_traceback_from_any_folder(tmp_path):
    program = [sys.executable, REPOSITORY / "train.py", "--bone_rr", "1"]
    result = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --bone_rr") and result.stderr.count("\n") == 1


def test_whole_numbers_beyond_every_float_are_mistakes_like_others(tmp_path):
    huge = "1" + "0" * 400
    with pytest.raises(UserError, match="--ctx_len 1000.* expected at most"):
        flags.parse_train(["--load_model", "a.pth", "--data_file", "a.jsonl", "--ctx_len", huge])
    saved = tmp_path / "config.json"
    saved.write_text('{"optim": {"lr_init": ' + huge + "}}")
    with pytest.raises(UserError, match="lr_init: expected a number"):
        flags.parse_train(["--load_model", "a.pth", "--data_file", "a.jsonl", "--config", str(saved)])
