"""Warnings while a run goes on: each once, on the terminal and in warnings.jsonl."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rwkv_bone.config.checksum import is_intact
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.rates import unusual_rate
from rwkv_bone.training.warn import WarnOnce, kept_warnings

RISING = np.concatenate([np.linspace(2, 1, 100), np.linspace(1, 3, 100)])


def config(*words):
    return parse_train(["--load_model", "m.pth", "--data_file", "d", *words])


def play(path, losses=RISING, first=0, kept=(), main=True, trained=50, report=None, words=(), measure=None, more=()):
    """Lead the callback through the steps after `first`; returns it and what was said."""
    said = []
    step_log = SimpleNamespace(records=[])
    warn = WarnOnce(path, step_log, config(*words), width=2560, vocab_size=256, kept=kept, report=report or said.append)
    dataset = SimpleNamespace(trained_counts=np.array([trained]), lengths=np.array([101]), __len__=lambda self: 1)
    dataset = type("Dataset", (), vars(dataset))()
    module = SimpleNamespace(
        first_step=first,
        total_steps=len(losses),
        steps_left=len(losses) - first,
        plan=SimpleNamespace(dataset=dataset),
        window_finished=lambda: True,
    )
    trainer = SimpleNamespace(is_global_zero=main)
    warn.on_fit_start(trainer, module)
    for i, loss in enumerate(losses, start=1):
        line = {"step": i, "loss": loss, "grad_norm": 1.0, "seconds": 0.1, "tokens_per_s": 1e4, "data_wait_ms": 0}
        step_log.records.append(line | (more[i - 1] if more else {}))
        if i > first:
            warn.on_train_batch_end(trainer, module, None, None, i)
            if measure and i % 50 == 0:
                warn.measured(measure(i))
    return warn, said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_warning_comes_once_with_its_remedy_and_into_the_file(tmp_path):
    path = tmp_path / "warnings.jsonl"
    _, said = play(path)
    assert len(said) == 1
    assert (
        said[0].startswith("warning: the loss rises: it is ") and "; the learning rate is probably too high" in said[0]
    )
    (line,) = lines(path)
    assert is_intact(line, ()) and line["kind"] == "loss rises" and line["step"] % 20 == 0
    assert said[0] == f"warning: {line['warning']}; {line['remedy']}"


def test_preference_tuning_has_rules_of_its_own_and_none_of_a_loss_per_token(tmp_path):
    figures = {"reward_chosen": -0.6, "reward_rejected": -0.9, "reward_margin": 0.3, "units": 8, "logp_chosen": -1.0}
    figures |= {"reward_accuracy": None, "kl": 0.0}

    def measure(step):
        preference = figures | {"divergence": 0.9}
        sets = {"mine": {"loss": 0.45, "samples": 40, "preference": preference}}
        return {"step": step, "main": "mine", "general": None, "sets": sets}

    steps = np.random.default_rng(0).normal(0, 0.02, 80)
    losses, more = 6 + steps, [figures | {"reward_chosen": -0.6 + d, "reward_rejected": -0.9 - d} for d in steps]
    kto = ("--task", "kto", "--eval_data", "e")
    play(tmp_path / "kto.jsonl", losses, trained=4, words=kto, measure=measure, more=more)
    found = [(line["kind"], line["step"]) for line in lines(tmp_path / "kto.jsonl")]
    assert found == [("far from the start", 50), ("rewards of one sign", 60)], "a large loss, or a small share, is told"
    play(tmp_path / "sft.jsonl", losses, trained=4, more=more)
    assert [line["kind"] for line in lines(tmp_path / "sft.jsonl")] == ["masked", "loss of guessing"]


def test_a_good_run_leaves_no_file(tmp_path):
    _, said = play(tmp_path / "warnings.jsonl", losses=np.linspace(2, 1, 200))
    assert said == [] and not (tmp_path / "warnings.jsonl").exists()


def test_what_can_be_told_before_the_first_step_is_told_then(tmp_path):
    path = tmp_path / "warnings.jsonl"
    _, said = play(path, losses=[2.0], trained=4, words=("--lr_init", "0.01", "--lr_final", "0"))
    assert [line.split(":")[1].split(" ")[1] for line in said] == ["--lr_init", "only"]
    assert [line["step"] for line in lines(path)] == [0, 0]


def test_other_processes_of_the_run_say_nothing(tmp_path):
    _, said = play(tmp_path / "warnings.jsonl", main=False, trained=4)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_a_continued_run_repeats_no_warning_and_drops_those_of_the_steps_it_repeats(tmp_path):
    path = tmp_path / "warnings.jsonl"
    _, said = play(path, trained=4)
    assert [line["kind"] for line in lines(path)] == ["masked", "loss rises"]
    step = lines(path)[1]["step"]
    kept = kept_warnings(path, step)
    assert [line["kind"] for line in kept] == ["masked", "loss rises"]
    _, again = play(path, first=step, kept=kept, trained=4)
    assert again == [] and len(lines(path)) == 2
    # The state is older than the second warning, whose steps are taken again.
    kept = kept_warnings(path, step - 1)
    _, again = play(path, first=step - 1, kept=kept, trained=4)
    assert again == said[1:] and [line["kind"] for line in lines(path)] == ["masked", "loss rises"]
    _, again = play(path, losses=RISING[:100], first=50, kept=kept_warnings(path, 50), trained=4)
    assert again == [] and [line["kind"] for line in lines(path)] == ["masked"]
    play(path)
    play(path, losses=RISING[:100], first=50)
    assert lines(path) == []


def test_damaged_lines_are_as_good_as_missing(tmp_path):
    path = tmp_path / "warnings.jsonl"
    play(path, trained=4)
    good = path.read_text().splitlines()
    path.write_text("\n".join([good[0].replace("4.0%", "5.0%"), "[1]", "nonsense", good[1][:50], good[1]]))
    assert [line["kind"] for line in kept_warnings(path, 1000)] == ["loss rises"]
    assert kept_warnings(tmp_path / "none", 5) == []


def test_measurements_are_watched_too(tmp_path):
    def measure(step):
        losses = {50: 1.5, 100: 1.6, 150: 1.7, 200: 1.8}
        return {"step": step, "sets": {"mine": {"loss": losses[step]}}, "main": "mine", "general": None}

    _, said = play(tmp_path / "w", losses=np.linspace(2, 1, 200), measure=measure)
    assert len(said) == 1 and "the held-out loss rises while the training loss falls" in said[0]
    assert "--early_stop" in said[0] and "--best" in said[0]


def test_a_file_that_cannot_be_written_costs_no_warning(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = play(tmp_path / "file" / "warnings.jsonl", trained=4)
    assert sum("the loss rises" in line for line in said) == 1
    assert sum("of the tokens in the data are trained" in line for line in said) == 1


@pytest.mark.parametrize(
    "peft, width, rate, said",
    [
        # As measured or published: docs/measured.md, RWKV-PEFT's scripts, the papers named in config/rates.py.
        ("bone", 128, 3e-3, ""),
        ("bone", 128, 1e-3, ""),
        ("bone", 2560, 2e-5, ""),
        ("bone", 4096, 1e-4, ""),
        ("lora", 4096, 2e-4, ""),
        ("lora", 4096, 5e-4, ""),
        ("pissa", 4096, 2e-5, ""),
        ("none", 128, 1e-3, ""),
        ("none", 4096, 1e-5, ""),
        ("none", 4096, 1e-6, ""),
        ("state", 2560, 1.0, ""),
        ("state", 2560, 0.01, ""),
        # A tiny model's rate on a large one, a large one's on a tiny one, an adapter's for a state.
        ("bone", 2560, 3e-3, "large"),
        ("none", 2560, 3e-3, "large"),
        ("bone", 128, 1e-5, "small"),
        ("state", 2560, 2e-5, "small"),
    ],
)
def test_rates_that_are_known_to_work_are_not_doubted_and_others_are(peft, width, rate, said):
    words = ("--peft", peft, "--lr_init", str(rate), "--lr_final", "0")
    sentence = unusual_rate(config(*words), width)
    assert (f"unusually {said} for --peft {peft} on a model of width {width:}" in sentence) if said else not sentence
