"""The losses of preference tuning against their formulas in decimal arithmetic of 90 digits, and against TRL's."""

from __future__ import annotations

import types
from collections import defaultdict
from decimal import Context, Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.ops.cross_entropy import linear_cross_entropy
from rwkv_bone.preferences import losses

DIGITS = Context(prec=90, Emin=-(10**6), Emax=10**6)
# Sums of log-probabilities of answers, from ordinary to absurd.
CHOSEN, REJECTED = [-12.5, -3.25, -800.0, -1.0, -3e4, -100.0, -340.0], [-14.0, -2.5, -20.0, -6e4, -1.5, -9.0, -9.0]
REFERENCE_CHOSEN = [-12.0, -4.5, -790.0, -2.0, -5.0, -330.0, -110.0]
REFERENCE_REJECTED = [-12.0, -2.25, -25.0, -1.0, -2.0, -9.0, -8.0]
# Means: probabilities of a token near 1/4, near 1, beyond what 1 - p could tell from 1 in float32 and float64, near 0.
MEANS = [-1.375, -1e-3, -1e-9, -1e-18, -40.0, -1e4]


def softplus(x: Decimal) -> Decimal:
    """-log s(-x)."""
    return (1 + x.exp()).ln()


def by_hand(function, *columns) -> list[float]:
    """The value for each unit, in decimal numbers."""
    with localcontext(DIGITS):
        return [float(function(*map(Decimal, row))) for row in zip(*columns, strict=True)]


def slopes_by_hand(function, *columns) -> list[list[float]]:
    """The derivative in each argument for each unit, by central differences."""
    step, result = Decimal("1e-30"), []
    with localcontext(DIGITS):
        for place in range(len(columns)):
            rows = [[Decimal(x) for x in row] for row in zip(*columns, strict=True)]
            ahead = [function(*(x + step * (at == place) for at, x in enumerate(row))) for row in rows]
            behind = [function(*(x - step * (at == place) for at, x in enumerate(row))) for row in rows]
            result.append([float((a - b) / (2 * step)) for a, b in zip(ahead, behind, strict=True)])
    return result


def pairs(first, second):
    """Every one of `first` with every one of `second`."""
    return [x for x in first for _ in second], [y for _ in first for y in second]


def dpo(smoothing):
    def formula(chosen, rejected, reference_chosen, reference_rejected):
        margin = Decimal("0.1") * (chosen - reference_chosen - rejected + reference_rejected)
        share = Decimal(str(smoothing))
        return (1 - share) * softplus(-margin) + share * softplus(margin)

    def ours(*columns):
        return losses.dpo(*columns, beta=0.1, label_smoothing=smoothing)

    return ours, formula, (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def orpo():
    def odds(mean):
        return mean.exp() / (1 - mean.exp())

    def formula(chosen, rejected):
        return Decimal("0.25") * softplus((odds(rejected) / odds(chosen)).ln())

    return lambda *columns: losses.orpo(*columns, beta=0.25), formula, pairs(MEANS, MEANS)


def simpo(smoothing):
    def formula(chosen, rejected):
        margin = Decimal("2.5") * (chosen - rejected) - Decimal("1.5")
        share = Decimal(str(smoothing))
        return (1 - share) * softplus(-margin) + share * softplus(margin)

    def ours(*columns):
        return losses.simpo(*columns, beta=2.5, gamma=1.5, label_smoothing=smoothing)

    return ours, formula, pairs(MEANS, MEANS)


def kto(good):
    def formula(policy, reference):
        gain = Decimal("0.1") * (policy - reference - Decimal("2.75"))
        if good:
            return Decimal("1.3") * (1 - 1 / (1 + (-gain).exp()))
        return Decimal("0.7") * (1 - 1 / (1 + gain.exp()))

    def ours(policy, reference):
        labels = torch.full(policy.shape, good)
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
        return losses.kto(policy, reference, labels, policy.new_tensor(2.75), beta=0.1, **weights)

    return ours, formula, (CHOSEN, REFERENCE_CHOSEN)


FORMULAS = {
    "dpo": dpo(0.0),
    "dpo smoothed": dpo(0.2),
    "orpo": orpo(),
    "simpo": simpo(0.0),
    "simpo smoothed": simpo(0.1),
    "kto good": kto(True),
    "kto bad": kto(False),
}
every_loss = pytest.mark.parametrize("name", FORMULAS)


@every_loss
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_and_slopes_have_the_digits_of_their_formulas(name, dtype, close):
    ours, formula, columns = FORMULAS[name]
    inputs = [torch.tensor(column, dtype=dtype, requires_grad=True) for column in columns]
    given = [tensor.tolist() for tensor in inputs]  # as the dtype rounds them
    found = ours(*inputs)
    assert found.dtype == dtype and found.shape == inputs[0].shape
    value, slopes = by_hand(formula, *given), slopes_by_hand(formula, *given)
    wanted = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=1e-30)
    for got, expected in zip(torch.autograd.grad(found.sum(), inputs), slopes, strict=True):
        # A slope that no step could tell from zero may be zero.
        least = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=close, atol=least)


@every_loss
def test_losses_pass_gradcheck(name):
    ours, _, columns = FORMULAS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [-3 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in columns]
    assert torch.autograd.gradcheck(ours, [tensor.requires_grad_() for tensor in inputs])


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_dtype_stays_and_is_finite(name, dtype):
    ours, _, columns = FORMULAS[name]
    inputs = [torch.tensor(column).clamp(min=-3e4).to(dtype).requires_grad_() for column in columns]
    found = ours(*inputs)
    assert found.dtype == dtype and found.isfinite().all()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(found.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_answer_that_is_certain_makes_no_loss_and_no_slope_that_is_not_a_number(dtype):
    """In float32 every token of an answer that is known by heart has log-probability 0."""
    chosen, rejected = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in ([0.0, -0.5, 0.0], [-0.5, 0.0, 0.0]))
    found = losses.orpo(chosen, rejected, beta=1.0)
    assert found.isfinite().all() and found[0] < 1e-30 and found[1] > 80
    torch.testing.assert_close(found[2], torch.tensor(2.0, dtype=dtype).log())
    up, down = torch.autograd.grad(found.sum(), (chosen, rejected))
    assert up.isfinite().all() and down.isfinite().all()
    assert up[0] == down[1] == 0 and up[1] < -1  # the chosen answer, which is not certain, is still pushed


def test_the_divergence_is_a_mean_not_below_zero_and_without_gradient():
    policy, reference = torch.tensor([-3.0, -7.0, -2.0], requires_grad=True), torch.tensor([-5.0, -6.0, -3.5])
    found = losses.kl_estimate(policy, reference)
    assert found.shape == () and not found.requires_grad and abs(float(found) - 2.5 / 3) < 1e-6
    assert float(losses.kl_estimate(reference, policy)) == 0


# TRL's own functions, on a stub in the place of a trainer.


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.utils import add_fused_lm_head

    return types.SimpleNamespace(
        CPOTrainer=CPOTrainer,
        ORPOTrainer=ORPOTrainer,
        DPOTrainer=DPOTrainer,
        KTOTrainer=KTOTrainer,
        add_fused_lm_head=add_fused_lm_head,
    )


class Accelerator:
    """What a trainer on one processor calls it for."""

    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def trainer(**settings):
    settings = {"accelerator": Accelerator(), "model": types.SimpleNamespace(training=False), **settings}
    settings |= {"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0}
    return types.SimpleNamespace(_metrics={"eval": defaultdict(list)}, **settings)


MEANS_TRL = ([-1.375, -0.5, -1e-3, -9.0, -0.25], [-2.0, -0.125, -3.0, -0.75, -1e-6])


def test_orpo_equals_trls(trl):
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in MEANS_TRL)
    theirs, *_ = trl.ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), chosen, rejected)
    ours = losses.orpo(chosen, rejected, beta=0.3)
    torch.testing.assert_close(ours, -theirs)  # which they subtract
    slopes = [torch.autograd.grad(x.sum(), (chosen, rejected)) for x in (ours, -theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_simpo_equals_trls(trl, smoothing):
    chosen, rejected = map(torch.tensor, MEANS_TRL)
    settings = {"beta": 2.5, "simpo_gamma": 1.5, "label_smoothing": smoothing, "alpha": 0.0, "loss_type": "simpo"}
    theirs, *_ = trl.CPOTrainer.cpo_loss(trainer(**settings), chosen, rejected)
    ours = losses.simpo(chosen, rejected, beta=2.5, gamma=1.5, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def model(trl):
    """A tiny model of transformers, with the head that TRL gives it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # otherwise every token is about as likely as any
    trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def sequences(count: int):
    """(ids, attention_mask, completion_mask) of sequences of unequal lengths, padded at the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 101, (count, 12), generator=generator)
    lengths = torch.randint(7, 13, (count, 1), generator=generator)
    prompts = torch.randint(2, 6, (count, 1), generator=generator)
    attention = (torch.arange(12) < lengths).long()
    return ids, attention, attention * (torch.arange(12) >= prompts)


def answer_log_probabilities(model, ids, attention, completion):
    """Of each sequence, by the head of this project on the hidden rows of the other's model."""
    hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]
    labels = ids[:, 1:].masked_fill(completion[:, 1:] == 0, -100).flatten()
    rows = (labels != -100).nonzero().squeeze(1)
    loss = linear_cross_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, labels, label_rows=rows, chunk_rows=7, per_token=True
    )
    return -torch.zeros(len(ids)).index_add(0, rows // hidden.shape[1], loss)


def slopes_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("smoothing", "units"), [(0.0, 3), (0.2, 1)])
def test_dpo_through_our_head_has_the_loss_and_every_gradient_of_trls_trainer(trl, model, smoothing, units):
    """TRL 1.16 has label smoothing in another loss, which is conservative DPO if there is one pair."""
    ids, attention, completion = sequences(2 * units)
    reference = -torch.rand(2 * units, generator=torch.Generator().manual_seed(2)) * 30
    given = {"ref_chosen_logps": reference[:units], "ref_rejected_logps": reference[units:]}
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion, **given}
    stub = trainer(
        beta=0.2,
        label_smoothing=smoothing,
        loss_types=["aot_unpaired" if smoothing else "sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    theirs = trl.DPOTrainer._compute_loss(stub, model, inputs, False)
    policy = answer_log_probabilities(model, ids, attention, completion)
    assert abs(float(policy[:units].detach().mean()) - stub._metrics["eval"]["logps/chosen"][0]) < 1e-4
    split = (*policy.split(units), *reference.split(units))
    ours = losses.dpo(*split, beta=0.2, label_smoothing=smoothing).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes_of(model, ours), slopes_of(model, theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("good", [[True, False, False, True, False], [True] * 5, [False] * 5])
def test_kto_through_our_head_has_the_loss_and_every_gradient_of_trls_trainer(trl, model, good):
    ids, attention, completion = sequences(5)
    # The answers of other prompts: any other sequences.
    others = {"KL_input_ids": ids.flip(0), "KL_attention_mask": attention, "KL_completion_mask": completion}
    with torch.no_grad():
        policy = answer_log_probabilities(model, ids, attention, completion)
        mismatched = answer_log_probabilities(model, *others.values())
    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    reference, reference_mismatched = policy + 4 * noise[0], mismatched - 2 + noise[1]
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion, **others}
    inputs |= {"label": torch.tensor(good), "ref_logps": reference, "ref_KL_logps": reference_mismatched}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    stub = trainer(beta=0.2, loss_type="kto", calculate_KL=True, **weights)
    stub._compute_kl_logps = types.MethodType(trl.KTOTrainer._compute_kl_logps, stub)
    theirs = trl.KTOTrainer._compute_loss(stub, model, inputs, False)
    kl = losses.kl_estimate(mismatched, reference_mismatched)
    assert float(kl) > 1 and abs(stub._metrics["eval"]["kl"][0] - float(kl)) < 1e-4
    policy = answer_log_probabilities(model, ids, attention, completion)
    ours = losses.kto(policy, reference, torch.tensor(good), kl, beta=0.2, **weights).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes_of(model, ours), slopes_of(model, theirs), rtol=1e-3, atol=1e-5)


def test_log_probabilities_of_answers_equal_those_of_plain_logits(model):
    ids, attention, completion = sequences(4)
    ours = answer_log_probabilities(model, ids, attention, completion)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    each = F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(ours.double(), (each * completion[:, 1:]).sum(1), rtol=1e-5, atol=1e-4)
