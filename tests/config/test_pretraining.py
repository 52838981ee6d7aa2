"""Command lines that begin with new weights: RWKV-PEFT's pretrain.sh, and both scripts of RWKV-LM."""

import shlex

import pytest

from rwkv_bone.config import flags
from rwkv_bone.errors import UserError

SIZES = "--n_layer 12 --n_embd 768 --vocab_size 65536 --my_testing x070"
ADAM = "--lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --weight_decay 0.001"
PLACE = "--accelerator gpu --devices 2 --num_nodes 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1"
DATA = "--data_file data/minipile --data_type binidx --ctx_len 512 --micro_bsz 16"
LM = f"{SIZES} {ADAM} {PLACE} {DATA} --epoch_count 999999 --epoch_begin 0 --epoch_save 10 --magic_prime 2926181"
STAGE = {"my_pile_stage": f"{LM} --head_size_a 64 --pre_ffn 0 --head_qk 0 --my_pile_edecay 0 --ds_bucket_mb 2",
         "train_stage": f"{LM} --head_size 64 --kernel @rwkv3 --head_chunk 0 --enable_progress_bar True"}  # fmt: skip
TOKENS = "--my_exit_tokens 1498226207"


def parse(line, folder):
    return flags.parse_train([*shlex.split(line), "--proj_dir", str(folder)])


@pytest.mark.parametrize("model", ["", '--load_model ""', "--load_model 0", "--load_model out/L12/rwkv-init.pth"])
def test_without_a_base_the_model_is_new_and_every_weight_is_trained(model, tmp_path, capsys):
    rows = "--data_file d --data_type sft --sft_field query response --sft_split train[:1000]"
    config = parse(f"{model} {SIZES} {ADAM} {rows} --epoch_steps 1 --epoch_count 3", tmp_path)
    assert (config.model.load_model, config.adapter.kind) == ("", "none")
    notes = capsys.readouterr().out
    assert "without --peft trains every weight" in notes
    assert ("so the model is new" in notes) == ("0" in model or "init" in model)


def test_an_adapter_has_no_new_base(tmp_path):
    """The file of a base that is not there is an error where the base is needed."""
    config = parse("--load_model other.pth --data_file d --my_testing x070", tmp_path)
    assert config.model.load_model == "other.pth"


@pytest.mark.parametrize("flag", STAGE)
def test_stage_1_is_refused_since_it_trains_nothing(flag, tmp_path):
    with pytest.raises(UserError, match=f"^--{flag} 1 only makes new weights, rwkv-init.pth, and trains nothing"):
        parse(f"{STAGE[flag]} --{flag} 1 {TOKENS}", tmp_path)


@pytest.mark.parametrize("flag", STAGE)
@pytest.mark.parametrize("stage", [2, 3])
def test_stages_2_and_3_read_so_many_tokens_in_windows(flag, stage, tmp_path, capsys):
    config = parse(f"--load_model 0 {STAGE[flag]} --{flag} {stage} {TOKENS}", tmp_path)
    assert (config.adapter.kind, config.data.dataload, config.model.load_model) == ("none", "get", "")
    batch = 2 * 16 * 512
    steps = config.run.epoch_count * config.run.epoch_steps
    assert (steps - 1) * batch < 1498226207 <= steps * batch
    assert (config.run.save_steps, config.run.epoch_save) == (10 * 40320 // 32, 1)
    assert config.optim.lr_schedule == "cos"
    notes = capsys.readouterr().out
    assert f"--{flag} {stage} is read as --dataload get" in notes and "--lr_schedule exp" not in notes
    assert "without --dataload" not in notes and "new" in notes


def test_accumulation_makes_fewer_steps_of_the_same_tokens(tmp_path):
    line = f"{STAGE['train_stage']} --train_stage 3 --my_exit_tokens 1000000 --accumulate_grad_batches 4"
    assert parse(line, tmp_path).run.epoch_steps == -(-1000000 // (4 * 2 * 16 * 512))


def test_a_number_of_tokens_ends_a_run_without_stages_too(tmp_path):
    config = parse(f"--load_model m.pth {DATA} --n_layer 12 --my_exit_tokens 100000 --epoch_steps 5", tmp_path)
    assert (config.run.epoch_count, config.run.epoch_steps, config.run.save_steps) == (1, 13, 5)
    assert config.data.dataload == "pack"
    assert parse(f"--load_model m.pth {DATA} --my_exit_tokens 0 --epoch_steps 5", tmp_path).run.epoch_steps == 5


def test_a_stage_without_its_number_of_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match="--train_stage 3 takes the length of the run from --my_exit_tokens.*give it"):
        parse(f"{STAGE['train_stage']} --train_stage 3", tmp_path)


@pytest.mark.parametrize("model", ["", "--load_model 0", "--load_model elsewhere.pth"])
def test_the_base_of_stage_3_is_the_newest_of_the_results_folder(model, tmp_path, capsys):
    line = f"{model} {STAGE['train_stage']} --train_stage 3 {TOKENS}"
    (tmp_path / "rwkv-init.pth").touch()  # fine-tuning as RWKV-LM describes it: one's own model under this name
    assert parse(line, tmp_path).model.load_model == str(tmp_path / "rwkv-init.pth")
    assert f"is read as --load_model {tmp_path}/rwkv-init.pth" in capsys.readouterr().out
    (tmp_path / "rwkv-3.pth").touch()
    with pytest.raises(UserError, match="goes on from the newest rwkv-N.pth .*add --resume 1"):
        parse(line, tmp_path)


def test_load_model_0_is_no_name_of_a_file_without_a_stage_either(tmp_path, capsys):
    (tmp_path / "rwkv-init.pth").touch()
    config = parse("--load_model 0 --data_file d", tmp_path)
    assert config.model.load_model == str(tmp_path / "rwkv-init.pth") and config.adapter.kind == "none"
