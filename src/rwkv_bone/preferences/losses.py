"""The losses of preference tuning, of the log-probabilities of answers.

Each is a pure function of tensors [U], one number for each unit: a pair of answers, chosen and rejected, or with KTO
one answer. It returns [U] losses, of any floating dtype. Log-probabilities are in nats, of an answer's tokens given the
prompt: summed, or where a name ends in `_mean` divided by their number. `reference` is that of a model which is not
trained.

In the formulas s is the logistic function, -log s(x) = log(1 + exp(-x)), which is computed without overflow for any x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimization: an answer's reward is beta times what the policy has gained on the reference.

    -log s(beta ((chosen - reference_chosen) - (rejected - reference_rejected)))
    Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7. With label_smoothing, the share of
    pairs that are taken to be the wrong way round, it is conservative DPO: Mitchell, "A note on DPO with noisy
    preferences & relationship to IPO", 2023, equation 3.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _preferred(beta * margin, label_smoothing)


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float) -> Tensor:
    """Odds-ratio preference optimization without its other part, the loss of the chosen answer's tokens.

    beta * -log s(log(odds(chosen) / odds(rejected))), odds = p / (1 - p), p = exp(mean log-probability)
    Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, equations 4 to 7;
    beta is their lambda.
    """
    return -beta * F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, to the last digits for p near 0 and near 1.

    Where p is 1 as far as the dtype can tell, the odds are as for its smallest normal number, and the gradient is 0.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)
    return log_p - torch.log(-torch.expm1(log_p))


def simpo(
    chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """Simple preference optimization, without a reference: an answer's reward is beta times its mean log-probability.

    -log s(beta (chosen_mean - rejected_mean) - gamma)
    Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv 2405.14734, equation 6.
    gamma is the margin by which the chosen answer's reward is to be above the other's. label_smoothing as in `dpo`.
    """
    return _preferred(beta * (chosen_mean - rejected_mean) - gamma, label_smoothing)


def kto(
    policy: Tensor,
    reference: Tensor,
    good: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization: what one answer, good or bad, has gained on the reference beyond what all have.

    desirable_weight * (1 - s(beta (policy - reference - kl))) where `good` [U] is true, and
    undesirable_weight * (1 - s(beta (kl - policy + reference))) elsewhere
    Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, equations 7 and 8.
    kl is their z0, a scalar: see `kl_estimate`.
    """
    gain = beta * (policy - reference - kl)
    # 1 - s(x) = s(-x), which keeps its digits where x is large.
    return torch.where(good, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def kl_estimate(policy: Tensor, reference: Tensor) -> Tensor:
    """KTO's estimate of the divergence of the policy from the reference, in nats per answer: a scalar without gradient.

    max(0, mean(policy - reference)) over answers [U] that belong to other prompts than those before them here
    (arXiv 2402.01306, section 4.2).
    """
    return (policy - reference).detach().mean().clamp(min=0)


def _preferred(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log s(margin), and -log s(-margin) for the share label_smoothing: a pair's loss in Bradley and Terry's model."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
