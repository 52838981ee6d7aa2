"""What is told of runs that go wrong, and that nothing is told of runs that go well."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rwkv_bone.training import diagnosis
from rwkv_bone.training.diagnosis import of_data, of_measurements, of_steps, rank_z

# [loss, grad_norm] of each step of runs that went well, each with what it changes of scripts/run_bone.sh: seeds; LoRA;
# one sample a step; an initial state; Bat; every weight; 20 steps.
GOOD = json.loads((Path(__file__).parent / "good_runs.json").read_text())
ABOUT = {"total_steps": 1000, "vocab_size": 256, "grad_clip": 1.0}


def log(losses, norms=None, seconds=0.5, tokens=1000, waits=0.0):
    """Lines of the log. Numbers, or one for each step."""

    def each(values):
        return np.broadcast_to(values, len(losses)).tolist()

    norms = each(1.0 if norms is None else norms)
    columns = zip(losses, norms, each(seconds), each(tokens), each(waits), strict=True)
    return [
        {"step": i, "loss": loss, "grad_norm": norm, "seconds": s, "tokens_per_s": t / s, "data_wait_ms": 1000 * wait}
        for i, (loss, norm, s, t, wait) in enumerate(columns, start=1)
    ]


def told(records, measurements=(), **about):
    """The kinds of what is told of a run, looked at every 20 steps, with the step of the first time."""
    found = {}
    for n in [*range(20, len(records), 20), len(records)]:
        before = [one for one in measurements if one["step"] <= n]
        for advice in of_steps(records[:n], before, **{**ABOUT, "total_steps": len(records), **about}):
            found.setdefault(advice.kind, n)
    return found


def measured(*losses, every=100, before=2.0):
    points = [(0, before), *((every * i, loss) for i, loss in enumerate(losses, start=1))]
    return [{"step": s, "sets": {"heldout": {"loss": loss}}, "main": "heldout", "general": None} for s, loss in points]


def noise(steps, seed, spread=0.3):
    """Factors around 1 with a long tail, as the losses of small batches have."""
    return np.random.default_rng(seed).lognormal(0, spread, steps)


def test_the_rank_test_gives_the_numbers_computed_by_hand():
    # U = 9 of 9 pairs; mean 4.5, variance 9 * 7 / 12.
    assert rank_z([1, 2, 3], [4, 5, 6]) == pytest.approx(4.5 / math.sqrt(5.25))
    # U = 2.5 + 3 + 3; ties 3 * (8 - 2) take 18 / 30 of 7.
    assert rank_z([1, 1, 2], [2, 3, 3]) == pytest.approx(4 / math.sqrt(9 / 12 * 6.4))
    assert rank_z([1, 1], [1, 1]) == 0
    assert rank_z([4, 5, 6], [1, 2, 3]) < 0


@pytest.mark.parametrize("name", GOOD)
def test_nothing_is_told_of_a_run_that_went_well(name):
    losses, norms = zip(*GOOD[name], strict=True)
    assert told(log(losses, norms)) == {}


def test_chance_alone_raises_no_alarm():
    alarms = 0
    for seed in range(60):
        flat = seed % 2
        trend = np.full(600, 2.0) if flat else 1.6 + 0.4 * np.exp(-np.arange(600) / 200)
        norms = noise(600, seed + 1000, 0.8)
        alarms += len(told(log(trend * noise(600, seed), norms)))
    assert alarms == 0


@pytest.mark.parametrize("steps", [1, 20, 59])
def test_nothing_is_told_of_a_run_too_short_to_be_judged(steps):
    assert told(log(np.linspace(1, 5, steps) * noise(steps, 1), np.geomspace(1, 1e6, steps))) == {}


def test_a_loss_that_rises_is_told_soon_and_once_it_is_sure():
    losses = np.concatenate([np.linspace(2, 1, 300), np.linspace(1, 2, 300)]) * noise(600, 2, 0.1)
    step = told(log(losses))["loss rises"]
    assert 360 < step <= 440
    (advice,) = of_steps(log(losses[:step]), **ABOUT)
    assert advice.warning.startswith("the loss rises: it is 1.") and "--lr_init" in advice.remedy


def test_a_loss_that_rises_from_the_first_step_is_told():
    assert told(log(np.linspace(2, 4, 200) * noise(200, 3, 0.1)))["loss rises"] <= 120


def test_a_rise_that_noise_explains_is_not_told():
    losses = np.concatenate([np.full(100, 1.0), np.full(100, 1.1)]) * noise(200, 4, 0.5)
    assert "loss rises" not in told(log(losses))


def test_a_sure_but_small_rise_of_what_was_learnt_is_not_told():
    losses = np.concatenate([np.linspace(2, 0.005, 200), np.full(200, 0.005), np.full(200, 0.02)]) * noise(600, 5, 0.1)
    assert "loss rises" not in told(log(losses))


def test_single_steps_of_a_huge_loss_are_no_rise():
    losses = np.linspace(2, 1, 300) * noise(300, 6, 0.1)
    losses[200::7] *= 4
    assert "loss rises" not in told(log(losses))


def test_skipped_steps_break_no_rule():
    losses = [None if i % 3 == 0 else 2.0 for i in range(200)]
    norms = [None if i % 3 == 0 else 1.0 for i in range(200)]
    records = [
        {**line, "loss": loss, "grad_norm": norm}
        for line, loss, norm in zip(log([2.0] * 200), losses, norms, strict=True)
    ]
    assert set(told(records)) <= {"loss unchanged"}
    assert told([{**line, "loss": None, "grad_norm": None} for line in records]) == {}


def test_a_gradient_that_explodes_is_told():
    norms = np.concatenate([np.full(100, 0.8), np.geomspace(0.8, 800, 60)]) * noise(160, 7)
    assert 120 <= told(log(2.0 * noise(160, 8), norms))["gradient grows"] <= 160


def test_a_gradient_of_infinite_norm_is_told():
    records = log(2.0 * noise(100, 9))
    for line in records[80:]:
        line["grad_norm"] = None
    assert "gradient grows" in told(records)


def test_a_gradient_that_grows_below_the_clipping_is_not_told():
    norms = np.concatenate([np.full(100, 0.01), np.full(60, 0.9)])
    assert "gradient grows" not in told(log(2.0 * noise(160, 10), norms))
    assert "gradient grows" in told(log(2.0 * noise(160, 10), norms), grad_clip=0.1)


def test_the_loss_of_guessing_is_told_of_a_base_and_later_of_a_model_from_scratch():
    losses = math.log(256) * noise(310, 11, 0.02)
    assert told(log(losses))["loss of guessing"] == 60
    assert told(log(losses), from_scratch=True)["loss of guessing"] == 300
    assert "loss of guessing" not in told(log(losses), vocab_size=65536)


def test_a_loss_that_does_not_change_is_told_where_noise_cannot_hide_a_change():
    still = 2.0 * noise(400, 12, 0.02)
    # Not before a third of the run.
    ((kind, step),) = told(log(still)).items()
    assert kind == "loss unchanged" and 133 < step <= 160
    assert told(log(2.0 * noise(400, 12, 0.5))) == {}
    assert told(log(still - np.linspace(0, 0.1, 400))) == {}
    # The same rows, measured each time, show what the noise of the steps hides.
    assert told(log(still), measured(1.98)) == {}
    assert told(log(still), measured(1.999)) == {kind: step}


def test_a_run_that_becomes_slow_for_a_minute_is_told():
    seconds = np.concatenate([np.full(200, 0.5), np.full(130, 1.5)])
    losses = 2.0 * noise(330, 13)
    step = told(log(losses, seconds=seconds))["slower"]
    assert 220 <= step <= 260
    assert "slower" not in told(log(losses, seconds=np.where(np.arange(330) % 10 == 0, 8.0, 0.5)))  # saves
    assert "slower" not in told(log(losses, seconds=np.concatenate([np.full(200, 0.01), np.full(130, 0.1)])))


def test_another_process_of_the_run_may_be_slower():
    seconds = np.concatenate([np.full(200, 0.5), np.full(130, 1.5)])
    assert "slower" not in told(log(2.0 * noise(330, 13), seconds=seconds), process_began=200)


def test_a_run_that_waits_for_its_data_is_told():
    losses = 2.0 * noise(100, 14)
    assert told(log(losses, waits=0.2))["waits for data"] == 40
    assert "waits for data" not in told(log(losses, waits=0.02))
    first = np.where(np.arange(100) < 3, 5.0, 0.0)
    assert "waits for data" not in told(log(losses, waits=first, seconds=first + 0.5))


def kinds(measurements, losses):
    return [(advice.kind, advice.warning) for advice in of_measurements(measurements, log(losses))]


def test_overfitting_is_told_with_the_best_step():
    falling = np.linspace(2, 0.5, 500)
    ((kind, warning),) = kinds(measured(1.5, 1.2, 1.1, 1.15, 1.25), falling)
    assert kind == "overfitting"
    assert warning == (
        "the held-out loss rises while the training loss falls: 1.2500 after step 500, and the lowest was 1.1000 after "
        "step 300"
    )


@pytest.mark.parametrize(
    "losses",
    [(1.5, 1.2, 1.1, 1.15), (1.5, 1.2, 1.1, 1.15, 1.12), (0.01, 0.006, 0.0065, 0.0075), (1.5, 1.2, 1.1), (1.0,)],
)
def test_no_overfitting_is_told_of_one_rise_or_of_a_rise_that_is_small_beside_what_was_learnt(losses):
    assert kinds(measured(*losses), np.linspace(2, 0.5, 500)) == []


def test_a_held_out_loss_that_rises_with_the_training_loss_is_no_overfitting():
    losses = np.concatenate([np.linspace(2, 1, 300), np.linspace(1, 2, 200)])
    assert kinds(measured(1.5, 1.2, 1.1, 1.3, 1.6), losses) == []


def test_a_held_out_loss_that_only_rises_is_told_as_such():
    ((_, warning),) = kinds(measured(2.1, 2.2, 2.3), np.linspace(2, 0.5, 300))
    assert warning.startswith("the held-out loss rises from the start: 2.3000 after step 300, 2.0000 before training")


def test_data_of_which_little_is_trained_is_told():
    (advice,) = of_data(trained=40, tokens=1000)
    assert advice.warning.startswith("only 4.0% of the tokens in the data are trained")
    assert of_data(trained=100, tokens=1000) == [] and of_data(trained=0, tokens=0) == []


def test_looking_back_is_bounded():
    # A run of a million steps is looked at 50,000 times.
    assert diagnosis.HISTORY <= 5000 and diagnosis.window_of(10**6) == diagnosis.LONGEST
