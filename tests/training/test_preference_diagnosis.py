"""What is told of preference tuning that goes wrong, and that nothing is told of runs that go well."""

import numpy as np
import pytest

from rwkv_bone.config import PreferenceConfig
from rwkv_bone.config.preferences import decided
from rwkv_bone.training.diagnosis import of_measurements as overfitting
from rwkv_bone.training.preference_diagnosis import held_out, of_measurements, of_steps


def log(steps, units=8, **figures):
    """Lines of the log; each figure is a number, or one for each step."""
    columns = {name: np.broadcast_to(values, steps).tolist() for name, values in figures.items()}
    return [
        {"step": i + 1, "units": units, **{name: column[i] for name, column in columns.items()}} for i in range(steps)
    ]


def told(records, task="dpo", every=20, total=None, **settings):
    """{kind: the step of the first time} of a run that is looked at every 20 steps."""
    total = total or len(records)
    about = {"task": task, "settings": decided(PreferenceConfig(**settings), task), "total_steps": total}
    found = {}
    for n in range(every, len(records) + 1, every):
        for advice in of_steps(records[:n], **about):
            found.setdefault(advice.kind, n)
    return found


def measured(pairs=200, every=50, **figures):
    """Measurements, the first before training."""
    count = max(len(values) for values in figures.values())
    loss = figures.pop("loss", [0.6] * count)
    return [
        {
            "step": every * i,
            "main": "mine",
            "sets": {
                "mine": {
                    "loss": loss[i],
                    "samples": pairs,
                    "preference": {name: values[i] for name, values in figures.items()},
                }
            },
        }
        for i in range(count)
    ]


def random(seed):
    return np.random.default_rng(seed)


def shares(steps, share, units=8, seed=0):
    """The accuracy of each step: of `units` pairs, each right with this probability."""
    return random(seed).binomial(units, np.broadcast_to(share, steps)) / units


def good_run(steps=300, seed=0):
    """A DPO run as it should be: the margin grows, chosen answers keep their probability, those of noise vary."""
    rng, progress = random(seed), np.arange(steps) / steps
    margin = 2 * (1 - np.exp(-4 * progress)) + rng.normal(0, 0.4, steps)
    return log(
        steps,
        loss=np.log1p(np.exp(-margin)) + rng.normal(0, 0.02, steps),
        reward_accuracy=shares(steps, 0.55 + 0.4 * progress, seed=seed),
        reward_margin=margin,
        reward_chosen=margin / 4 + rng.normal(0, 0.2, steps),
        reward_rejected=-3 * margin / 4 + rng.normal(0, 0.2, steps),
        logp_chosen=-1.2 - 0.04 * progress + rng.normal(0, 0.2, steps),
        logp_rejected=-1.3 - 0.5 * progress + rng.normal(0, 0.2, steps),
    )


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_told_of_runs_that_go_well(seed):
    assert told(good_run(seed=seed)) == {}
    values = {"logp_chosen": [-1.2, -1.2, -1.22, -1.25, -1.25], "divergence": [0, 0.02, 0.1, 0.2, 0.3]}
    rising = {"reward_accuracy": [0.0, 0.6, 0.7, 0.72, 0.71], "reward_margin": [0, 0.2, 0.5, 0.8, 0.79]}
    assert of_measurements(measured(**values, **rising), good_run(seed=seed), task="dpo") == []


def test_chance_alone_raises_no_alarm():
    """Of runs in which nothing changes the one thing to tell is that accuracy is at chance, where the pairs suffice."""
    for seed in range(20):
        rng, steps = random(seed), 300
        noise = {name: rng.normal(0, 0.3, steps) for name in ("logp_chosen", "reward_chosen", "reward_rejected")}
        noise["reward_margin"] = noise["reward_chosen"] - noise["reward_rejected"]
        records = log(steps, loss=0.69 + rng.normal(0, 0.05, steps), reward_accuracy=shares(steps, 0.65), **noise)
        assert told(records) == {}
        flips = rng.normal(0.65, 0.01, 8)  # measured of the same pairs, of which some turn
        held = measured(reward_accuracy=flips, reward_margin=rng.normal(0.5, 0.02, 8), logp_chosen=np.full(8, -1.0))
        assert of_measurements(held, records, task="dpo") == []


@pytest.mark.parametrize("steps", [1, 20, 59])
def test_nothing_is_told_of_a_run_too_short_to_be_judged(steps):
    figures = {"loss": 0.0, "reward_accuracy": 0.5, "reward_margin": 9.0, "logp_chosen": np.linspace(-1, -5, steps)}
    assert told(log(steps, **figures), every=1, total=1000) == {}


def test_chosen_answers_that_become_less_likely_are_told_with_the_remedy_that_acts():
    falling = -1.2 - 0.6 * np.arange(300) / 300 + random(1).normal(0, 0.15, 300)
    assert 60 < told(log(300, logp_chosen=falling))["chosen falls"] <= 200
    for task, words in (("dpo", "--sft_weight 0.2"), ("kto", "--beta"), ("orpo", "a lower --lr_init")):
        (advice,) = of_steps(
            log(300, logp_chosen=falling), task=task, settings=decided(PreferenceConfig(), task), total_steps=300
        )
        assert words in advice.remedy and ("--sft_weight" in advice.remedy) == (task == "dpo")
        assert advice.warning.startswith("the chosen answers become less likely: -1.7")
    # A fall that noise explains, and one that is sure and small.
    assert told(log(60, logp_chosen=np.where(np.arange(60) < 20, -1.0, -1.12) + random(2).normal(0, 0.4, 60))) == {}
    assert told(log(300, logp_chosen=np.linspace(-1, -1.09, 300))) == {}
    assert told(log(300, logp_chosen=np.linspace(-5, -5.4, 300))) == {}, "a twelfth of what they had"


def test_held_out_chosen_answers_that_become_less_likely_twice_in_a_row_are_told():
    (advice,) = of_measurements(measured(logp_chosen=[-1.0, -1.0, -1.15, -1.2]), [], task="dpo")
    assert advice.kind == "chosen falls"
    assert advice.warning == (
        "the chosen answers become less likely on held-out data: -1.200 nats per token, and it was -1.000 at the start"
    )
    assert of_measurements(measured(logp_chosen=[-1.0, -1.15, -1.0, -1.2]), [], task="dpo") == []
    assert of_measurements(measured(logp_chosen=[-1.0, -1.2]), [], task="dpo") == []


def done(steps=120, **changes):
    return log(steps, **{"loss": 0.004, "reward_accuracy": 1.0, "reward_margin": 6.0, **changes})


def test_a_saturated_margin_is_told_while_much_of_the_run_is_left():
    assert told(done(), total=400) == {"margin saturated": 60}
    (advice,) = of_steps(done(), task="dpo", settings=decided(PreferenceConfig(), "dpo"), total_steps=400)
    assert "the loss is 0.0040 over the last 20 steps, and the margin of the rewards 6.00; 280 steps more" in (
        advice.warning
    )
    assert told(done(), total=140, every=120) == {}, "nearly at its end"
    assert told(done(loss=0.02), total=400) == {}
    assert told(done(reward_accuracy=0.98), total=400) == {}
    assert told(log(120, units=4, loss=0.004, reward_accuracy=1.0, reward_margin=6.0), total=400) == {}, "few pairs"


def test_no_margin_is_saturated_where_another_loss_goes_on():
    assert told(done(), total=400, sft_weight=0.1) == {} == told(done(), task="orpo", total=400)
    assert told(done(), total=400, label_smoothing=0.1) == {}
    assert told(done(), task="simpo", total=400) == {"margin saturated": 60}


def test_the_loss_of_kto_is_saturated_beside_its_weights():
    records = done(loss=0.02, reward_accuracy=None, reward_chosen=1.0, reward_rejected=-5.0, kl=0.0)
    assert told(records, task="kto", total=400) == {}
    assert told(records, task="kto", total=400, undesirable_weight=4.0) == {"margin saturated": 60}


def test_accuracy_at_chance_is_told_after_half_of_the_run():
    records = log(400, reward_accuracy=shares(400, 0.5, 32), units=32)
    ((kind, step),) = told(records).items()
    assert kind == "accuracy at chance" and 200 <= step <= 240
    (advice,) = of_steps(records, task="dpo", settings=decided(PreferenceConfig(), "dpo"), total_steps=400)
    assert "are right after 400 steps, and a coin gets 50%" in advice.warning
    # Too few pairs to tell; better than a coin; worse, and rising from less.
    assert told(log(400, reward_accuracy=shares(400, 0.5, 2), units=2)) == {}
    assert told(log(400, reward_accuracy=shares(400, 0.6, 32), units=32)) == {}
    assert told(log(400, reward_accuracy=shares(400, np.linspace(0.2, 0.5, 400), 32), units=32)) == {}
    # At the first step no answer is above the other.
    assert told(log(400, reward_accuracy=[0.0, *shares(399, 0.5, 32)], units=32))


def test_accuracy_that_falls_on_held_out_data_and_not_in_training_is_told():
    training = log(250, reward_accuracy=np.linspace(0.6, 0.9, 250), reward_margin=np.linspace(0, 2, 250))
    held = measured(400, reward_accuracy=[0.0, 0.7, 0.82, 0.7, 0.68, 0.66])
    (advice,) = of_measurements(held, training, task="dpo")
    assert advice.kind == "over-optimised"
    assert advice.warning == (
        "the held-out accuracy falls while that of training does not: 66.0% after step 250, and 82.0% after step 100"
    )
    assert of_measurements(measured(40, reward_accuracy=[0.0, 0.7, 0.82, 0.7, 0.68, 0.66]), training, task="dpo") == []
    assert of_measurements(measured(400, reward_accuracy=[0.0, 0.7, 0.82, 0.7, 0.68, 0.8]), training, task="dpo") == []
    both = log(250, reward_accuracy=np.concatenate([np.linspace(0.6, 0.9, 100), np.linspace(0.9, 0.6, 150)]))
    assert of_measurements(held, both, task="dpo") == [], "training's falls, too"


def test_a_held_out_loss_of_few_pairs_that_rises_a_little_is_no_overfitting():
    training, none = log(250, loss=np.linspace(0.7, 0.3, 250)), {"reward_margin": [0.0] * 5}
    rising = [0.6931, 0.60, 0.60, 0.62, 0.65]
    assert overfitting(measured(40, loss=rising, **none), training) == []
    assert [one.kind for one in overfitting(measured(400, loss=rising, **none), training)] == ["overfitting"]


def test_a_margin_that_falls_on_held_out_data_and_not_in_training_is_told():
    training = log(250, reward_margin=np.linspace(0, 2, 250))
    turned = {"reward_margin": [0.0, 0.5, 1.0, 0.9, 0.7, 0.6]}
    (advice,) = of_measurements(measured(**turned), training, task="simpo")
    assert (
        advice.kind == "over-optimised"
        and "margin falls" in advice.warning
        and "1.000 after step 100" in (advice.warning)
    )
    assert of_measurements(measured(loss=[0.7, 0.6, 0.5, 0.45, 0.44, 0.43], **turned), training, task="simpo") == []
    assert of_measurements(measured(reward_margin=[0.0, 0.5, 1.0, 0.95, 0.9, 0.85]), training, task="simpo") == []
    assert of_measurements(measured(reward_margin=[0.0, 0.5, 1.0, 0.6, 0.7, 0.6]), training, task="simpo") == []


def test_a_model_that_moves_far_for_another_reason_than_its_answers_is_told():
    (advice,) = of_measurements(measured(divergence=[0, 0.7], logp_chosen=[-1.0, -0.95]), [], task="dpo")
    assert advice.kind == "far from the start" and "--beta" in advice.remedy
    assert "a divergence of 0.70 nats per token" in advice.warning and "has changed by +0.05" in advice.warning
    # What makes the answers likelier by so much must move the model by so much.
    assert of_measurements(measured(divergence=[0, 1.7], logp_chosen=[-2.0, -0.3]), [], task="orpo") == []
    assert of_measurements(measured(divergence=[0, 0.4], logp_chosen=[-1.0, -1.0]), [], task="dpo") == []
    assert of_measurements(measured(divergence=[None, None], logp_chosen=[-1.0, -1.0]), [], task="dpo") == []


def labelled(good, bad, kl=0.0, steps=120, spread=0.2):
    rewards = {"reward_chosen": good, "reward_rejected": bad}
    noisy = {name: value + random(i).normal(0, spread, steps) for i, (name, value) in enumerate(rewards.items())}
    return log(steps, loss=0.45, reward_accuracy=None, reward_margin=good - bad, kl=kl, **noisy)


def test_rewards_of_kto_that_are_pushed_one_way_are_told_with_the_weight_that_balances():
    assert told(labelled(-0.6, -0.9), task="kto") == {"rewards of one sign": 60}
    for good, bad, words in ((-0.6, -0.9, "larger --desirable_weight"), (0.9, 0.6, "larger --undesirable_weight")):
        (advice,) = of_steps(
            labelled(good, bad), task="kto", settings=decided(PreferenceConfig(), "kto"), total_steps=120
        )
        assert words in advice.remedy and f"{'down' if good < 0 else 'up'}, rather than apart" in advice.warning
    assert told(labelled(-0.3, -0.9), task="kto") == {}, "more apart than pushed"
    assert told(labelled(-0.6, 0.9), task="kto") == {} == told(labelled(-0.05, -0.08), task="kto")
    assert told(labelled(-0.6, -0.9, spread=3.0), task="kto") == {}, "noise"
    assert told(labelled(-0.6, -0.9), task="dpo") == {}


def test_an_estimate_of_kto_that_explodes_is_told():
    assert told(labelled(2.0, -2.0, kl=40.0), task="kto") == {"kl explodes": 60}
    assert told(labelled(2.0, -2.0, kl=40.0), task="kto", beta=0.01) == {}
    assert told(labelled(2.0, -2.0, kl=np.where(np.arange(120) % 20 == 0, 500.0, 5.0)), task="kto") == {}


def test_lines_without_figures_tell_nothing():
    nothing = dict.fromkeys(
        ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "kl")
    )
    for task in ("dpo", "orpo", "simpo", "kto"):
        assert told(log(200, **nothing), task=task) == {}
    assert held_out([{"step": 0, "main": "a", "sets": {"a": {"loss": 1.0}}}], "divergence") == []
