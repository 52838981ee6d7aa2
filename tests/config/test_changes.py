"""Which settings of a run may change on purpose, and what is said of the others, before anything is read."""

import pytest

from rwkv_bone.config import changes
from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError

NEEDED = ["--load_model", "m.pth", "--data_file", "d"]


def parse(*names):
    return parse_train([*NEEDED, "--resume_with", *names]).run.resume_with


@pytest.mark.parametrize(
    "name, reason",
    [
        ("peft", "decides what is trained"),
        ("bone_r", "decides what is trained"),
        ("targets", "decides what is trained"),
        ("quant", "the adapter has learnt to go with"),
        ("bptt_chunks", "the adapter has learnt to go with"),
        ("load_model", "belongs to that very base model"),
        ("n_layer", "belongs to that very base model"),
        ("micro_bsz", "may differ without being named, as long as an optimiser step has the same samples"),
        ("random_seed", "the order of the data follows from it"),
        ("template", "decides how rows become samples"),
        ("ctx_len", "decides how rows become samples"),
        ("eval_split", "decides how rows become samples"),
        ("task", "decides how rows become samples"),
        ("reference", "the log-probabilities that its answers are compared with"),
    ],
)
def test_what_cannot_change_in_a_run_is_refused_with_the_reason(name, reason):
    with pytest.raises(UserError, match=f"^--resume_with {name}: .*{reason}"):
        parse("lr_init", name)


@pytest.mark.parametrize(
    "name, hint", [("lr", "; did you mean lr_init?"), ("--lr_init", ""), ("epochs", "; did you mean epoch_count?")]
)
def test_a_name_that_is_no_setting_is_refused(name, hint):
    with pytest.raises(UserError) as refused:
        parse(name) if not name.startswith("-") else changes.check_names([name])
    assert str(refused.value).startswith(f"--resume_with {name}: there is no such setting{hint}")


def test_optimiser_schedule_horizon_and_data_may_change():
    names = ["lr_init", "lr_final", "lr_schedule", "warmup_steps", "weight_decay", "grad_clip", "beta1", "l2wrap"]
    names += ["epoch_count", "epoch_steps", "data_file", "precision", "save_minutes"]
    names += ["beta", "gamma", "label_smoothing", "sft_weight", "desirable_weight", "undesirable_weight"]
    assert parse(*names) == tuple(names)


def test_every_setting_has_one_answer():
    """Free, on purpose, or refused with a reason: none is left out by accident when settings are added."""
    for name in changes.SETTINGS:
        free, named = name in changes.FREE - changes.COMPARED, name in changes.ON_PURPOSE
        try:
            changes.check_names([name])
            allowed = True
        except UserError as error:
            allowed = False
            assert str(error).startswith(f"--resume_with {name}: ")
        assert allowed == (free or named)
