"""The loss of a micro-batch and its figures, against sums that are written out by hand."""

import math

import pytest
import torch

from rwkv_bone.config import PreferenceConfig
from rwkv_bone.data.sampler import Answers
from rwkv_bone.preferences.objective import FIGURES, SUMS, Objective, figures, summed

# -log p of labelled tokens: two pairs (chosen of 2 and 1 tokens, rejected of 1 and 3), or four labelled answers.
NLL = (0.5, 1.5, 3.0, 0.25, 2.0, 1.0, 0.5)
SEQUENCE = (0, 0, 1, 2, 3, 3, 3)
LOGP, TOKENS = [-2.0, -3.0, -0.25, -3.5], [2, 1, 1, 3]
REFERENCE = [[-2.5, -2.0], [-1.0, -3.0]]
GAINS = [[0.5, -1.0], [0.75, -0.5]]  # LOGP - REFERENCE


def answers(members, good=None):
    labels = None if good is None else torch.tensor(good)
    return Answers(torch.tensor(SEQUENCE), torch.arange(4 // members), members, 4 // members, labels)


def found(task, config, members=2, good=None, reference=None, kl=None):
    nll = torch.tensor(NLL, requires_grad=True)
    reference = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    kl = None if kl is None else torch.tensor(kl, dtype=torch.float64)
    outcome = Objective(PreferenceConfig(**config), task)(nll, answers(members, good), reference, kl)
    assert outcome.loss.dtype == torch.float32 and outcome.sums.dtype == torch.float64
    assert outcome.sums.shape == (len(SUMS),) and not outcome.sums.requires_grad
    outcome.loss.backward()
    return outcome.loss.item(), nll.grad, figures(outcome.sums.tolist())


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_and_the_chosen_answers_own_loss():
    loss, gradient, shown = found("dpo", {"beta": 0.5, "sft_weight": 0.1}, reference=REFERENCE)
    margins = [0.5 * (chosen - rejected) for chosen, rejected in GAINS]
    own = [(0.5 + 1.5) / 2, 0.25]
    assert loss == pytest.approx(sum(map(minus_log_sigmoid, margins)) + 0.1 * sum(own))
    # d loss / d nll: beta s(-margin) of each token of the chosen answer, minus that of the rejected one.
    first, second = (0.5 * sigmoid(-margin) for margin in margins)
    chosen = [first + 0.1 / 2, first + 0.1 / 2, -first, second + 0.1]
    assert gradient.tolist() == pytest.approx([*chosen, -second, -second, -second])
    assert shown == pytest.approx(
        {
            "reward_chosen": 0.5 * (0.5 + 0.75) / 2,
            "reward_rejected": 0.5 * (-1.0 - 0.5) / 2,
            "reward_margin": 0.5 * (1.5 + 1.25) / 2,
            "reward_accuracy": 1.0,
            "logp_chosen": -2.25 / 3,
            "logp_rejected": -6.5 / 4,
            "nll": sum(own) / 2,
            "kl": None,
        }
    )
    assert list(shown) == list(FIGURES)


def test_simpo_smooths_and_wants_a_margin_of_means():
    loss, _, shown = found("simpo", {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.25})
    margins = [2 * (-1.0 + 3.0), 2 * (-0.25 + 3.5 / 3)]
    expected = [0.75 * minus_log_sigmoid(m - 0.5) + 0.25 * minus_log_sigmoid(0.5 - m) for m in margins]
    assert loss == pytest.approx(sum(expected))
    assert shown["reward_margin"] == pytest.approx(sum(margins) / 2) and shown["nll"] is None and shown["kl"] is None


def test_pairs_whose_answers_are_equally_good_have_no_part_in_the_accuracy():
    """As all are at the first step of dpo: neither 0 % nor 50 % of them are right."""
    *_, shown = found("dpo", {}, reference=[[-2.0, -3.0], [-0.25, -3.5]])
    assert shown["reward_accuracy"] is None and shown["reward_margin"] == 0
    *_, shown = found("dpo", {}, reference=[[-2.0, -3.0], [-0.5, -3.5]])
    assert shown["reward_accuracy"] == 1
    *_, shown = found("dpo", {}, reference=[[-2.0, -3.0], [-0.125, -3.5]])
    assert shown["reward_accuracy"] == 0


def test_orpo_is_odds_and_by_default_the_chosen_answers_own_loss():
    loss, _, shown = found("orpo", {})

    def odds(mean):
        return math.exp(mean) / (1 - math.exp(mean))

    ratios = [odds(-1.0) / odds(-3.0), odds(-0.25) / odds(-3.5 / 3)]
    assert loss == pytest.approx(sum(0.1 * math.log(1 + 1 / ratio) for ratio in ratios) + 1.0 + 0.25)
    assert shown["nll"] == pytest.approx((1.0 + 0.25) / 2)
    assert shown["reward_chosen"] == pytest.approx(0.1 * (-1.0 - 0.25) / 2)


def test_kto_counts_good_and_bad_answers_apart():
    good, reference = [True, False, True, True], [[-2.5], [-2.0], [-1.0], [-3.0]]
    config = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 2.0}
    loss, _, shown = found("kto", config, 1, good, reference, kl=0.2)
    values = [1.5 * sigmoid(-0.5 * (gain - 0.2)) for gain in (0.5, 0.75, -0.5)]
    assert loss == pytest.approx(sum(values) + 2.0 * sigmoid(-0.5 * (0.2 + 1.0)))
    assert shown == pytest.approx(
        {
            "reward_chosen": 0.5 * (0.5 + 0.75 - 0.5) / 3,
            "reward_rejected": 0.5 * -1.0,
            "reward_margin": 0.5 * 0.75 / 3 + 0.5,
            "reward_accuracy": None,
            "logp_chosen": (-2.0 - 0.25 - 3.5) / 6,
            "logp_rejected": -3.0,
            "nll": None,
            "kl": 0.2,
        }
    )


def test_figures_of_sums_of_several_forward_passes_are_those_of_all_units():
    """The second has answers of one label alone, and the third none."""
    objective, kl = Objective(PreferenceConfig(), "kto"), torch.tensor(0.25, dtype=torch.float64)

    def sums(units, nll, good):
        part = Answers(torch.arange(len(nll)), torch.tensor(units), 1, 3, torch.tensor(good, dtype=torch.bool))
        return objective(torch.tensor(nll), part, torch.zeros(len(units), 1, dtype=torch.float64), kl).sums

    parts = [sums([0, 1], [1.0, 2.0], [True, False]), sums([2], [4.0], [True]), sums([], [], [])]
    assert figures(parts[1].tolist())["reward_rejected"] is None
    together, whole = torch.stack(parts).sum(0).tolist(), sums([0, 1, 2], [1.0, 2.0, 4.0], [True, False, True]).tolist()
    assert together == pytest.approx(whole) and figures(together)["logp_chosen"] == pytest.approx(-2.5)
    assert figures(together)["kl"] == pytest.approx(0.25)


def test_a_forward_pass_without_units_has_a_loss_of_0_with_a_gradient():
    """Where another rank has one unit more; at ZeRO stage 3 every rank must go back through the model."""
    nll = torch.zeros(0, requires_grad=True)
    none = Answers(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2, 5)
    for task in ("dpo", "orpo", "simpo"):
        reference = torch.zeros(0, 2, dtype=torch.float64) if task == "dpo" else None
        loss, sums = Objective(PreferenceConfig(), task)(nll, none, reference, None)
        assert loss.item() == 0 and not sums.any() and loss.requires_grad
        loss.backward()


def test_what_is_no_finite_number_is_shown_as_none():
    sums = dict.fromkeys(SUMS, 1.0) | {"reward_chosen": math.nan, "logp_chosen": -math.inf}
    shown = figures(list(sums.values()))
    assert shown["reward_chosen"] is None and shown["reward_margin"] is None and shown["logp_chosen"] is None
    assert shown["reward_rejected"] == 1


def test_the_difference_of_long_sums_keeps_its_digits():
    """In fp32 sums of some thousand nats would be known to 2e-4, which is what a step changes."""
    nll = torch.full((4000,), 1 / 3)
    one = Answers(torch.zeros(4000, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1, 1)
    logp, tokens = summed(nll, one)
    assert logp.item() == pytest.approx(-4000 * nll[0].double().item(), rel=1e-14) and tokens.item() == 4000


@pytest.mark.parametrize(
    ("weights", "good", "bad", "advised"),
    [
        ((1, 1), 100, 90, ""),
        ((1, 1), 400, 100, "--undesirable_weight 4"),
        ((1, 1), 100, 400, "--desirable_weight 4"),
        ((1, 4), 400, 100, ""),
        ((2, 1), 150, 100, "--undesirable_weight 3"),
        ((1, 1), 5, 0, ""),
    ],
)
def test_weights_are_advised_by_which_both_labels_count_alike(weights, good, bad, advised):
    config = PreferenceConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    assert Objective(config, "kto").balance(good, bad) == advised
