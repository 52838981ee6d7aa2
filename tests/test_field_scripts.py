"""Command lines written for RWKV-PEFT (December 2024 to mid-2025) mean here what they meant to their author."""

import json
import shlex

import pytest

from rwkv_bone import cli
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
    return cli.parse_train([*shlex.split(line), *words])


def notes_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_field_script_for_bone_and_bat(capsys):
    config = parse(f"{COMMON} --pre_ffn 0 --head_qk 0 {BINIDX} {BONE} --train_parts [] --wandb name")
    assert (config.adapter.kind, config.adapter.bone_r, config.adapter.train_parts) == ("bat", 32, ())
    assert (config.model.load_model, config.model.n_layer, config.model.my_testing) == ("m.pth", 24, "x070")
    assert (config.data.data_type, config.data.dataload, config.data.loss_mask) == ("binidx", "pad", "pad")
    assert (config.run.epoch_steps, config.run.epoch_count, config.run.devices) == (200, 3, 4)
    assert (config.optim.lr_init, config.optim.lr_final) == (2e-5, 1e-5)
    assert config.model.grad_cp and config.run.wandb == "name" and config.run.strategy == "deepspeed_stage_1"
    assert [note.split(" is ignored")[0] for note in notes_of(capsys)] == ["note: --pre_ffn 0", "note: --head_qk 0"]


def test_the_field_script_for_disha():
    config = parse(f"""{COMMON} {BINIDX} --peft disha --disha_config '{{"mode":"bone","load":"a.pth","r":128}}'""")
    assert (config.adapter.kind, config.adapter.bone_r, config.adapter.bone_load) == ("bone", 128, "a.pth")


def test_the_field_script_for_prompt_and_response_rows():
    config = parse(f"{COMMON} {BONE} --data_type sft --sft_field query response --sft_split train")
    assert (config.data.data_type, config.data.sft_field) == ("sft", ("query", "response"))


def test_the_field_script_for_pretraining_says_that_every_weight_is_trained(capsys):
    rows = "--data_file d --data_type sft --sft_field q a --sft_split train"
    assert parse(f"--proj_dir out/x {rows} {SIZES} {EPOCHS} {ADAM} {MACHINE}").adapter.kind == "none"
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


def test_an_adapter_config_without_peft_still_trains_the_adapter():
    config = parse("--load_model m --data_file d --bone_config", '{"bone_mode":"bat","bone_r":8}')
    assert config.adapter.kind == "bat"


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.split("=")[0])
def test_every_argument_of_the_field_is_understood(argument, capsys):
    name, _, value = argument.partition("=")
    words = [f"--{name}", *filter(None, [value]), *(["answer"] if name == "sft_field" else [])]
    parse("--load_model m.pth --data_file d --peft bone --train_parts ln", *words)
    notes = notes_of(capsys)
    assert len(notes) == (name in cli.field_flags.IGNORED or value == "-1")
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
        ("--my_pile_stage 2", "Pile"),
        ("--my_qa_mask 1", "--loss_mask"),
        ("--my_exit 3", "--epoch_count"),
        ("--my_exit_tokens 1000000", "--epoch_count"),
        ("--head_size_divisor 4", "8"),
        ("--load_partial 1", "completely"),
        ("--data_shuffle 0", "shuffled"),
        ("--sft_split train[:1000]", "cut the file"),
        ("--quant nf4", "not supported yet"),
        ("--optim adam_mini", "AdamW"),
        ("--peft lora", "not supported yet"),
        ("--peft pissa", "not supported yet"),
        ("--precision fp16", "overflows"),
        ("--precision tf32", "bf16 or fp32"),
        ("--precision 32", "fp32"),
        ("--precision 16-mixed", "overflows"),
        ("--data_type utf-8", "JSON lines"),
        ("--data_type utf-16le", "JSON lines"),
        ("--data_type numpy", "binidx"),
        ("--data_type uint16", "binidx"),
        ("--data_type dummy", "name a file"),
        ("--loss_mask qa", "not supported yet"),
        ("--loss_mask se", "not supported yet"),
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
        ('{"r":64,"init_weights":"bat"}', "along columns"),
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
    ],
)
def test_values_with_another_name_are_translated_aloud(words, flag, expected, capsys):
    config = parse(f"{COMMON} --peft bone {words}")
    assert next(getattr(part, flag) for part in vars(config).values() if hasattr(part, flag)) == expected
    assert any(f"{words} is read as --{flag} {expected}" in note for note in notes_of(capsys))


def test_sizes_under_other_names_are_checked_like_ours():
    config = parse(f"{COMMON} {BONE} --head_size_a 64 --dim_att 2048 --dim_ffn 7168")
    assert (config.model.head_size, config.model.n_embd, config.model.dim_ffn) == (64, 2048, 7168)
    assert cli.parse_train("--load_model m --data_file d --peft bone --dim_att 768".split()).model.n_embd == 768
    with pytest.raises(UserError, match="--n_embd 2048 contradicts --dim_att, which says 1024"):
        parse(f"{COMMON} {BONE} --dim_att 1024")


def test_epoch_steps_keeps_the_number_of_samples_under_accumulation(capsys):
    config = parse(f"{COMMON} {BONE} --accumulate_grad_batches 3")
    assert config.run.epoch_steps == 67  # 200 forward passes, three to an optimiser step
    assert any("67 optimiser steps" in note for note in notes_of(capsys))


def test_epoch_steps_counts_optimiser_steps_in_a_command_line_of_ours(capsys):
    config = parse(f"{COMMON} --peft bone --accumulate_grad_batches 4")
    assert config.run.epoch_steps == 200
    assert notes_of(capsys) == []


def test_a_config_file_says_what_an_rwkv_peft_command_line_leaves_unsaid(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(cli.to_json(parse("--load_model m --data_file d --accumulate_grad_batches 4")))
    config = parse(f"--config {path} --head_qk 0 --epoch_steps 8 --accumulate_grad_batches 2")
    assert (config.adapter.kind, config.run.epoch_steps) == ("bone", 8)


def test_base_parameters_that_the_field_trains_unasked_are_mentioned(capsys):
    config = parse(f"{COMMON} {BONE}")
    assert config.adapter.train_parts == ()
    assert any("time and ln too" in note for note in notes_of(capsys))


@pytest.mark.parametrize("words, fits", [("--quant none", True), ("--device cuda", True), ("--type bone", True)])
def test_the_field_script_for_merging(words, fits, capsys):
    config = cli.parse_merge(shlex.split(f"--base_model b --lora_checkpoint a --output o {words}"))
    assert (config.base_model, config.peft_checkpoint, config.output) == ("b", "a", "o")
    assert len(notes_of(capsys)) == 1


@pytest.mark.parametrize("words", ["--quant nf4", "--type lora", "--type pissa", "--lora_init i.pth"])
def test_merging_what_is_not_supported_is_refused(words):
    with pytest.raises(UserError, match="supported yet"):
        cli.parse_merge(shlex.split(f"--base_model b --lora_checkpoint a --output o {words}"))
