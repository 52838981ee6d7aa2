"""How the next token is chosen from logits: the most likely one, or drawn with temperature, top_p and top_k.

Penalties come first, as in RWKV's runtimes (BlinkDL/ChatRWKV): of the logit of every token that the sequence holds so
far, presence_penalty + count * frequency_penalty is subtracted. All counts are multiplied by penalty_decay whenever a
token is added, so that what was written long ago counts less. Then the logits are divided by the temperature, and a
token is drawn from the smallest set of the most likely ones whose probability reaches top_p. (ChatRWKV cuts before it
applies the temperature: with a temperature of 1 that is the same.)

A sequence draws one random number a token, from a generator of its own: its tokens do not depend on which sequences
are written beside it.

Sizes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens among which the processor looks for the set of top_p, first the few, before it sorts the whole vocabulary.
FEW, LIKELIEST = 64, 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many at most. ValueError, naming the setting, for a value that means nothing.

    temperature: 0 takes the most likely token. top_p: 1 = all tokens. top_k: only the k most likely, 0 = all.
    penalty_decay: 1 = nothing is forgotten. seed: the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    seed: int = 0
    max_new: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: expected 0 (the most likely token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected a probability above 0, up to 1 (all tokens)")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: expected a number of tokens, or 0 (all)")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: expected a number, 0 for none")
        if not 0 <= self.penalty_decay <= 1:
            raise ValueError(f"penalty_decay {self.penalty_decay}: expected a factor from 0 to 1")
        if self.max_new < 0:
            raise ValueError(f"max_new {self.max_new}: expected the largest number of new tokens, 0 or more")

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)


class Samplers:
    """The next tokens of sequences that are written side by side, each with its own seed and its own penalties."""

    def __init__(self, sampling: Sampling, seeds: Sequence[object]):
        self.sampling = sampling
        # A text as seed gives the same numbers with every version of Python.
        self._random = [random.Random(str(seed)) for seed in seeds]
        self._seen: Tensor | None = None  # bool [B, V]: the tokens that a sequence holds
        self._counts: Tensor | None = None  # fp32 [B, V]: how often, decayed

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> the next tokens, int64 [B]. Nothing waits for a GPU."""
        sampling = self.sampling
        if sampling.penalises:
            logits = self._penalised(logits.float())
        if sampling.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            numbers = torch.tensor([[generator.random()] for generator in self._random], dtype=torch.float32)
            tokens = _drawn(logits.float(), sampling, numbers.to(logits.device, non_blocking=True))
        if sampling.penalises:
            self._count(tokens)
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone: the other sequences have ended."""
        self._random = [self._random[row] for row in rows]
        if self._seen is not None and self._counts is not None:
            self._seen, self._counts = self._seen[rows], self._counts[rows]

    def _penalised(self, logits: Tensor) -> Tensor:
        if self._seen is None or self._counts is None:
            self._seen, self._counts = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        return logits - presence * self._seen - frequency * self._counts

    def _count(self, tokens: Tensor) -> None:
        assert self._seen is not None and self._counts is not None
        self._counts *= self.sampling.penalty_decay
        self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))
        self._seen.scatter_(1, tokens[:, None], True)


class Sampler:
    """The next token of one sequence. It remembers what it gave, for the penalties, until `forget`."""

    def __init__(self, sampling: Sampling, vocab_size: int):
        self.sampling, self.vocab_size = sampling, vocab_size
        self._rows = Samplers(sampling, [sampling.seed])

    def __call__(self, logits: Tensor) -> int:
        """logits [V] of any dtype -> a token."""
        assert logits.shape == (self.vocab_size,), f"logits {list(logits.shape)}, expected [{self.vocab_size}]"
        return int(self._rows(logits[None]))

    def forget(self) -> None:
        """Start anew, for another text: nothing is penalised. The random numbers go on."""
        self._rows._seen = self._rows._counts = None


def _drawn(logits: Tensor, sampling: Sampling, numbers: Tensor) -> Tensor:
    """The tokens at these numbers, [B, 1] in 0 <= number < 1, of the distribution: logits fp32 [B, V] -> [B]."""
    probability = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p >= 1 and not sampling.top_k:
        return _at(probability.cumsum(dim=-1), numbers).squeeze(-1)
    size = probability.shape[-1]
    wanted = min(sampling.top_k or size, size)
    # Sorting a vocabulary takes a processor as long as a small model takes for a token. Nearly always the likeliest
    # tokens are enough. To ask whether they are would make a GPU wait; it sorts fast.
    on_cpu = logits.device.type == "cpu"
    first, *more = (*(count for count in (FEW, LIKELIEST) if on_cpu and count < wanted), wanted)
    tokens, enough = _drawn_among(first, probability, sampling, numbers)
    for count in more:
        rows = (~enough).nonzero().squeeze(-1)
        if len(rows):
            tokens[rows], enough[rows] = _drawn_among(count, probability[rows], sampling, numbers[rows])
    return tokens


def _drawn_among(count: int, probability: Tensor, sampling: Sampling, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B] among the `count` likeliest of each row, bool [B] whether these reach top_p)."""
    likeliest, order = probability.topk(count, dim=-1)
    before = likeliest.cumsum(dim=-1) - likeliest  # of all tokens that are more likely
    kept = likeliest.masked_fill(before >= sampling.top_p, 0.0)
    tokens = order.gather(-1, _at(kept.cumsum(dim=-1), numbers)).squeeze(-1)
    return tokens, likeliest.sum(dim=-1) >= sampling.top_p


def _at(cumulated: Tensor, numbers: Tensor) -> Tensor:
    """The places [B, 1] where the cumulated probabilities [B, K], of any sum, first exceed their share `numbers`."""
    total = cumulated[:, -1:]
    places = (cumulated <= numbers * total).sum(dim=-1, keepdim=True)
    # Rounding may reach the sum itself: the last place where it still grows is meant.
    return places.minimum((cumulated < total).sum(dim=-1, keepdim=True))
