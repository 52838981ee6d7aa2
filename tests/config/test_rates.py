"""config/rates.py: the rates of --lr_init auto and --lr_final auto, by hand."""

import pytest

from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.rates import RULES, auto_rate, continued, decided, said, usual_rates
from rwkv_bone.errors import UserError


def parse(*words):
    return parse_train(["--load_model", "m", "--data_file", "d", *words])


def settings(*words):
    config = parse(*words)
    return config.optim, config.adapter


@pytest.mark.parametrize(
    ("words", "ratio"),
    [
        (("--bone_r", "32"), 1.0),
        (("--bone_r", "128"), 0.5),  # the step of the weights' effect grows with the root of r
        (("--peft", "lora", "--lora_r", "16", "--lora_alpha", "32"), 1.0),
        (("--peft", "lora", "--lora_r", "64", "--lora_alpha", "64"), 0.616),  # 2^-0.7
        (("--peft", "lora", "--lora_r", "64"), 0.616),
        (("--peft", "lora", "--lora_r", "16", "--lora_alpha", "16", "--lora_rs", "1"), 0.616),
        (("--peft", "lora", "--lora_r", "32", "--lora_plus", "16"), 0.25),
        (("--peft", "pissa", "--lora_r", "64"), 1.0),
    ],
)
@pytest.mark.parametrize("width", [128, 2560])
def test_a_rate_falls_with_what_its_step_grows_with(words, ratio, width):
    adapter = settings(*words)[1]
    rule = RULES[adapter.peft]
    expected = ratio * rule.rate * (width / 128) ** rule.by_width
    assert auto_rate(adapter, width) == pytest.approx(expected, rel=0.05)  # two digits


@pytest.mark.parametrize(
    ("words", "rate"),
    [  # 20^1.28 is 46.3, 20^0.78 is 10.4, 20^0.67 is 7.44
        (("--bone_r", "64"), 4.6e-5),  # as docs/adapters.md says
        (("--bone_r", "32", "--bone_mode", "bat"), 6.5e-5),
        (("--peft", "lora", "--lora_r", "32"), 2.9e-4),
        (("--peft", "lora", "--lora_r", "64", "--lora_rs", "1"), 4.2e-5),  # 64 x 8 is 16 times 32, and 16^0.7 is 6.96
        (("--peft", "pissa"), 6.5e-5),
        (("--peft", "none"), 9.7e-5),
        (("--peft", "state"), 0.1),
    ],
)
def test_the_rates_of_a_model_twenty_times_as_wide_as_the_rules(words, rate):
    assert auto_rate(settings(*words)[1], 2560) == rate
    if "none" in words:
        assert auto_rate(settings(*words)[1], 2560, from_scratch=True) == 2.7e-4


def test_numbers_that_are_given_stay_and_the_end_is_a_thirtieth():
    optim, adapter = settings("--bone_r", "32")
    found = decided(optim, adapter, 128)
    assert (found.lr_init, found.lr_final) == (3e-3, 1e-4)
    optim, _ = settings("--lr_init", "6e-5")
    found = decided(optim, adapter, 4096)
    assert (found.lr_init, found.lr_final) == (6e-5, 2e-6)
    optim, _ = settings("--lr_init", "0", "--lr_final", "1e-6")
    assert decided(optim, adapter, 4096) == optim
    assert decided(settings("--lr_init", "0")[0], adapter, 4096).lr_final == 0
    optim, adapter = settings("--peft", "state")
    found = decided(optim, adapter, 4096)
    assert (found.lr_init, found.lr_final) == (0.1, 0.01)


def test_no_weight_moves_faster_on_a_toy_than_models_that_were_tried_liked():
    assert auto_rate(settings("--bone_r", "4")[1], 16) == 0.01
    assert auto_rate(settings("--peft", "state")[1], 16) == 0.1


@pytest.mark.parametrize("width", [32, 128, 768, 2560, 4096])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--bone_mode", "bat"),
        ("--bone_mode", "bat-col"),
        ("--peft", "lora"),
        ("--peft", "lora", "--lora_r", "64", "--lora_alpha", "128"),
        ("--peft", "lora", "--lora_rs", "1"),
        ("--peft", "pissa"),
        ("--peft", "none"),
        ("--peft", "state"),
    ],
)
def test_every_kind_has_a_rate_of_those_that_are_known_to_work(words, width):
    adapter = settings(*words)[1]
    low, high = usual_rates(adapter.peft, width)
    assert low <= auto_rate(adapter, width) <= high


def test_from_scratch_has_its_own_rule():
    adapter = settings("--peft", "none")[1]
    assert auto_rate(adapter, 768, from_scratch=True) == pytest.approx(6e-4, rel=0.1)  # RWKV-LM's
    assert auto_rate(adapter, 768) < 3e-4


def test_a_continued_run_keeps_the_rates_that_it_began_with():
    began = settings("--lr_init", "2e-4", "--lr_final", "2e-5")[0]
    assert continued(settings()[0], began) == began
    found = continued(settings("--lr_init", "1e-5")[0], began)
    assert (found.lr_init, found.lr_final) == (1e-5, 2e-5)


def test_what_auto_became_is_said_with_its_reason_and_nothing_where_numbers_were_given():
    optim, adapter = settings("--bone_r", "32")
    (line,) = said(optim, decided(optim, adapter, 128), adapter, 128, False)
    assert line.startswith("--lr_init auto is 0.003, --lr_final auto is 0.0001: ")
    assert "--peft bone" in line and "width 128" in line and "bone_r 32" in line
    (line,) = said(optim, decided(optim, adapter, 128), adapter, 128, True)
    assert line.endswith(": as the run began")
    optim, adapter = settings("--lr_init", "3e-3")
    assert list(said(optim, decided(optim, adapter, 128), adapter, 128, False)) == [
        "--lr_final auto is 0.0001: a thirtieth of lr_init"
    ]
    optim, adapter = settings("--bone_r", "32", "--lr_final", "1e-2")
    (line,) = said(optim, decided(optim, adapter, 128), adapter, 128, False)
    assert line.startswith("--lr_init auto is 0.003: ") and "--lr_final 0.01 is above it" in line
    optim, adapter = settings("--lr_init", "3e-3", "--lr_schedule", "constant")
    assert not list(said(optim, decided(optim, adapter, 128), adapter, 128, False))
    optim, adapter = settings("--lr_init", "3e-3", "--lr_final", "0")
    assert not list(said(optim, optim, adapter, 128, False))


def test_auto_is_a_word_everywhere_and_its_number_is_none(capsys):
    assert parse("--lr_init", "auto").optim == parse().optim
    with pytest.raises(UserError, match="--lr_init: expected a number or auto, got '-1'"):
        parse("--lr_init", "-1")
    parse("--lr_schedule", "constant", "--lr_final", "auto")  # asks for nothing
    parse("--lr_final", "1e-6")  # nor does it rise to that
    parse("--lr_schedule", "exp")
    parse("--lr_final", "1e-6")
    with pytest.raises(UserError, match="--lr_schedule exp needs"):
        parse("--lr_schedule", "exp", "--lr_init", "0")
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("task", "share"), [("dpo", 0.1), ("kto", 0.1), ("simpo", 0.1), ("orpo", 0.5)])
@pytest.mark.parametrize(
    "words", [(), ("--bone_r", "256"), ("--peft", "lora"), ("--peft", "none"), ("--peft", "state")]
)
def test_preference_tasks_take_a_share_of_the_rate_of_fine_tuning_and_say_so(task, share, words):
    asked, adapter = settings(*words)
    rate = auto_rate(adapter, 2560, task=task)
    assert rate == pytest.approx(share * auto_rate(adapter, 2560), rel=0.05)  # two digits
    low, high = usual_rates(adapter.peft, 2560, task=task)
    assert low <= rate <= high
    optim = decided(asked, adapter, 2560, task=task)
    assert optim.lr_init == rate
    (line,) = said(asked, optim, adapter, 2560, False, task)
    assert line.endswith(f", times {share} for --task {task}")
    assert "--task" not in next(said(asked, decided(asked, adapter, 2560), adapter, 2560, False))


def test_published_rates_of_preference_tuning_are_usual_ones():
    """A 7B model has a width of 4096."""
    for task, rate in (("dpo", 5e-7), ("kto", 5e-7), ("simpo", 3e-7), ("orpo", 5e-6), ("orpo", 8e-6)):
        low, high = usual_rates("none", 4096, task=task)
        assert low <= rate <= high
