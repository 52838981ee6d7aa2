"""What a run's held-out measurements will take: parts of one are timed on the model before its first step.

What is measured, and when, `training/heldout_sets.py` and `training/measuring.py` say, as in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.data import BatchPlan, Dataset
from rwkv_bone.data.tokenizer import encode_marked
from rwkv_bone.inference.generate import BATCH, generate
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.heldout import LONGEST, HeldOut, evaluating
from rwkv_bone.training.measuring import ANSWERS, SAMPLES, Rhythm, rhythm
from rwkv_bone.training.module import TrainingModule

SHORT = 9  # tokens of an answer that are timed
PASSES = 3  # forward passes that are timed, after one that warms up


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a measurement."""

    whole: float = 0.0  # the loss of all that is measured before and after training
    loss: float = 0.0  # that of what is measured while training
    answers: float = 0.0  # the answers of which the right ones are counted
    samples: float = 0.0  # those to the sample prompts

    @property
    def at_the_ends(self) -> float:
        """Of the measurement before training, or of the one after it."""
        return self.whole + self.answers + self.samples

    def rhythm(self, given: int, steps: int, step: float) -> Rhythm:
        """When a run of so many steps, of so many seconds each, measures. given: --eval_steps."""
        return rhythm(given, steps, step, {"loss": self.loss, "exact_match": self.answers, "samples": self.samples})

    def in_a_run(self, when: Rhythm, steps: int) -> tuple[int, float]:
        """(measurements while training, seconds of all measurements)."""
        count = (steps - 1) // when.every if when.every else 0
        samples = self.samples if when.what >= SAMPLES else 0.0
        each = self.loss + samples + (self.answers if when.what >= ANSWERS else 0.0)
        return count, 2 * self.at_the_ends + count * each


class TimeHeldOut(Callback):
    """Time a few forward passes, and the first tokens of a few answers: `costs`. spent: seconds that this took."""

    def __init__(self, heldout: HeldOut, clock: Callable[[], float] = time.monotonic):
        self.heldout, self._clock = heldout, clock
        self.costs, self.spent = Costs(), 0.0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        begin, heldout = self._now(module), self.heldout
        with evaluating(module):
            rate = self._rate(module, heldout.main.dataset)
            parts = sum(forward_positions(one.part) for one in heldout.sets)
            more = forward_positions(heldout.main.dataset) - forward_positions(heldout.main.part)
            tokenizer, answers, samples = heldout.tokenizer, 0.0, 0.0
            if tokenizer:
                encode = tokenizer.encode
                for one in heldout.sets:
                    longest = max((len(encode(response)) for _, response in one.pairs), default=0) + 1
                    answers += self._answers(module, [prompt for prompt, _ in one.pairs], longest)
                samples = self._answers(module, [prompt.text for prompt in heldout.prompts], LONGEST)
        self.costs = Costs(rate * (parts + more), rate * parts, answers, samples)
        self.spent = self._now(module) - begin

    def _rate(self, module: TrainingModule, dataset: Dataset) -> float:
        """Seconds a position of a forward pass."""
        heldout = self.heldout
        sum_of = partial(chunked_loss, module, chunk=heldout.chunk) if heldout.chunk else module
        plan = BatchPlan(dataset, micro_bsz=heldout.micro_bsz, pack=True)
        seconds, positions = [], []
        for step in range(min(PASSES + 1, plan.total_steps(1))):
            batch, begin = plan.batch(0, step, 0, 0).to(module.device), self._now(module)
            sum_of(batch.ids, labels=batch.labels, label_rows=batch.label_rows, cu_seqlens=batch.cu_seqlens)
            seconds.append(self._now(module) - begin)
            positions.append(batch.ids.numel())
        used = slice(1 if len(seconds) > 1 else 0, None)
        return sum(seconds[used]) / sum(positions[used])

    def _answers(self, module: TrainingModule, prompts: Sequence[str], longest: int) -> float:
        """Seconds of answers of so many tokens to these prompts."""
        tokenizer = self.heldout.tokenizer
        if not prompts:
            return 0.0
        assert tokenizer
        some = [encode_marked(tokenizer, prompt) or [tokenizer.eod] for prompt in prompts[:BATCH]]
        short = min(SHORT, longest)

        def take(tokens: int) -> float:
            begin = self._now(module)
            # No token ends an answer, so that all of them are written.
            generate(module, some, max_new=tokens, stop_id=None, device=module.device)
            return self._now(module) - begin

        take(1)
        read = take(1)
        each = max(take(short) - read, 0.0) / max(short - 1, 1)
        return (read + each * (longest - 1)) * len(prompts) / len(some)

    def _now(self, module: TrainingModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return self._clock()


def forward_positions(dataset: Dataset) -> int:
    """Of a pass over a dataset without a gradient; of labelled answers it has prompts with other answers, too."""
    others = 0 if dataset.good is None else int(dataset.mismatched_widths.sum())
    return int(dataset.positions.sum()) + others
