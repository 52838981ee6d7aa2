"""From log-probabilities of tokens to the loss of a task, and to the figures that a run shows of it.

Sizes: R labelled tokens, U units, M members of a unit (2: chosen and rejected; 1: an answer with its label).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rwkv_bone.config import PreferenceConfig
from rwkv_bone.config.preferences import REFERRING, decided
from rwkv_bone.preferences import losses

if TYPE_CHECKING:
    from rwkv_bone.data.sampler import Answers

# What is summed over the units of micro-batches and devices. Of labelled answers the good ones are the chosen ones.
SUMS = (
    *("chosen", "rejected"),  # how many there are
    "pairs",  # whose rewards differ: before the first step all of dpo's are 0
    *("reward_chosen", "reward_rejected"),
    "above",  # pairs in which the chosen answer has the higher reward
    *("logp_chosen", "logp_rejected"),  # of whole answers, nats
    *("tokens_chosen", "tokens_rejected"),
    *("nll", "nll_units"),  # of chosen answers, nats per token, and over how many of them; 0 where it is not added
    *("kl", "kl_units"),  # the estimate of each unit's window, and over how many units
)
# What the log, measurements and pages show of these, in this order; each may be None.
FIGURES = (
    *("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"),
    *("logp_chosen", "logp_rejected", "nll", "kl"),
)


# The settings that act on each task, as the header of a run names them.
ACTING = {
    "dpo": ("beta", "label_smoothing", "sft_weight"),
    "orpo": ("beta", "sft_weight"),
    "simpo": ("beta", "gamma", "label_smoothing", "sft_weight"),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}
BALANCED = 0.95, 1.4  # the paper of KTO advises 1 to 4/3; a little more, so that rounded weights will do


class Outcome(NamedTuple):
    """The loss of a micro-batch, to be differentiated, and what is added up for its figures."""

    loss: Tensor  # fp32 scalar, summed over units
    sums: Tensor  # float64 [len(SUMS)], detached


class Objective:
    """The loss of --task dpo, orpo, simpo or kto.

    Sums over tokens and all that follows from them are float64: the difference of two sums of a thousand nats is what
    counts, and on a GPU, where the order of additions varies, it is the same number in every run.
    """

    def __init__(self, config: PreferenceConfig, task: str):
        self.config, self.task = decided(config, task), task
        self.needs_reference = task in REFERRING
        self.needs_mismatched = task == "kto"

    def sentence(self) -> str:
        """The task and its settings, as they were decided."""
        return " ".join([f"{self.task}:", *(f"--{name} {getattr(self.config, name):g}" for name in ACTING[self.task])])

    def balance(self, good: int, bad: int) -> str:
        """Kto's weights by which both labels count alike, of so many answers of each; empty where they do already.

        KTO (arXiv 2402.01306, section 4.3): desirable_weight x good is to be between 1 and 4/3 of undesirable_weight x
        bad.
        """
        for_good, for_bad = self.config.desirable_weight * good, self.config.undesirable_weight * bad
        if not for_good or not for_bad or BALANCED[0] <= for_good / for_bad <= BALANCED[1]:
            return ""
        if for_good > for_bad:
            return f"--undesirable_weight {for_good / bad:.3g}"
        return f"--desirable_weight {for_bad / good:.3g}"

    def __call__(self, nll: Tensor, answers: Answers, reference: Tensor | None, kl: Tensor | None) -> Outcome:
        """nll [R]: -log p of each labelled token, in the order of `answers.sequence`. reference [U, M]: the summed
        log-probabilities by which dpo and kto judge; kl: kto's estimate of its window, a scalar. None for the others.
        """
        config = self.config
        logp, tokens = summed(nll, answers)
        mean = logp / tokens.clamp(min=1)
        if self.needs_reference:
            assert reference is not None
            rewards = config.beta * (logp - reference)
        else:
            rewards = config.beta * mean
        if self.task == "kto":
            assert reference is not None and kl is not None and answers.good is not None
            weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
            found = losses.kto(logp[:, 0], reference[:, 0], answers.good, kl, beta=config.beta, **weights)
            sums = _labelled_sums(logp, tokens, rewards, answers.good, kl)
        else:
            smoothing = config.label_smoothing
            if self.task == "dpo":
                assert reference is not None
                found = losses.dpo(*logp.T, *reference.T, beta=config.beta, label_smoothing=smoothing)
            elif self.task == "simpo":
                found = losses.simpo(*mean.T, beta=config.beta, gamma=config.gamma, label_smoothing=smoothing)
            else:
                found = losses.orpo(*mean.T, beta=config.beta)
            if config.sft_weight:
                found = found - config.sft_weight * mean[:, 0]
            sums = _paired_sums(logp, tokens, rewards, mean if config.sft_weight else None)
        return Outcome(found.sum().float(), sums)


def summed(nll: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """(the log-probability of each answer, nats; its number of labelled tokens), both float64 [U, M]."""
    zeros = torch.zeros(len(answers.units) * answers.members, dtype=torch.float64, device=nll.device)
    logp = zeros.index_add(0, answers.sequence, -nll.double())
    tokens = zeros.index_add(0, answers.sequence, torch.ones_like(nll, dtype=torch.float64))
    return logp.view(-1, answers.members), tokens.view(-1, answers.members)


def _paired_sums(logp: Tensor, tokens: Tensor, rewards: Tensor, mean: Tensor | None) -> Tensor:
    """SUMS of pairs. mean: log-probabilities per token, where the chosen answers' own loss is added."""
    pairs = torch.full((), len(logp), dtype=torch.float64, device=logp.device)
    none = torch.zeros_like(pairs)
    above, below = (rewards[:, 0] > rewards[:, 1]).sum(), (rewards[:, 0] < rewards[:, 1]).sum()
    nll = (none, none) if mean is None else (-mean[:, 0].sum(), pairs)
    parts = (pairs, pairs, above + below, *rewards.sum(0), above, *logp.sum(0), *tokens.sum(0), *nll, none, none)
    return torch.stack([part.detach().double() for part in parts])


def _labelled_sums(logp: Tensor, tokens: Tensor, rewards: Tensor, good: Tensor, kl: Tensor) -> Tensor:
    """SUMS of answers with labels."""
    none = torch.zeros((), dtype=torch.float64, device=logp.device)
    both = torch.stack([good, ~good]).double()  # [2, U]
    counts = both.sum(1)

    def split(values: Tensor) -> Tensor:
        return both @ values[:, 0]

    units = counts.sum()
    parts = (*counts, none, *split(rewards), none, *split(logp), *split(tokens), none, none, kl * units, units)
    return torch.stack([part.detach().double() for part in parts])


def figures(sums: Sequence[float]) -> dict[str, float | None]:
    """FIGURES of SUMS that were added up: means over answers, `logp_` over their tokens, None where there are none.

    Also None: what is no finite number, as in a step that was skipped.
    """
    total = dict(zip(SUMS, sums, strict=True))

    def share(name: str, of: str) -> float | None:
        value = total[name] / total[of] if total[of] else math.nan
        return value if math.isfinite(value) else None

    chosen, rejected = share("reward_chosen", "chosen"), share("reward_rejected", "rejected")
    margin = None if chosen is None or rejected is None else chosen - rejected
    accuracy = share("above", "pairs")
    logp = share("logp_chosen", "tokens_chosen"), share("logp_rejected", "tokens_rejected")
    values = (chosen, rejected, margin, accuracy, *logp, share("nll", "nll_units"), share("kl", "kl_units"))
    return dict(zip(FIGURES, values, strict=True))
