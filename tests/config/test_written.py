"""A file of settings that a person has written: every value is what the flag would take, or refused with its line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import to_json
from rwkv_bone.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = "load_model: m.pth\ndata_file: [a.jsonl, b.jsonl]\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def read(write):
    """The configuration of a file, after the flags `more`."""

    def read(text, *more, name="run.yaml"):
        return parse_train(["--config", write(text, name), *more])

    return read


def refusal(read, text, *more, **options) -> str:
    with pytest.raises(UserError) as error:
        read(text, *more, **options)
    return str(error.value)


SECTIONS = """
model: {load_model: m.pth}
data:
  data_file:
    - a.jsonl
    - b.jsonl
optim:
  lr_init: 1e-4
run: {overwrite: yes}
"""
FLAT = NEEDED + "lr_init: 1e-4  # a text for YAML 1.1\noverwrite: on\n"
JSON = json.dumps(
    {"load_model": "m.pth", "data": {"data_file": ["a.jsonl", "b.jsonl"]}, "lr_init": 1e-4, "overwrite": 1}
)


@pytest.mark.parametrize("text, name", [(FLAT, "run.yaml"), (SECTIONS, "RUN.YML"), (JSON, "run.json")])
def test_a_file_says_what_the_flags_would_and_flags_override_it(read, text, name):
    typed = ["--load_model", "m.pth", "--data_file", "a.jsonl", "b.jsonl", "--lr_init", "1e-4", "--overwrite", "1"]
    assert read(text, name=name) == parse_train(typed)
    assert read(text, "--lr_init", "0.5", name=name).optim.lr_init == 0.5


# (a line, the words of the command line that mean the same): where YAML 1.1 itself would have read something else.
SAME = [
    ("overwrite: no", ["--overwrite", "no"]),
    ("overwrite: Off", ["--overwrite", "Off"]),
    ("wandb: no", ["--wandb", "no"]),
    ("wandb: 010", ["--wandb", "010"]),
    ("wandb: 2024-01-31", ["--wandb", "2024-01-31"]),
    ("wandb: 1.50", ["--wandb", "1.50"]),
    ("wandb: true", ["--wandb", "true"]),
    ("wandb: ''", ["--wandb", ""]),
    ("micro_bsz: 010", ["--micro_bsz", "010"]),
    ("micro_bsz: auto", ["--micro_bsz", "auto"]),
    ("lr_init: 1e-4", ["--lr_init", "1e-4"]),
    ("lr_init: 1", ["--lr_init", "1"]),
    ("lr_init: '3e-4'", ["--lr_init", "3e-4"]),
    ("grad_cp: 1", ["--grad_cp", "1"]),
    ("grad_cp: off", ["--grad_cp", "off"]),
    ("targets: att.key", ["--targets", "att.key"]),
    ("targets: [att.key, ffn]", ["--targets", "att.key", "ffn"]),
    ("targets: []", ["--targets"]),
    ("data_weights: [1, 0.5]", ["--data_weights", "1", "0.5"]),
    ("peft_load: my adapter.pth", ["--peft_load", "my adapter.pth"]),
    ("bone_load: a.pth", ["--bone_load", "a.pth"]),
    ("sft_split: '[:10]'", ["--sft_split", "[:10]"]),
    ("wandb: |\n  of mine\n", ["--wandb", "of mine"]),
    ("wandb: caf\u00e9", ["--wandb", "caf\u00e9"]),
    ("devices: 2,3", ["--devices", "2,3"]),
    ("devices: [2, 3]", ["--devices", "2,3"]),
    ("bone_r: &size 8\nctx_len: *size", ["--bone_r", "8", "--ctx_len", "8"]),
    (
        "task: dpo\npreference: {beta: auto, sft_weight: 0.2}",
        ["--task", "dpo", "--beta", "auto", "--sft_weight", "0.2"],
    ),
    ("epoch_count: 20\nsave_minutes: 0.5", ["--epoch_count", "20", "--save_minutes", "0.5"]),
]


@pytest.mark.parametrize("line, words", SAME, ids=[line for line, _ in SAME])
def test_a_value_is_what_its_flag_takes_whatever_yaml_makes_of_it(read, line, words):
    files = ["--load_model", "m.pth", "--data_file", "a.jsonl", "b.jsonl"]
    assert read(NEEDED + line) == parse_train([*files, *words])


# The file begins with the three lines of NEEDED.
REFUSED = [
    ("micro_bsz: 0x10", "line 3: micro_bsz: expected a whole number or auto, got '0x10'"),
    ("micro_bsz: 0o10", "line 3: micro_bsz: expected a whole number or auto, got '0o10'"),
    ("micro_bsz: 0", "line 3: micro_bsz: expected a whole number or auto, got '0'"),
    ("ctx_len: 1_000", "line 3: ctx_len: expected a whole number, got '1_000'"),
    ("ctx_len: 4:16", "line 3: ctx_len: expected a whole number, got '4:16'"),
    ("ctx_len: 512.0", "line 3: ctx_len: expected a whole number, got '512.0'"),
    ("lr_init: .inf", "line 3: lr_init: expected a number or auto, got '.inf'"),
    ("lr_init: no", "line 3: lr_init: expected a number or auto, got 'no'"),
    ("overwrite: maybe", "line 3: overwrite: expected 1 or 0, got 'maybe'"),
    ("bone_r: -3", "line 3: bone_r: --bone_r -3: expected at least 1"),
    ("quant: int9", "line 3: quant: --quant int9: expected one of"),
    ("eval_data:", "line 3: eval_data: there is no value"),
    ("eval_data: ~", "line 3: eval_data: there is no value"),
    ("targets: [ffn, null]", "line 3: targets: there is no value"),
    ("lr_init: [1e-4, 1e-5]", "line 3: lr_init: expected one value, found a list of 2"),
    ("targets: [[a]]", "line 3: targets: expected a value, or a list of values"),
    ("mask_id: {mask0: a}", "line 3: mask_id: expected a value; text with { or : in it needs quotes"),
    ("lr: 1", "line 3: lr: there is no such setting; did you mean lr_init?"),
    ("learning_rate: 1", "did you mean lr_init?"),
    ("micro-bsz: 1", "line 3: micro-bsz: there is no such setting; did you mean micro_bsz?"),
    ("typed: 1", "line 3: typed: there is no such setting"),
    ("config: b.yaml", "line 3: config: there is no such setting"),
    ("datasets:\n  - path: a", "line 3: datasets: expected a value"),
    ("optim: {lr: 1}", "line 3: optim.lr: there is no such setting; did you mean lr_init?"),
    ("preference: {task: dpo}", "line 3: preference.task: task is in section data, not in preference"),
    (
        "task: dpo\ngamma: 1",
        "gamma 1 of {file} has no effect with --task dpo; it acts with --task simpo: remove that line",
    ),
    ("dpo_beta: 1", "line 3: dpo_beta: there is no such setting; did you mean beta?"),
    ("data: {lr_init: 1}", "line 3: data.lr_init: lr_init is in section optim, not in data"),
    ("trainer: {lr_init: 1}", "line 3: trainer.lr_init: there is no section trainer"),
    ("ctx_len: 8\nlr_init: 1\nctx_len: 9", "line 5: ctx_len is there twice, in line 3 too"),
    ("ctx_len: 8\ndata: {ctx_len: 9}", "line 4: data.ctx_len: it is"),
    ("peft_load: a\nbone_load: b", "line 4: bone_load: it is"),
    ("\toptim: 1", "line 3: not YAML"),
    ("run:\n\tdevices: 2", "no tabs"),
    ("lr_init: 'a", "line 3: not YAML"),
    ("- a", "line 3: not YAML"),
    ("--- \nlr_init: 1", "not YAML"),
    ("lr_init: !!float 1", "line 3: lr_init: tags, such as !float, are not read"),
    ("wandb: !!python/object/apply:os.system [exit]", "line 3: wandb: tags, such as"),
    ("<<: {lr_init: 1}", "line 3: <<.lr_init: there is no section <<"),
    ("? [a, b]\n: c", "line 3: expected the name of a setting"),
    (
        "lora_r: 8",
        "lora_r 8 of {file} has no effect with --peft bone; it acts with --peft lora or pissa: remove that line",
    ),
    ("devices: 2\ncards: 1", "--cards 1 names 1 GPU, and --devices is 2"),
    # RWKV-PEFT's names and values.
    ("quant: fp8", "line 3: quant: --quant fp8: there is no fp8"),
    ("pre_ffn: 1", "line 3: pre_ffn: --pre_ffn 1: every block has its time mix"),
    ("layerwise_lr: 1\nstrategy: ddp", "line 4: strategy: --strategy ddp: every run goes through DeepSpeed"),
]


@pytest.mark.parametrize("lines, message", REFUSED, ids=[line for line, _ in REFUSED])
def test_what_no_flag_would_take_is_refused_with_file_line_and_name(read, lines, message, tmp_path):
    told = refusal(read, NEEDED + lines)
    assert message.replace("{file}", str(tmp_path / "run.yaml")) in told
    assert told.startswith(str(tmp_path / "run.yaml")) or "remove that line" in told or "--cards" in told


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"lr": 1}', "run.json: lr: there is no such setting; did you mean lr_init?"),
        ('{"lr_init": null}', "run.json: lr_init: there is no value"),
        ('{"lr_init": 1, "lr_init": 2}', "run.json: lr_init is there twice"),
        ('{"optim": {"lr_init": 1, "lr_init": 2}}', "run.json: lr_init is there twice"),
        ('{"micro_bsz": 1.5}', "run.json: micro_bsz: expected a whole number or auto, got '1.5'"),
        ('{"targets": [{}]}', "run.json: targets: expected a value"),
        ('{"overwrite": true, "lora_r": 8}', "has no effect with --peft bone"),
    ],
)
def test_flat_json_is_held_to_the_same(read, text, message):
    assert message in refusal(read, text, "--load_model", "m", "--data_file", "d", name="run.json")


@pytest.mark.parametrize("text", ["", "# nothing\n", "just words", "[a, b]"])
def test_a_file_without_settings_is_none(read, text):
    assert "expected settings, `name: value`" in refusal(read, text)


def test_rwkv_pefts_names_are_translated_as_on_its_command_line(read, capsys):
    theirs = "my_testing: x070\npeft: disha\nprecision: bf16-true\ntrain_type: infctx\nn_layer: 2\n"
    config = read(NEEDED + theirs + 'disha_config: \'{"mode": "bone", "r": 16}\'\n')
    assert (config.adapter.kind, config.adapter.bone_r, config.model.chunk_ctx) == ("bone", 16, 512)
    said = capsys.readouterr().out
    assert "run.yaml: --precision bf16-true is read as --precision bf16" in said


def test_a_files_settings_that_flags_leave_without_effect_are_left_out_with_a_note(read, capsys):
    config = read(NEEDED + "bone_r: 8\neval_data: h.jsonl\n", "--peft", "lora", "--data_file", "mine.jsonl")
    assert (config.adapter.bone_r, config.data.eval_data) == (64, ())
    said = capsys.readouterr().out
    assert "bone_r 8 of" in said and "eval_data h.jsonl of" in said


SCRIPT = ["--load_model=s.pth", "--peft=lora", "--lora_r=8", "--lr_init=0.5", "--ctx_len=64", "--data_file", "s"]


def test_a_file_that_was_typed_over_a_script_overrides_its_variables_and_that_is_said(write, capsys):
    path = write(NEEDED + "lr_init: 1e-3\npeft: bone\nctx_len: 64\n")
    config = parse_train([*SCRIPT, "--typed", "--config", path])
    assert (config.model.load_model, config.optim.lr_init, config.data.ctx_len) == ("m.pth", 1e-3, 64)
    assert (config.adapter.kind, config.adapter.lora_r) == ("bone", 32)
    said = capsys.readouterr().out
    assert f"{path} says otherwise, so of the script are left out: load_model=s.pth" in said
    assert "lora_r=8 of the script is left out" in said and "ctx_len" not in said


def test_a_file_that_a_script_names_gives_way_to_the_scripts_variables(write):
    config = parse_train([*SCRIPT[3:], f"--config={write(NEEDED + 'lr_init: 1e-3')}", "--typed"])
    assert (config.model.load_model, config.optim.lr_init) == ("m.pth", 0.5)


def test_a_runs_config_that_was_typed_over_a_script_is_the_run_that_is_trained(tmp_path):
    made = parse_train(["--load_model", "a.pth", "--data_file", "a.jsonl", "--lr_init", "1e-3"])
    (tmp_path / "config.json").write_text(to_json(made))
    assert parse_train([*SCRIPT, "--typed", "--config", str(tmp_path / "config.json")]) == made


def test_yaml_that_cannot_be_read_for_lack_of_a_package_is_told(write):
    code = (
        "import sys; sys.modules['yaml'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from rwkv_bone.commands import train; sys.argv[1:] = ['--config', sys.argv[2]]; sys.exit(train())"
    )
    command = [sys.executable, "-c", code, str(REPOSITORY / "src"), write(FLAT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install pyyaml" in done.stderr


def test_json_is_read_without_the_package_for_yaml(write):
    code = (
        "import sys; sys.modules['yaml'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from rwkv_bone.config.flags import parse_train; print(parse_train(['--config', sys.argv[2]]).optim.lr_init)"
    )
    command = [sys.executable, "-c", code, str(REPOSITORY / "src"), write(JSON, "run.json")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0.0001\n"
