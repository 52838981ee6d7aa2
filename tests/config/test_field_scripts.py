"""Command lines written for RWKV-PEFT (December 2024 to mid-2025) mean here what they meant to their author."""

import json
import shlex

import pytest

from rwkv_bone.config import flags
from rwkv_bone.config.saved import to_json
from rwkv_bone.errors import UserError

SIZES = "--vocab_size 65536 --n_layer 24 --n_embd 2048"
BINIDX = "--data_type binidx --dataload pad --loss_mask pad"
EPOCHS = "--ctx_len 512 --micro_bsz 8 --epoch_steps 200 --epoch_count 3 --epoch_begin 0 --epoch_save 1"
ADAM = "--lr_init 2e-5 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8"
MACHINE = "--accelerator gpu --devices 4 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1"
COMMON = f"--load_model m.pth --proj_dir out/x --data_file data/x {SIZES} {EPOCHS} {ADAM} {MACHINE} --my_testing x070"
BONE = """--peft bone --bone_config '{"bone_mode":"bat","bone_load":"","bone_r":32}'"""

# The arguments of train.py in RWKV-PEFT in December 2024, each with a value that a script may carry.
ARGUMENTS = """
load_model=m.pth wandb=name proj_dir=out random_seed=1 data_file=d data_type=binidx vocab_size=65536 ctx_len=512
epoch_steps=100 epoch_count=1 epoch_begin=0 epoch_save=1 micro_bsz=4 n_layer=12 n_embd=768 dim_att=768 dim_ffn=3072
pre_ffn=0 head_qk=0 tiny_att_dim=0 tiny_att_layer=-999 lr_init=6e-4 lr_final=1e-5 warmup_steps=-1 beta1=0.9 beta2=0.99
adam_eps=1e-8 grad_cp=0 dropout=0 weight_decay=0 weight_decay_final=-1 my_pile_version=1 my_pile_stage=0
my_pile_shift=-1 my_pile_edecay=0 layerwise_lr=1 ds_bucket_mb=200 my_sample_len=0 my_ffn_shift=1 my_att_shift=1
head_size_a=64 head_size_divisor=8 my_pos_emb=0 load_partial=0 magic_prime=0 my_qa_mask=0 my_random_steps=0
my_testing=x070 my_exit=99999999 my_exit_tokens=0 peft=bone train_parts=ln
lora_config={"lora_load":"","lora_r":8,"lora_alpha":32,"lora_dropout":0.01}
pissa_config={"pissa_load":"","pissa_init":"","pissa_r":8,"svd_niter":4}
bone_config={"bone_mode":"bone","bone_load":"","bone_r":64} quant=none dataload=pad chunk_ctx=512 fla train_type=none
loss_mask=none mask_id={"mask0":"0","mask1":"1"} data_shuffle=1 optim=none avg_loss=0 sft_field=q sft_split=train
accelerator=gpu strategy=auto devices=1 num_nodes=1 precision=bf16 accumulate_grad_batches=1
""".split()


def parse(line, *words):
    return flags.parse_train([*shlex.split(line), *words])


def notes_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_field_script_for_bone_and_bat(capsys):
    config = parse(f"{COMMON} --pre_ffn 0 --head_qk 0 {BINIDX} {BONE} --train_parts [] --wandb name")
    assert (config.adapter.kind, config.adapter.bone_r, config.adapter.train_parts) == ("bat", 32, ())
    assert (config.model.load_model, config.model.n_layer, config.model.my_testing) == ("m.pth", 24, "x070")
    assert (config.data.data_type, config.data.dataload, config.data.loss_mask) == ("binidx", "pad", "pad")
    assert (config.run.epoch_steps, config.run.epoch_count, config.run.devices) == (200, 3, 4)
    assert (config.optim.lr_init, config.optim.lr_final) == (2e-5, 1e-5)
    assert config.model.grad_cp == "1" and config.run.wandb == "name" and config.run.strategy == "deepspeed_stage_1"
    *ignored, curve = notes_of(capsys)
    assert [note.split(" is ignored")[0] for note in ignored] == ["note: --pre_ffn 0", "note: --head_qk 0"]
    assert "falls along a cosine" in curve and "--lr_schedule exp" in curve


def test_the_field_script_for_disha():
    config = parse(f"""{COMMON} {BINIDX} --peft disha --disha_config '{{"mode":"bone","load":"a.pth","r":128}}'""")
    assert (config.adapter.kind, config.adapter.bone_r, config.adapter.peft_load) == ("bone", 128, "a.pth")


def test_the_field_script_for_bone_on_a_quantised_base(capsys):
    sizes = "--vocab_size 65536 --n_layer 32 --n_embd 2560 --pre_ffn 0 --head_qk 0 --my_testing x060"
    bone = """--peft bone --quant int8 --bone_config '{"bone_load":"","bone_r":64}'"""
    config = parse(f"--load_model m --proj_dir out/x --data_file d {sizes} {EPOCHS} {ADAM} {MACHINE} {BINIDX} {bone}")
    assert (config.adapter.kind, config.adapter.bone_r, config.model.quant) == ("bone", 64, "int8")
    assert (config.model.n_layer, config.model.n_embd, config.model.my_testing) == (32, 2560, "x060")
    assert not any("quant" in note for note in notes_of(capsys))


@pytest.mark.parametrize("words, quant", [("int8", "int8"), ("nf4", "nf4"), ("4bit", "fp4"), ("none", "none")])
def test_the_field_script_for_merging_what_was_trained_on_a_quantised_base(words, quant):
    config = flags.parse_merge(shlex.split(f"--base_model b --lora_checkpoint a --output o --quant {words}"))
    assert config.quant == quant


def test_the_field_script_for_prompt_and_response_rows():
    config = parse(f"{COMMON} {BONE} --data_type sft --sft_field query response --sft_split train")
    assert (config.data.data_type, config.data.sft_field) == ("sft", ("query", "response"))


def test_the_field_script_for_pretraining_says_that_every_weight_is_trained(capsys):
    rows = "--data_file d --data_type sft --sft_field q a --sft_split train"
    assert parse(f"--proj_dir out/x --pre_ffn 0 {rows} {SIZES} {EPOCHS} {ADAM} {MACHINE}").adapter.kind == "none"
    assert any("read as --peft none" in note for note in notes_of(capsys))


def test_the_field_script_for_state_tuning(capsys):
    config = parse("--load_model m --data_file d --train_type state --my_testing x060")
    assert config.adapter.kind == "state"
    config = parse("--load_model m --data_file d --state_tune 1")
    assert config.adapter.kind == "state"
    assert any("--peft state" in note for note in notes_of(capsys))
    config = parse("--load_model m --data_file d --peft bone --train_type state --train_parts ln")
    assert (config.adapter.kind, config.adapter.train_parts) == ("bone", ("ln", "state"))


def test_the_field_script_for_infinite_context(capsys):
    config = parse("--load_model m --data_file d --peft bone --train_type infctx --chunk_ctx 1024 --ctx_len 16384")
    assert (config.model.chunk_ctx, config.data.ctx_len) == (1024, 16384)
    assert parse("--load_model m --data_file d --peft bone --train_type infctx").model.chunk_ctx == 512
    assert any("exact gradient" in note for note in notes_of(capsys))
    with pytest.raises(UserError, match="--train_type rlhf: expected none, state or infctx"):
        parse("--load_model m --data_file d --train_type rlhf")


def test_the_field_script_for_lora():
    text = '{"lora_load":"a.pth","lora_r":8,"lora_alpha":32,"lora_dropout":0.01}'
    adapter = parse(f"{COMMON} {BINIDX} --peft lora --lora_config", text).adapter
    assert (adapter.kind, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == ("lora", 8, 32.0, 0.01)
    assert adapter.peft_load == "a.pth"
    adapter = parse(f"{COMMON} --peft lora --peft_config", '{"r":16,"lora_alpha":8,"use_rslora":true}').adapter
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_rs) == (16, 8.0, True)


def test_the_field_script_for_pissa(capsys):
    text = '{"pissa_load":"","pissa_init":"","pissa_r":8,"svd_niter":4}'
    adapter = parse(f"{COMMON} {BINIDX} --peft pissa --train_parts ln --pissa_config", text).adapter
    assert (adapter.kind, adapter.lora_r, adapter.lora_alpha, adapter.peft_load) == ("pissa", 8, 0.0, "")
    assert any("svd_niter 4 is ignored" in note for note in notes_of(capsys))
    with pytest.raises(UserError, match="merge it .merge.py --pissa_init. and train the result"):
        parse(f"{COMMON} --peft pissa --pissa_config", '{"pissa_init":"init_pissa.pth","pissa_r":8}')


def test_the_field_script_for_miss_and_hugging_faces_bat():
    adapter = parse(f"{COMMON} --peft miss --peft_config", '{"r":8,"init_weights":true}').adapter
    assert (adapter.kind, adapter.bone_r) == ("bone", 8)
    adapter = parse(f"{COMMON} --peft miss --peft_config", '{"r":8,"init_weights":"bat"}').adapter
    assert (adapter.kind, adapter.bone_r) == ("bat-col", 8)


@pytest.mark.parametrize(
    "flag, text, kind",
    [
        ("bone_config", '{"bone_mode":"bat","bone_r":8}', "bat"),
        ("lora_config", '{"lora_r":8,"lora_alpha":8}', "lora"),
        ("pissa_config", '{"pissa_r":8}', "pissa"),
    ],
)
def test_an_adapter_config_without_peft_still_trains_the_adapter(flag, text, kind):
    assert parse(f"--load_model m --data_file d --{flag}", text).adapter.kind == kind


def test_an_adapter_config_for_another_adapter_is_ignored_aloud(capsys):
    config = parse(f"{COMMON} {BONE} --lora_config", '{"lora_r":8}')
    assert (config.adapter.kind, config.adapter.lora_r) == ("bat", 32)
    assert any("--lora_config is ignored: only --peft lora reads it" in note for note in notes_of(capsys))
    with pytest.raises(UserError, match="--peft_config has no meaning with --peft state"):
        parse(f"{COMMON} --peft state --peft_config", '{"r":8}')


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.split("=")[0])
def test_every_argument_of_the_field_is_understood(argument, capsys):
    name, _, value = argument.partition("=")
    more = {"sft_field": ["answer"], "mask_id": ["--loss_mask", "se"]}.get(name, [])
    words = [f"--{name}", *filter(None, [value]), *more]
    parse("--load_model m.pth --data_file d --peft bone --train_parts ln", *words)
    notes = [note for note in notes_of(capsys) if "another default" not in note and "times" not in note]
    unread = ("lora_config", "pissa_config")  # by --peft bone
    assert len(notes) == (name in (*flags.field_flags.IGNORED_FLAGS, *unread) or value == "-1")
    assert all(f"--{name}" in note for note in notes)


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--pre_ffn 1", "every block"),
        ("--head_qk 64", "headQK"),
        ("--tiny_att_dim 32", "tiny attention"),
        ("--my_pos_emb 1024", "position"),
        ("--dropout 0.1", "no dropout"),
        ("--layerwise_lr 0", "w0"),
        ("--weight_decay_final 0.001", "constant"),
        ("--my_pile_stage 2", "--my_exit_tokens"),
        ("--train_stage 4", "0, 1, 2 or 3"),
        ("--my_qa_mask 1", "--loss_mask"),
        ("--my_exit 3", "--epoch_count"),
        ("--my_exit_tokens -1000000", "number of tokens"),
        ("--optimizer muon", "AdamW"),
        ("--LISA", "in turn"),
        ("--head_size_divisor 4", "8"),
        ("--load_partial 1", "completely"),
        ("--data_shuffle 0", "shuffled"),
        ("--quant fp8", "there is no fp8"),
        ("--optim adam_mini", "AdamW"),
        ("--peft adalora", "not supported yet"),
        ("--peft prefix", "not supported yet"),
        ("--precision fp16", "overflows"),
        ("--precision tf32", "bf16 or fp32"),
        ("--precision 32", "fp32"),
        ("--precision 16-mixed", "overflows"),
        ("--data_type dummy", "name a file"),
        ("--lr_schedule wsd", "cos"),
        ("--strategy ddp", "deepspeed_stage_1"),
        ("--strategy fsdp", "deepspeed_stage_1"),
        ("--accelerator musa", "auto, gpu, cpu"),
    ],
)
def test_what_this_repository_does_not_do_is_refused_with_the_reason(words, reason):
    with pytest.raises(UserError) as error:
        parse(f"{COMMON} {BONE} {words}")
    assert str(error.value).startswith(words.split()[0]) and reason in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{bone_r:64}", "not JSON"),
        ("64", "expected a JSON object"),
        ('{"bone_mode":"mode","bone_load":"","bone_r":64}', "mode 'mode' is none of bone, bat"),
        ('{"bone_mode":"bone","bone_rank":64}', "unknown key rank"),
        ('{"bone_mode":"bone","bone_r":"64"}', 'r "64": expected a whole number'),
        ('{"bone_mode":"bone","bone_load":1}', "load 1: expected a path"),
        ('{"r":32,"init_weights":"bat"}', "--bone_mode bone contradicts --bone_config, which says bat-col"),
        ('{"bone_mode":"bat","init_weights":"bat"}', "--mode bat contradicts init_weights bat"),
        ('{"r":64,"init_weights":"mini"}', "mini"),
        ('{"bone_mode":"bone","bone_r":16}', "--bone_r 32 contradicts --bone_config, which says 16"),
        ('{"bone_mode":"bat","bone_r":32}', "--bone_mode bone contradicts --bone_config"),
    ],
)
def test_bad_or_contradictory_adapter_configs_are_errors(text, message):
    with pytest.raises(UserError) as error:
        parse(f"{COMMON} --peft bone --bone_r 32 --bone_mode bone", "--bone_config", text)
    assert message in str(error.value)


def test_adapter_config_may_lose_its_quotes_on_the_way_through_the_shell():
    unquoted = '{"bone_mode": "bat", "bone_load": "", "bone_r": 16}'.split()
    config = parse(f"{COMMON} --peft bone", "--bone_config", *unquoted)
    assert (config.adapter.kind, config.adapter.bone_r) == ("bat", 16)


def test_adapter_config_without_a_mode_is_bone_and_says_so(capsys):
    config = parse(f"{COMMON} --peft bone", "--bone_config", json.dumps({"bone_load": "", "bone_r": 16}))
    assert config.adapter.kind == "bone"
    assert any("what is now called bat" in note for note in notes_of(capsys))


@pytest.mark.parametrize(
    "words, flag, expected",
    [
        ("--peft miss", "peft", "bone"),
        ("--precision bf16-true", "precision", "bf16"),
        ("--precision bf16-mixed", "precision", "bf16"),
        ("--warmup_steps -1", "warmup_steps", 0),
        ("--random_seed -1", "random_seed", 42),
        ("--op fla", "op", "auto"),
        ("--data_type utf-8", "data_type", "text"),
        ("--data_type utf-16le", "data_type", "text"),
        ("--data_type numpy", "data_type", "tokens"),
        ("--data_type uint16", "data_type", "tokens"),
        ("--quant 4bit", "quant", "fp4"),
    ],
)
def test_values_with_another_name_are_translated_aloud(words, flag, expected, capsys):
    config = parse(f"{COMMON} --peft bone {words}")
    assert next(getattr(part, flag) for part in vars(config).values() if hasattr(part, flag)) == expected
    assert any(f"{words} is read as --{flag} {expected}" in note for note in notes_of(capsys))


def test_sizes_under_other_names_are_checked_like_ours():
    config = parse(f"{COMMON} {BONE} --head_size_a 64 --dim_att 2048 --dim_ffn 7168")
    assert (config.model.head_size, config.model.n_embd, config.model.dim_ffn) == (64, 2048, 7168)
    assert flags.parse_train("--load_model m --data_file d --peft bone --dim_att 768".split()).model.n_embd == 768
    with pytest.raises(UserError, match="--n_embd 2048 contradicts --dim_att, which says 1024"):
        parse(f"{COMMON} {BONE} --dim_att 1024")


def test_epoch_steps_keeps_the_number_of_samples_under_accumulation(capsys):
    config = parse(f"{COMMON} {BONE} --accumulate_grad_batches 3")
    assert config.run.epoch_steps == 67  # 200 forward passes, three to an optimiser step
    assert any("67 optimiser steps" in note for note in notes_of(capsys))


def test_epoch_steps_counts_optimiser_steps_in_a_command_line_of_ours(capsys):
    ours = "--load_model m.pth --data_file d --epoch_steps 200 --data_type binidx --dataload pad --loss_mask pad"
    config = parse(f"{ours} --peft bone --accumulate_grad_batches 4")
    assert config.run.epoch_steps == 200
    assert notes_of(capsys) == []


def test_a_config_file_says_what_an_rwkv_peft_command_line_leaves_unsaid(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(parse("--load_model m --data_file d --accumulate_grad_batches 4")))
    config = parse(f"--config {path} --head_qk 0 --epoch_steps 8 --accumulate_grad_batches 2")
    assert (config.adapter.kind, config.run.epoch_steps) == ("bone", 8)


def test_base_parameters_that_the_field_trains_unasked_are_mentioned(capsys):
    config = parse(f"{COMMON} {BONE}")
    assert config.adapter.train_parts == ()
    assert any("time and ln too" in note for note in notes_of(capsys))


@pytest.mark.parametrize("words", ["--device cuda", "--type bone"])
def test_the_field_script_for_merging(words, capsys):
    config = flags.parse_merge(shlex.split(f"--base_model b --lora_checkpoint a --output o {words}"))
    assert (config.base_model, config.peft_checkpoint, config.output) == ("b", "a", "o")
    assert len(notes_of(capsys)) == 1


def test_the_field_scripts_for_merging_lora_and_pissa(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "init_pissa.pth").touch()
    merge = "--base_model b --lora_checkpoint a --output o"
    config = flags.parse_merge(shlex.split(f"{merge} --type lora --lora_alpha 32 --quant nf4"))
    assert (config.peft, config.lora_alpha, config.quant) == ("lora", 32.0, "nf4")
    config = flags.parse_merge(shlex.split(f"{merge} --type pissa --lora_init init_pissa.pth --lora_alpha 32"))
    assert (config.peft, config.pissa_init, config.lora_alpha) == ("pissa", "init_pissa.pth", 0.0)
    assert any("PiSSA of RWKV-PEFT has no alpha" in note for note in notes_of(capsys))
    with pytest.raises(UserError, match="--type dora: expected lora, pissa, state, bone, disha or miss"):
        flags.parse_merge(shlex.split(f"{merge} --type dora"))
    with pytest.raises(UserError, match="--peft bone contradicts --type, which says lora"):
        flags.parse_merge(shlex.split(f"{merge} --peft bone --type lora"))
