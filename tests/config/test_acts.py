"""Every setting that acts sometimes, with every value of the settings that it depends on: refused or accepted.

That the table is right, and what is accepted changes a run, tests/training/test_settings_act.py holds.
"""

from dataclasses import dataclass, fields
from itertools import product

import pytest

from rwkv_bone.chat.flags import ChatConfig, parse_chat
from rwkv_bone.config import MergeConfig, acts, when_page
from rwkv_bone.config.acts import asks
from rwkv_bone.config.fields import worded
from rwkv_bone.config.flags import parse_merge, parse_section, parse_train
from rwkv_bone.config.layers import shown
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.conversion.flags import ConvertConfig, parse_convert
from rwkv_bone.data import preview
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.flags import EvaluateConfig, parse_evaluate
from rwkv_bone.hf.flags import HfConfig
from tests.conftest import REPOSITORY

TRAIN_SPECS = {spec.name: spec for section in SECTIONS.values() for spec in fields(section)}


@dataclass(frozen=True)
class Program:
    table: acts.Table
    specs: dict
    needed: dict
    parse: object


PROGRAMS = {
    "train": Program(acts.TRAIN, TRAIN_SPECS, {"load_model": "m.pth", "data_file": ("d",)}, parse_train),
    "merge": Program(
        acts.MERGE,
        {spec.name: spec for spec in fields(MergeConfig)},
        {"base_model": "m.pth", "peft_checkpoint": "a.pth", "output": "o.pth"},
        parse_merge,
    ),
    "convert": Program(
        acts.CONVERT,
        {spec.name: spec for spec in fields(ConvertConfig)},
        {"base_model": "m.pth", "output": "o.pth"},
        lambda argv: parse_convert(argv, "convert"),
    ),
    "chat": Program(
        acts.CHAT,
        {spec.name: spec for spec in fields(ChatConfig)},
        {"load_model": "m.pth"},
        lambda argv: parse_chat(argv, "chat"),
    ),
    "evaluate": Program(
        acts.EVALUATE,
        {spec.name: spec for spec in fields(EvaluateConfig)},
        {"load_model": "m.pth", "task": "gsm8k", "output": "o"},
        lambda argv: parse_evaluate(argv, "evaluate"),
    ),
    "train_hf": Program(
        acts.HF,
        {spec.name: spec for spec in fields(HfConfig)},
        {"model_name_or_path": "m", "data_path": "d"},
        lambda argv: parse_section("train_hf.py", "", HfConfig, argv, table=acts.HF),
    ),
    "preview": Program(
        {**acts.TRAIN, **acts.PREVIEW},
        {**TRAIN_SPECS, **{spec.name: spec for spec in fields(preview.PreviewConfig)}},
        {"data_file": ("d",), "vocab_size": 256, "tokenizer": "bytes"},
        preview.parse,
    ),
}
# Values of settings that are no choice and no switch.
SAMPLES = {
    "adapter": ("", "a.pth"),
    "chunk_ctx": (0, 16, 512, 4096),
    "data_file": (("a",), ("a", "b")),
    "devices": (1, 2),
    "num_nodes": (1, 2),
    "ctx_len": (16, 512),
    "micro_bsz": (1, 8),
    "epoch_count": (1, 2),
    "eval_data": ((), ("h.jsonl",)),
    "eval_steps": (-1, 0, 50),
    "eval_path": ("", "h.jsonl"),
    "eval_split": (0.0, 0.1),
    "output": ("o.pth", "o.st", "o.gguf", "o/", "RWKV7-1.5B"),
    "peft_load": ("", "a.pth"),
    "prompts": ("", "-", "p.jsonl"),
    "samples": (0, 3),
    "shots": (0, 4),
    "temperature": (0.0, 0.7),
    "train_parts": ((), ("ln",), ("emb", "ln")),
}
OTHERS = {
    "cards": "0",
    "data_weights": ("2", "1"),
    "mask_id": "{}",
    "sft_field": ("q", "a"),
    "eval_field": ("q", "a"),
    "loss_mask": "last",
    "epoch_save": 2,
    "rank_timeout": 120,
    "label_smoothing": 0.25,
    "resume_with": ("lr_init",),
}


def values_of(name, spec):
    choices = spec.metadata["choices"]
    return SAMPLES[name] if name in SAMPLES else (False, True) if type(spec.default) is bool else choices


def other(name, spec):
    """A value that is not the default."""
    if name in OTHERS:
        return OTHERS[name]
    choices = [choice for choice in spec.metadata["choices"] or ("x",) if choice != spec.default]
    return {bool: not spec.default, int: 7, float: 0.5, str: choices[0], tuple: tuple(choices[:1])}[type(spec.default)]


def words(settings, specs):
    """The settings as one types them."""
    typed = {name: worded(specs[name], value) for name, value in settings.items()}
    return [
        word
        for name, value in typed.items()
        for word in (f"--{name}", *(value if isinstance(value, tuple) else (shown(value),)))
    ]


def pairs():
    for program, (name, when) in [(p, row) for p, one in PROGRAMS.items() for row in one.table.items()]:
        specs = PROGRAMS[program].specs
        for values in product(*(values_of(other_name, specs[other_name]) for other_name in when.names)):
            yield program, name, dict(zip(when.names, values, strict=True))


PAIRS = list(pairs())


def test_there_are_pairs_of_every_setting_that_acts_sometimes():
    assert len(PAIRS) > 300
    for program, one in PROGRAMS.items():
        assert {name for found, name, _ in PAIRS if found == program} == one.table.keys() <= one.specs.keys()
        # A condition is about settings of the same program.
        assert all(set(when.names) <= one.specs.keys() for when in one.table.values())


def refusal(parse, argv):
    try:
        parse(argv)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_typed_is_accepted_where_it_acts_and_refused_elsewhere(program):
    one, seen = PROGRAMS[program], {True: 0, False: 0}
    for _, name, values in [pair for pair in PAIRS if pair[0] == program]:
        asked = {**values, name: values.get(name, other(name, one.specs[name]))}
        if not asks(name, asked[name], one.specs[name].default):
            continue
        acting = one.table[name].met(asked)
        message = refusal(one.parse, words({**one.needed, **asked}, one.specs))
        if "no config.json" in message:
            continue  # --resume 1, before anything else
        if acting:
            # Another of the settings may be without effect itself.
            assert not message.startswith(f"--{name} "), (asked, message)
        else:
            assert "has no effect" in message, (name, asked, message)
        seen[acting and not message] += 1
        seen[False] += not acting
    assert seen[True] > 0 < seen[False]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_when_each_setting_acts(program, capsys):
    one = PROGRAMS[program]
    with pytest.raises(SystemExit):
        one.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")
    for when in one.table.values():
        assert f"acts {when.words}".replace("- ", "-") in text


def test_the_page_has_the_tables_of_today():
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert when_page.renewed(page) == page, (
        "renew it: PYTHONPATH=src python -m rwkv_bone.config.when_page docs/settings.md"
    )
    assert all(
        f"| `--{name}` | {when.words} |" in page for one in PROGRAMS.values() for name, when in one.table.items()
    )


NEEDED = words(PROGRAMS["train"].needed, PROGRAMS["train"].specs)


def given_in_script(script, *typed):
    return parse_train([*NEEDED, *script.split(), "--typed", *typed])


def test_what_a_typed_flag_leaves_without_effect_in_a_script_is_left_out_with_a_note(capsys):
    script = "--peft bone --bone_mode bat --bone_r 8 --lr_final 1e-4 --epoch_count 4 --epoch_save 2"
    config = given_in_script(script, "--peft", "lora", "--lr_schedule", "constant", "--epoch_count", "1")
    assert (config.adapter.kind, config.adapter.bone_r, config.optim.lr_final) == ("lora", 64, -1)
    notes = capsys.readouterr().out.splitlines()
    assert [note.split(" is left out")[0] for note in notes] == [
        "note: bone_mode=bat of the script",
        "note: bone_r=8 of the script",
        "note: lr_final=0.0001 of the script",
        "note: epoch_save=2 of the script",
    ]


def test_what_only_repeats_the_default_or_asks_for_nothing_is_left_out_in_silence(capsys):
    script = "--peft lora --bone_r 64 --lora_r 8 --lora_rs 0 --epoch_save 1 --mask_id= --targets"
    config = given_in_script(script, "--peft", "state")
    assert (config.adapter.kind, config.adapter.lora_r) == ("state", 32)
    assert capsys.readouterr().out.count("note:") == 1  # lora_r


@pytest.mark.parametrize(
    "typed", ["--lora_r 32", "--peft lora --bone_mode bone", "--lr_schedule constant --lr_final 2e-5"]
)
def test_a_typed_value_that_is_the_default_is_refused_too_where_it_asks_for_something(typed):
    with pytest.raises(UserError, match="has no effect"):
        parse_train([*NEEDED, *typed.split()])
    # These say what is so anyway.
    parse_train(
        [*NEEDED, *"--lora_rs 0 --lora_alpha 0 --lora_plus 1 --eval_samples 0 --mask_id= --epoch_save 1".split()]
    )


def test_an_edited_variable_without_effect_in_its_script_is_refused_by_name():
    with pytest.raises(UserError, match="^lora_r=8 of the script has no effect with --peft bone; it acts with .*lora"):
        given_in_script("--peft bone --lora_r 8")
    with pytest.raises(UserError, match="^lora_r=8 of the script"):
        given_in_script("--peft bone --lora_r 8", "--peft", "state")


@pytest.mark.parametrize(
    ("script", "typed", "left"),
    [
        ("--eval_data h.jsonl", "--eval_split 0.1", ((), 0.1)),
        ("--eval_split 0.1", "--eval_data h.jsonl", (("h.jsonl",), 0.0)),
        ("--eval_data h.jsonl", "--data_file mine", ((), 0.0)),
        ("--eval_data h.jsonl", "--data_file mine --eval_data other", (("other",), 0.0)),
        ("--eval_data h.jsonl", "--data_file d", (("h.jsonl",), 0.0)),
        ("--eval_data h.jsonl --data_file a b --data_weights 2 1", "--data_file c d", ((), 0.0)),
    ],
)
def test_held_out_data_of_a_script_gives_way_to_what_is_typed(script, typed, left, capsys):
    config = given_in_script(script, *typed.split())
    assert (config.data.eval_data, config.data.eval_split) == left and config.data.data_weights == ()
    changed = "data_file d" not in typed and "other" not in typed
    assert ("of the script is left out" in capsys.readouterr().out) == changed


@pytest.mark.parametrize(
    ("script", "typed", "left"),
    [
        ("--task dpo --beta 0.3 --sft_weight 0.5", "--task simpo", (-1, -1)),
        ("--task dpo --beta 0.3 --sft_weight 0", "--task orpo --beta 0.2", (0.2, -1)),
        ("--task dpo --beta 0.3 --sft_weight 0.5", "--task dpo", (0.3, 0.5)),
        ("--task dpo --beta auto", "--task simpo", (-1, -1)),
        ("--task dpo --beta 0.3 --data_file mine", "--ctx_len 64", (0.3, -1)),
    ],
)
def test_strengths_of_a_scripts_task_give_way_to_another_task_and_its_data_does_not(script, typed, left, capsys):
    config = given_in_script(script, *typed.split())
    assert (config.preference.beta, config.preference.sft_weight) == left
    assert config.data.data_file == (("mine",) if "mine" in script else ("d",))
    notes = capsys.readouterr().out
    assert ("is left out: it belongs to that task" in notes) == (-1 in left and "0.3 --sft" in script)


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("--beta 0.9", r"acts with --task dpo, orpo, simpo or kto \(Adam's are --beta1 and --beta2\): .* --task dpo$"),
        ("--task dpo --gamma 1", "give --task simpo$"),
        ("--task kto --sft_weight 0.1", "give --task dpo$"),
        ("--task orpo --label_smoothing 0.1", "give --task dpo$"),
        ("--task dpo --desirable_weight 2", "give --task kto$"),
        ("--task dpo --reference base", "give --peft_load$"),
        ("--reference base", "give --task dpo$"),
        ("--task dpo --l2wrap 1e-4", "give --task sft$"),
    ],
)
def test_a_setting_of_another_task_is_refused_with_what_it_takes(typed, remedy):
    with pytest.raises(UserError, match=f"^{typed.split()[-2]} .* has no effect .*{remedy}"):
        parse_train([*NEEDED, *typed.split()])


def test_what_is_so_in_every_task_may_be_said_in_every_task():
    said = "--beta auto --gamma 0 --sft_weight 0 --desirable_weight 1 --undesirable_weight 1 --reference start"
    for task in ("sft", "dpo", "orpo", "simpo", "kto"):
        assert parse_train([*NEEDED, "--task", task, *said.split()]).preference.gamma == 0


def test_two_flags_that_exclude_each_other_are_refused_where_both_are_typed():
    for argv in (["--eval_data", "h", "--eval_split", "0.1"], ["--resume", "--overwrite", "--config", "c.json"]):
        with pytest.raises(UserError, match=r"has no effect|cannot be read"):
            parse_train([*NEEDED, *argv])


def test_a_saved_run_gives_way_to_what_is_typed_and_keeps_what_never_acted(tmp_path, capsys):
    from rwkv_bone.config.saved import build, to_json

    saved = {"model": {"load_model": "m.pth"}, "data": {"data_file": ("d",), "eval_data": "h"}}
    saved |= {"adapter": {"peft": "bone", "bone_r": 8, "lora_r": 4}}
    path = tmp_path / "config.json"
    path.write_text(to_json(build(saved)))
    config = parse_train(["--config", str(path), "--peft", "lora"])
    assert (config.adapter.bone_r, config.adapter.lora_r) == (64, 4)
    assert f"note: bone_r 8 of {path} is left out" in capsys.readouterr().out
    config = parse_train(["--config", str(path), "--data_file", "mine"])
    assert config.data.eval_data == () and f"eval_data h of {path} is left out" in capsys.readouterr().out
    # --resume compares what was saved: nothing of it may be lost.
    resumed = parse_train(["--proj_dir", str(tmp_path), "--resume", "1", "--data_file", "moved"])
    assert (resumed.adapter.lora_r, resumed.data.eval_data) == (4, ("h",))


def test_mistakes_in_a_script_are_told_from_mistakes_that_were_typed():
    with pytest.raises(UserError, match="^in the script's variables: --lr_init: expected a number or auto, got ''"):
        parse_train([*NEEDED, "--lr_init=", "--typed", "--ctx_len", "8"])
    with pytest.raises(UserError, match="^--ctx_len: expected a whole number, got ''"):
        parse_train([*NEEDED, "--typed", "--ctx_len="])


@pytest.mark.parametrize(
    "flag",
    [
        *("--lora_plus=0", "--random_seed=4294967296", "--random_seed=-5", "--lr_init=inf", "--lr_init=-1"),
        *("--ctx_len=100000000", "--micro_bsz=1000000", "--epoch_count=1000000000", "--devices=1000", "--beta1=1"),
        *("--adam_eps=0", "--lora_dropout=1", "--lora_alpha=-1", "--ctx_len=1_000", "--ctx_len=1e3", "--ctx_len="),
        *("--ctx_len=８", "--lr_init=1_0", "--my_testing=garbage", "--eval_split=1", "--data_weights=nan"),
        *("--beta=0", "--beta=-1", "--gamma=-0.5", "--sft_weight=-2", "--label_smoothing=0.5", "--desirable_weight=-1"),
        *("--grad_clip=nan", "--weight_decay=-0.1", "--l2wrap=1e400", "--epoch_steps=-1", "--warmup_steps=2e9"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_by_name(flag):
    peft = ["--peft", "lora"] if "lora" in flag else []
    with pytest.raises(UserError, match=f"^{flag.split('=')[0]}"):
        parse_train([*NEEDED, *peft, flag])


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--lr_init 20", "--lr_init 20 is unusually large"),
        ("--peft none --lr_init 0.02", "--lr_init 0.02 is unusually large"),
        ("--peft state --lr_init 0.5 --lr_final 0.1", ""),
        ("--lr_init 1e-5 --lr_final 1e-4", "--lr_final 0.0001 is above --lr_init 1e-05"),
        ("--lr_init 1e-5 --lr_schedule constant", ""),
        ("--task dpo --beta 500", "--beta 500 is unusually large"),
        ("--weight_decay 3", "--weight_decay 3 is unusually large"),
        ("--peft lora --lr_init 0.1 --lora_plus 16", "--lora_plus 16 makes the rate of lora_B 1.6"),
        ("--lr_init 1e-4 --ctx_len 07", ""),
    ],
)
def test_a_number_that_is_hardly_meant_is_warned_of(words, warning, capsys):
    parse_train([*NEEDED, *words.split()])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == bool(warning) and all(warning in line for line in lines)


def test_a_list_that_is_given_twice_is_said_and_a_word_twice_is_refused(capsys):
    parse_train([*NEEDED, "--targets", "att", "--targets", "ffn"])
    assert "note: --targets is given 2 times" in capsys.readouterr().out
    for flag, word in (("--targets", "att"), ("--train_parts", "ln"), ("--data_file", "d")):
        with pytest.raises(UserError, match=f"{flag} names {word} 2 times"):
            parse_train(["--load_model", "m", "--data_file", "x", flag, word, word])
