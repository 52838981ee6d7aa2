"""A flag of another trainer, typed from habit, is an error that names the flag of the same meaning."""

import pytest

from rwkv_bone.config import flags
from rwkv_bone.config.field_flags import MERGE_FLAGS, TRAIN_FLAGS
from rwkv_bone.config.other_names import NOT_HERE, OTHER_NAMES, intended_flag
from rwkv_bone.conversion.flags import ConvertConfig
from rwkv_bone.data.prepare import PrepareConfig
from rwkv_bone.errors import UserError
from rwkv_bone.hf.flags import IGNORED_FLAGS, HfConfig


def error_of(parse, *words) -> str:
    with pytest.raises(UserError) as error:
        parse([*words])
    return str(error.value)


def train_hf(argv):
    return flags.parse_section("train_hf.py", "", HfConfig, argv, IGNORED_FLAGS)


def flags_of(section) -> set[str]:
    return {f"--{name}" for name in section.__dataclass_fields__}


TRAIN = set().union(*map(flags_of, flags.SECTIONS.values()))
PROGRAMS = {
    "train.py": (TRAIN, TRAIN_FLAGS),
    "merge.py": (flags_of(flags.MergeConfig), MERGE_FLAGS),
    "train_hf.py": (flags_of(HfConfig), IGNORED_FLAGS),
    "convert": (flags_of(ConvertConfig), ()),
    "prepare": (flags_of(PrepareConfig), ()),
}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--lr", "lr_init"),
        ("--learning_rate", "lr_init"),
        ("--batch_size", "micro_bsz"),
        ("--per_device_train_batch_size", "micro_bsz"),
        ("--epochs", "epoch_count"),
        ("--num_train_epochs", "epoch_count"),
        ("--max_length", "ctx_len"),
        ("--max_seq_length", "ctx_len"),
        ("--model_max_length", "ctx_len"),
        ("--block_size", "ctx_len"),
        ("--gradient_accumulation_steps", "accumulate_grad_batches"),
        ("--output_dir", "proj_dir"),
        ("--model_name_or_path", "load_model"),
        ("--seed", "random_seed"),
        ("--gradient_checkpointing", "grad_cp"),
        ("--lora_rank", "lora_r"),
        ("--rank", "bone_r"),
        ("--r", "bone_r"),
        ("--lora_target_modules", "targets"),
        ("--load_in_4bit", "quant"),
        ("--resume_from_checkpoint", "resume"),
        ("--warmup_ratio", "warmup_steps"),
        ("--max_grad_norm", "grad_clip"),
        ("--val_set_size", "eval_split"),
        ("--lr-init", "lr_init"),
        ("--Learning-Rate", "lr_init"),
        ("--train.max_seq_length", "ctx_len"),
        ("optimizer.lr=2e-5", "lr_init"),
        ("--dpo_beta", "beta"),
        ("--pref_beta", "beta"),
        ("--orpo_alpha", "beta"),
        ("--simpo_gamma", "gamma"),
        ("--rpo_alpha", "sft_weight"),
        ("--pref_ftx", "sft_weight"),
        ("--pref_loss", "task"),
        ("--loss_type", "task"),
        ("--kto_rejected_weight", "undesirable_weight"),
        ("--rlhf_train_file", "data_file"),
        ("--betas", "beta1"),
    ],
)
def test_names_of_other_trainers_are_answered_with_the_flag_of_train(typed, meant):
    needed = ["--data_file", "rows.jsonl", "--load_model", "base.pth"]
    name = typed.split("=")[0]
    assert f"{name} is not a flag of train.py; did you mean --{meant}?" in error_of(
        flags.parse_train, *needed, typed, "8"
    )


@pytest.mark.parametrize(
    "typed, told",
    [
        ("--dpo", "it is --task dpo"),
        ("--train.ref-model=x", "no second model is loaded"),
        ("--max_prompt_length", "--ctx_len bounds prompt and answer together"),
        ("--gamma_beta_ratio", "--gamma is that ratio times --beta"),
    ],
)
def test_what_is_no_setting_here_is_answered_with_what_is_so_instead(typed, told):
    needed = ["--data_file", "rows.jsonl", "--load_model", "base.pth"]
    assert f"is not a flag of train.py; {told}" in error_of(flags.parse_train, *needed, typed, "8")
    # Of another program it is a word like any other.
    assert told not in error_of(flags.parse_merge, typed, "8")


def test_what_is_no_setting_here_is_neither_a_setting_nor_another_name():
    told = {name for names in NOT_HERE.values() for name in names}
    assert not told & {flag.removeprefix("--") for known, _ in PROGRAMS.values() for flag in known}
    assert not told & {name for names in OTHER_NAMES.values() for name in names.split()}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--lr_init", "learning_rate"),
        ("--load_model", "model_name_or_path"),
        ("--data_file", "data_path"),
        ("--eval_data", "eval_path"),
        ("--sft_field", "dataset_field"),
        ("--proj_dir", "output_dir"),
        ("--ctx_len", "model_max_length"),
        ("--micro_bsz", "per_device_train_batch_size"),
        ("--epoch_count", "num_train_epochs"),
        ("--accumulate_grad_batches", "gradient_accumulation_steps"),
        ("--grad_cp", "gradient_checkpointing"),
        ("--random_seed", "seed"),
        ("--bone_mode", "mode"),
        ("--targets", "target_modules"),
        ("--strategy", "deepspeed"),
        ("--lora_r", "bone_r"),
        ("--batch_size", "per_device_train_batch_size"),
    ],
)
def test_names_of_train_are_answered_with_the_flag_of_train_hf(typed, meant):
    assert f"{typed} is not a flag of train_hf.py; did you mean --{meant}?" in error_of(train_hf, typed, "8")


def test_merge_and_convert_know_their_own_words_for_the_model_and_the_adapter():
    assert "did you mean --base_model?" in error_of(flags.parse_merge, "--model_name_or_path", "base.pth")
    assert "did you mean --peft_checkpoint?" in error_of(flags.parse_merge, "--adapter_path", "a.pth")
    assert "did you mean --output?" in error_of(flags.parse_merge, "--output_dir", "merged")
    assert intended_flag("--peft_checkpoint", flags_of(ConvertConfig)) == "--adapter"


def test_a_name_of_another_trainer_wins_over_a_flag_that_is_spelt_alike():
    # By its letters --eval_split_size is near --eval_split, and --max_steps near --save_steps.
    assert intended_flag("--max_steps", TRAIN) == "--epoch_steps"
    assert intended_flag("--eval_splits", TRAIN) == "--eval_split"
    assert intended_flag("--qqqqqqq", TRAIN) is None


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_other_name_is_answered_with_a_flag_of_its_row(program):
    known, hidden = PROGRAMS[program]
    for ours, others in OTHER_NAMES.items():
        here = [f"--{name}" for name in ours.split() if f"--{name}" in known]
        for name in others.split():
            if f"--{name}" not in known and name not in hidden and here:
                assert intended_flag(f"--{name}", known) == here[0]


def test_no_name_is_in_two_rows_and_every_row_has_flags_that_exist():
    others = [name for names in OTHER_NAMES.values() for name in names.split()]
    assert len(others) == len(set(others))
    everywhere = set().union(*(known for known, _ in PROGRAMS.values()))
    assert {f"--{name}" for ours in OTHER_NAMES for name in ours.split()} <= everywhere


def test_no_flag_of_rwkv_peft_that_is_translated_is_called_a_mistake():
    # In a row without a flag of train.py, such as num_workers of prepare, it may stand.
    rows = [others for ours, others in OTHER_NAMES.items() if {f"--{name}" for name in ours.split()} & TRAIN]
    assert not {name for others in rows for name in others.split()} & set(TRAIN_FLAGS)
