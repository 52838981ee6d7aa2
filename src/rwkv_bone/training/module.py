"""One training step: loss, its normalisation, and the checks that stop a run before it damages anything.

An optimiser step consumes a *window*: `accumulate` micro-batches on each of `world_size` ranks. The gradient of a
window is that of (sum of the loss over its trained tokens) / (number of its trained tokens), however the window is
divided among devices, forward passes and micro-batches.

On a GPU the Python code of a step runs ahead of the arithmetic, as long as nothing asks for a value. Only `Fetched`
does, once in an optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from rwkv_bone.config import ModelConfig, OptimConfig
from rwkv_bone.data import Batch, BatchPlan
from rwkv_bone.data.prefetch import Prefetch
from rwkv_bone.errors import UserError
from rwkv_bone.models import NOTHING, RWKV, Recompute
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from rwkv_bone.training.schedule import learning_rate


class RunStopped(UserError):
    """The run cannot go on. Every rank raises it, and the parameters are those before the failed step."""


@dataclass(frozen=True)
class Window:
    """The numbers of one finished optimiser step, over all ranks."""

    step: int  # 1 is the first of the run
    epoch: int  # 0 is the first of the run
    loss: float  # mean over trained tokens, nats
    lr: float
    tokens: int  # input tokens, padding not counted
    trained_tokens: int
    grad_norm: float  # before clipping


class MicroBatches:
    """The micro-batches of one rank from step `first_step` of the run on, made by a thread while the model is busy.

    pin: put them into pinned memory, from which a GPU copies while the CPU goes on.
    """

    def __init__(self, plan: BatchPlan, epochs: int, rank: int, first_step: int, pin: bool = False):
        self.plan, self.rank, self.first_step, self.pin = plan, rank, first_step, pin
        self.steps = plan.total_steps(epochs) - first_step
        self._prefetch: Prefetch[Batch] | None = None

    def __len__(self) -> int:
        return self.steps * self.plan.accumulate

    def __iter__(self) -> Prefetch[Batch]:
        self._prefetch = Prefetch(self._batches())
        return self._prefetch

    @property
    def waited(self) -> float:
        """Seconds that the model has waited for its batches so far."""
        return self._prefetch.waited if self._prefetch else 0.0

    def close(self) -> None:
        """End the thread."""
        if self._prefetch:
            self._prefetch.close()

    def _batches(self) -> Iterator[Batch]:
        for step in range(self.first_step, self.first_step + self.steps):
            for micro in range(self.plan.accumulate):
                batch = self.plan.batch(*self.plan.locate(step), micro, self.rank)
                yield batch.pinned() if self.pin else batch


class Fetched:
    """A table of numbers on its way to the CPU.

    `tolist` waits for the work that was queued on the GPU before the table was fetched, not for later work.
    """

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def tolist(self) -> list[list[float]]:
        if self._arrived:
            self._arrived.synchronize()
        return self._values.tolist()


class TrainingModule(LightningModule):
    """Lightning's view of the model. Files hold the bare model's names, without any prefix of this class.

    first_step: how many optimiser steps an earlier process took, if this run continues one. lora_plus: see
    `parameter_groups`. recompute: what backward computes again.
    """

    def __init__(
        self,
        model: RWKV,
        plan: BatchPlan,
        epochs: int,
        config: OptimConfig,
        running: ModelConfig,
        first_step: int = 0,
        lora_plus: float = 1.0,
        recompute: Recompute = NOTHING,
    ):
        super().__init__()
        self.model, self.plan, self.epochs, self.config = model, plan, epochs, config
        self.running, self.first_step, self.lora_plus = running, first_step, lora_plus
        self.recompute = recompute
        self.total_steps = plan.total_steps(epochs)
        self.window: Window | None = None  # the last window whose step was taken
        self.signal = 0  # number of the signal to stop that this process has received; 0: none
        self.signal_anywhere = 0  # the same for all ranks together, as known at the end of the last window
        self.batches: MicroBatches | None = None
        self._micro = self._trained = self._tokens = 0
        self._step = first_step
        # The numbers of the current window. Each rank has a row: the loss of each of its micro-batches, then input
        # tokens, signal and gradient norm.
        self._table = torch.zeros(plan.world_size, plan.accumulate + 3, dtype=torch.float64)
        self._fetched: Fetched | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train_dataloader(self) -> MicroBatches:
        pin = self.trainer.strategy.root_device.type == "cuda"
        self.batches = MicroBatches(self.plan, self.epochs, self.global_rank, self.first_step, pin)
        return self.batches

    def close(self) -> None:
        """End the thread that makes batches, however the run ended."""
        if self.batches:
            self.batches.close()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, self.config.weight_decay, self.lora_plus)
        optimizer = make_optimizer(groups, self.config)
        optimizer.register_step_pre_hook(lambda *_: self._fetch())
        self._scales = [group["lr"] for group in groups]
        self._set_rates(optimizer)
        return optimizer

    def _set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Give each group the learning rate of the next step."""
        self._rate = learning_rate(self._step, self.total_steps, self.config)
        for group, scale in zip(optimizer.param_groups, self._scales, strict=True):
            group["lr"] = scale * self._rate

    def training_step(self, batch: Batch, index: int) -> Tensor:
        step, self._micro = divmod(index, self.plan.accumulate)
        self._step = self.first_step + step
        self._trained = batch.window_tokens
        if self._micro == 0:
            self._table = torch.zeros_like(self._table, device=self.device)
            self._tokens, self._fetched = 0, None
        if self._trained == 0:
            raise RunStopped(
                f"optimiser step {self._step + 1} has no trained token: every label of {self._rows()} is masked; "
                "look at these rows, at --loss_mask and at --ctx_len (a response beyond it is cut off)"
            )
        # Each trained token of the window counts alike. DeepSpeed divides by world_size when it averages over ranks.
        per_token = self.plan.world_size / self._trained
        loss = self._loss(batch, per_token)
        self._table[self.global_rank, self._micro] = loss.detach()
        self._tokens += batch.tokens
        # If the loss is not a finite number, this makes the scale and with it every gradient NaN. DeepSpeed then takes
        # no step, and `finish_window` finds the reason.
        return loss * (per_token + 0 * loss.detach())

    def _loss(self, batch: Batch, scale: float) -> Tensor:
        """Sum over the trained tokens of one micro-batch. scale: what it is multiplied by before backward."""
        options = {"l2wrap": self.config.l2wrap, "loss_scale": scale, "recompute": self.recompute}
        if self.running.chunk_ctx:
            assert batch.host
            return chunked_loss(
                self.model,
                batch.ids,
                batch.labels,
                chunk=self.running.chunk_ctx,
                bptt_chunks=self.running.bptt_chunks,
                cu_seqlens=batch.host.cu_seqlens,
                label_rows=batch.host.label_rows,
                widest=batch.widest,
                **options,
            )
        packed = {"cu_seqlens": batch.cu_seqlens, "label_rows": batch.label_rows}
        return self.model(batch.ids, labels=batch.labels, **packed, **options)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every rank the window's numbers of all ranks, and the optimiser its learning rate."""
        self._set_rates(optimizer)
        # fill_ because an assignment would copy the number to the GPU and wait for that.
        self._table[self.global_rank, -3].fill_(self._tokens)
        self._table[self.global_rank, -2].fill_(self.signal)
        if dist.is_initialized() and self.plan.world_size > 1:
            dist.all_reduce(self._table)

    def _fetch(self) -> None:
        """Begin to copy the window's numbers to the CPU, before the first parameter changes."""
        if self._fetched is None:
            norm = torch.as_tensor(self.trainer.model.optimizer._global_grad_norm)
            self._table[:, -1] = norm.to(self._table, non_blocking=True)
            self._fetched = Fetched(self._table)

    def finish_window(self) -> None:
        """Look at the window's numbers, after DeepSpeed's step: `window`.

        DeepSpeed takes no step if the norm of the gradient over all ranks is not a finite number: RunStopped.
        """
        self._fetch()  # nothing is fetched yet if DeepSpeed took no step
        assert self._fetched
        rows = self._fetched.tolist()
        losses = [loss for row in rows for loss in row[:-3]]
        tokens, signals, norms = zip(*(row[-3:] for row in rows), strict=True)
        self.signal_anywhere = int(max(signals))
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not all(map(math.isfinite, norms)):
            raise RunStopped(self._not_finite("loss" if bad else "gradient", bad or range(len(losses))))
        assert not bad, "DeepSpeed took a step on a gradient that is not finite"
        epoch, _ = self.plan.locate(self._step)
        loss = sum(losses) / self._trained
        self.window = Window(self._step + 1, epoch, loss, self._rate, int(sum(tokens)), self._trained, norms[0])

    def window_finished(self) -> bool:
        """Whether the micro-batch just done ended an optimiser step."""
        return self._micro + 1 == self.plan.accumulate

    def _not_finite(self, what: str, micro_batches: Iterable[int]) -> str:
        return (
            f"optimiser step {self._step + 1}: the {what} is not a finite number, from {self._rows(micro_batches)}; "
            "the step was not taken. Look at these rows and at the base model; a lower --lr_init or "
            "--precision fp32 helps where training diverged"
        )

    def _rows(self, micro_batches: Iterable[int] | None = None) -> str:
        """The origins of the samples in some micro-batches of the current window (None = all).

        micro_batches: their numbers, counted on from one rank to the next.
        """
        epoch, step = self.plan.locate(self._step)
        everything = range(self.plan.world_size * self.plan.accumulate)
        rows: list[str] = []
        for index in everything if micro_batches is None else micro_batches:
            rank, micro = divmod(index, self.plan.accumulate)
            rows += self.plan.batch(epoch, step, micro, rank).rows
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        return ", ".join(rows[:8]) + more
