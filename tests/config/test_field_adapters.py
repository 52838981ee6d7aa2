"""The adapter that a command line of RWKV-PEFT describes: lora_parts, target_modules, Hugging Face's JSON."""

import json
import shlex

import pytest

from rwkv_bone.config import flags
from rwkv_bone.config.field_adapters import read_parts, read_targets
from rwkv_bone.errors import UserError

LINE = "--load_model m.pth --data_file d --my_testing x060 --n_layer 24"


def adapter_of(line, *words):
    return flags.parse_train([*shlex.split(f"{LINE} {line}"), *words]).adapter


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["receptance", "key", "value", "output"], ("receptance", "key", "value", "output")),
        ("receptance,key , gate", ("receptance", "key", "gate")),
        ("receptance key", ("receptance", "key")),
        ('["receptance", "key"]', ("receptance", "key")),
        ("[receptance, key]", ("receptance", "key")),
        (["r_proj", "k_proj", "v_proj", "o_proj", "g_proj"], tuple(f"att.{x}" for x in
            ("receptance", "key", "value", "output", "gate"))),
        (["attn.r_proj", "att.key", "ffn.key", "attn.value"], ("att.receptance", "att.key", "ffn.key", "att.value")),
        (["att", "attn", "ffn", "lm_head"], ("att", "ffn", "head")),
        (["blocks.3.att.key", "model.layers.0.attn.k_proj", "blocks.1.ffn"],
         ("blocks.3.att.key", "blocks.0.att.key", "blocks.1.ffn")),
        ("all-linear", ()),
    ],
)  # fmt: skip
def test_names_of_projections_become_upstreams(value, expected):
    assert read_targets("--target_modules", value) == expected


NO_PROJECTIONS = ["q_proj", "gate_proj", "emb", "ffn.r_proj", "att.ln_x", "blocks", "att.", ".*key", "blocks.0.head"]


@pytest.mark.parametrize("name", [*NO_PROJECTIONS, "att.att", 3])
def test_an_unknown_name_of_a_projection_is_refused_and_named(name):
    with pytest.raises(UserError) as error:
        read_targets("--target_modules", ["key", name])
    assert str(error.value).startswith(f"--target_modules {name}: no projection of an RWKV; expected att, ffn")


def test_target_modules_as_a_flag_and_in_json():
    assert adapter_of("--peft bone --target_modules receptance,key").targets == ("receptance", "key")
    assert adapter_of("--peft bone --target_modules att.key ffn").targets == ("att.key", "ffn")
    text = json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["r_proj", "ffn.key"]})
    adapter = adapter_of("--peft lora --peft_config", text)
    assert (adapter.targets, adapter.lora_alpha) == (("att.receptance", "ffn.key"), 16.0)
    assert adapter_of("--peft miss --peft_config", '{"r":8,"target_modules":"all-linear"}').targets == ()
    with pytest.raises(UserError, match="--peft_config target_modules q_proj: no projection"):
        adapter_of("--peft lora --peft_config", '{"target_modules":["q_proj"]}')
    with pytest.raises(UserError, match="--targets .*contradicts --target_modules"):
        adapter_of("--peft bone --targets ffn --target_modules att")


def test_lora_parts_are_targets_and_parts_of_the_base():
    assert read_parts("--lora_parts", "att,ffn,time,ln") == (("att", "ffn"), ("time", "ln"))
    for text, message in (("att,foo", "foo is none of att, ffn, emb, head"), ("ln,time", "neither att nor ffn")):
        with pytest.raises(UserError, match=f"--lora_parts {text}: {message}"):
            read_parts("--lora_parts", text)
    adapter = adapter_of("--peft lora --lora_config", '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_parts":"att"}')
    assert (adapter.kind, adapter.targets, adapter.train_parts) == ("lora", ("att",), ())
    adapter = adapter_of("--peft pissa --pissa_config", '{"pissa_r":4,"pissa_parts":"att,ffn,ln"}')
    assert (adapter.kind, adapter.targets, adapter.train_parts) == ("pissa", ("att", "ffn"), ("ln",))


def test_the_lora_script_of_2023(capsys):
    numbers = "--lora_r 64 --lora_alpha 128 --lora_dropout 0.01"
    adapter = adapter_of(f"--lora_load rwkv-0 --lora {numbers} --lora_parts=att,ffn,time,ln")
    assert (adapter.kind, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == ("lora", 64, 128.0, 0.01)
    assert (adapter.targets, adapter.train_parts, adapter.peft_load) == (("att", "ffn"), ("time", "ln"), "")
    notes = capsys.readouterr().out
    assert "--lora is read as --peft lora --targets att ffn --train_parts time ln\n" in notes
    assert "--lora_load rwkv-0 is ignored: there is no such file" in notes
    assert "every weight" not in notes and "time and ln too" not in notes


def test_what_the_lora_script_of_2023_leaves_out_is_its_default(capsys):
    adapter = adapter_of("--lora --lora_load theirs/rwkv-3.pth --emb")
    assert (adapter.kind, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == ("lora", 8, 32.0, 0.01)
    assert (adapter.targets, adapter.train_parts) == (("att",), ("emb", "ln", "time"))
    assert adapter.peft_load == "theirs/rwkv-3.pth"  # whether it exists, its reader says
    assert "--peft lora --lora_r 8 --lora_alpha 32 --lora_dropout 0.01 --targets att" in capsys.readouterr().out


def test_the_pissa_script_of_2024_before_its_json(capsys):
    numbers = "--lora_r 64 --lora_alpha 128 --lora_dropout 0.01"
    adapter = adapter_of(f"--lora_load rwkv-0 --lora {numbers} --lora_parts=att,ffn,ln --PISSA --svd_niter 4")
    assert (adapter.kind, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == ("pissa", 64, 0.0, 0.0)
    notes = capsys.readouterr().out
    assert all(f"--{name} is ignored" in notes for name in ("lora_alpha 128", "lora_dropout 0.01", "svd_niter 4"))


def test_state_tune_is_a_switch():
    assert adapter_of("--state_tune").kind == "state"
    assert adapter_of("--state_tune --quant nf4").kind == "state"


def test_of_a_json_for_hugging_face_what_it_leaves_out_is_pefts_default(capsys):
    adapter = adapter_of("--peft lora --peft_config", "{}")
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == (8, 8.0, 0.0)
    assert capsys.readouterr().out.count("as in Hugging Face PEFT") == 2
    adapter = adapter_of("--peft lora --peft_config", '{"r":16,"alpha":32,"dropout":0.05}')
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == (16, 32.0, 0.05)
    assert adapter_of("--peft miss --peft_config", "{}").bone_r == 64


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [("bias", "none", "all"), ("use_dora", False, True), ("init_lora_weights", True, "pissa"),
     ("task_type", "CAUSAL_LM", "SEQ_CLS"), ("modules_to_save", None, ["head"])],
)  # fmt: skip
def test_keys_of_hugging_face_that_say_what_is_so_anyway_are_taken(key, same, other):
    assert adapter_of("--peft lora --peft_config", json.dumps({"r": 4, key: same})).lora_r == 4
    with pytest.raises(UserError, match=f"--peft_config: {key} .* is not supported: expected"):
        adapter_of("--peft lora --peft_config", json.dumps({"r": 4, key: other}))


def test_miss_config_is_read_as_disha_config():
    adapter = adapter_of("--peft miss --miss_config", '{"mode":"bat","load":"","r":16}')
    assert (adapter.kind, adapter.bone_r) == ("bat", 16)
