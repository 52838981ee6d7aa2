"""What a run's held-out measurements will take: parts of one are timed on the model before its first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone.config import TrainConfig
from rwkv_bone.config.sections import AUTO
from rwkv_bone.data import BatchPlan, Dataset, load_dataset, load_pairs, load_tokenizer
from rwkv_bone.data.tokenizer import encode_marked
from rwkv_bone.inference.generate import BATCH, generate
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.module import TrainingModule

SHORT = 9  # tokens of an answer that are timed
PASSES = 3  # forward passes that are timed, after one that warms up
WHILE_TRAINING, SHARE = 10, 0.05  # measurements of --eval_steps auto, and the share of the steps' time they may take


@dataclass(frozen=True)
class HeldOutData:
    """What is measured."""

    dataset: Dataset
    prompts: list[list[int]]  # that are answered before and after training
    longest: int  # tokens of an answer

    @classmethod
    def load(cls, config: TrainConfig, vocab_size: int, split: Dataset | None) -> HeldOutData | None:
        """None without held-out data. split: what `load_data` took out of the training data."""
        data, path, limit = config.data, config.data.eval_data, config.run.eval_samples
        if split is None and not path:
            return None
        dataset = split or load_dataset(replace(data, dataload="pad"), vocab_size, path, keep=False)
        prompts, longest = [], 0
        if limit:
            tokenizer = load_tokenizer(data.tokenizer, vocab_size)
            pairs = split.pairs(tokenizer, limit) if split else load_pairs(data, path, tokenizer, limit)
            prompts = [encode_marked(tokenizer, prompt) or [tokenizer.eod] for prompt, _ in pairs]
            longest = max((len(tokenizer.encode(response)) for _, response in pairs), default=0) + 1
        return cls(dataset, prompts, longest)


class TimeHeldOut(Callback):
    """Time a few forward passes and the first tokens of a few answers: `loss` and `answers`, seconds of a measurement.

    chunk: tokens that go through the model at once; 0: whole samples.
    """

    def __init__(self, data: HeldOutData, micro_bsz: int, chunk: int, clock: Callable[[], float] = time.monotonic):
        self.data, self.chunk, self._clock = data, chunk, clock
        self._plan = BatchPlan(data.dataset, micro_bsz=micro_bsz, pack=True)
        self.loss = self.answers = self.spent = 0.0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        begin = self._now(module)
        module.eval()
        self.loss = self._time_loss(module)
        self.answers = self._time_answers(module) if self.data.prompts else 0.0
        module.train()
        self.spent = self._now(module) - begin

    def _time_loss(self, module: TrainingModule) -> float:
        sum_of = partial(chunked_loss, module, chunk=self.chunk) if self.chunk else module
        steps = self._plan.total_steps(1)
        seconds, tokens = [], []
        for step in range(min(PASSES + 1, steps)):
            batch, begin = self._plan.batch(0, step, 0, 0).to(module.device), self._now(module)
            sum_of(batch.ids, labels=batch.labels, label_rows=batch.label_rows, cu_seqlens=batch.cu_seqlens)
            seconds.append(self._now(module) - begin)
            tokens.append(batch.tokens)
        used = slice(1 if len(seconds) > 1 else 0, None)
        return sum(seconds[used]) / sum(tokens[used]) * self._plan.positions()

    def _time_answers(self, module: TrainingModule) -> float:
        some = self.data.prompts[:BATCH]
        short = min(SHORT, self.data.longest)

        def take(tokens: int) -> float:
            begin = self._now(module)
            # No token ends an answer, so that all of them are written.
            generate(module, some, max_new=tokens, stop_id=None, device=module.device)
            return self._now(module) - begin

        read = take(1)
        each = max(take(short) - read, 0.0) / max(short - 1, 1)
        return (read + each * (self.data.longest - 1)) * len(self.data.prompts) / len(some)

    def _now(self, module: TrainingModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return self._clock()


def measurements(given: int, steps: int, step: float, loss: float) -> int:
    """How many measurements a run of so many steps has, besides those before and after.

    given: --eval_steps. step, loss: seconds of a step, and of a measurement while training.
    """
    if given != AUTO:
        return (steps - 1) // given if given else 0
    fit = int(SHARE * steps * step / loss) if loss else WHILE_TRAINING
    return min(fit, WHILE_TRAINING - 1, max(steps - 1, 0))
