"""One training step: loss, its normalisation, and the checks that stop a run before it damages anything.

An optimiser step consumes a *window*: `accumulate` micro-batches on each of `world_size` ranks. The gradient of a
window is that of (sum of the loss over its trained tokens) / (number of its trained tokens), however the window is cut
into devices, accumulation and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from rwkv_bone.config import ModelConfig, OptimConfig
from rwkv_bone.data import Batch, BatchPlan
from rwkv_bone.errors import UserError
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from rwkv_bone.training.schedule import learning_rate


class RunStopped(UserError):
    """Raised on every rank at once: the run cannot go on, and the parameters are those before the failed step."""


@dataclass(frozen=True)
class Window:
    """What one finished optimiser step was, summed over all ranks."""

    step: int  # 1 is the first of the run
    epoch: int  # 0 is the first of the run
    loss: float  # mean over trained tokens, nats
    lr: float
    tokens: int  # input tokens, padding not counted
    trained_tokens: int


class MicroBatches(Dataset):
    """The micro-batches of one rank in order: item i belongs to window first_step + i // accumulate of the run."""

    def __init__(self, plan: BatchPlan, epochs: int, rank: int, first_step: int):
        self.plan, self.epochs, self.rank, self.first_step = plan, epochs, rank, first_step

    def __len__(self) -> int:
        return (self.plan.total_steps(self.epochs) - self.first_step) * self.plan.accumulate

    def __getitem__(self, index: int) -> Batch:
        window, micro = divmod(index, self.plan.accumulate)
        return self.plan.batch(*self.plan.locate(self.first_step + window), micro, self.rank)


class TrainingModule(LightningModule):
    """Holds the bare model; no name of this class ever reaches a file.

    `first_step` optimiser steps were taken by an earlier process, whose run this one continues. `lora_plus`: as
    `parameter_groups` takes it.
    """

    def __init__(
        self,
        model,
        plan: BatchPlan,
        epochs: int,
        config: OptimConfig,
        running: ModelConfig,
        first_step: int = 0,
        lora_plus: float = 1.0,
    ):
        super().__init__()
        self.model, self.plan, self.epochs, self.config = model, plan, epochs, config
        self.running, self.first_step, self.lora_plus = running, first_step, lora_plus
        self.total_steps = plan.total_steps(epochs)
        self.window: Window | None = None  # the last one whose step was taken
        self._pending: Window | None = None
        self._micro = self._trained = 0
        self._step = first_step
        # Of the window under way: the loss of each [rank, micro-batch], and the input tokens as one last number.
        self._sums = torch.zeros(plan.world_size * plan.accumulate + 1, dtype=torch.float64)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(MicroBatches(self.plan, self.epochs, self.global_rank, self.first_step), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def configure_optimizers(self):
        groups = parameter_groups(self.model, self.config.weight_decay, self.lora_plus)
        optimizer = make_optimizer(groups, self.config)
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate(self.first_step + step, self.total_steps, self.config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        step, self._micro = divmod(index, self.plan.accumulate)
        self._step = self.first_step + step
        self._trained = batch.window_tokens
        if self._micro == 0:
            self._sums = torch.zeros_like(self._sums, device=self.device)
        if self._trained == 0:
            raise RunStopped(
                f"optimiser step {self._step + 1} has no trained token: every label of {self._rows()} is masked; "
                "look at these rows, at --loss_mask and at --ctx_len (a response beyond it is cut off)"
            )
        loss = self._loss(batch)
        self._sums[self.global_rank * self.plan.accumulate + self._micro] = loss.detach()
        self._sums[-1] += batch.tokens
        # Averaging over ranks divides by world_size and Lightning by accumulate: both are undone here.
        return loss * (self.plan.world_size * self.plan.accumulate / self._trained)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Sum over the trained tokens of one micro-batch."""
        how = {"l2wrap": self.config.l2wrap, "grad_cp": self.running.grad_cp, "cu_seqlens": batch.cu_seqlens}
        chunk, cut = self.running.chunk_ctx, self.running.bptt_chunks
        if chunk:
            how |= {"chunk": chunk, "bptt_chunks": cut, "widest": batch.widest}
            return chunked_loss(self.model, batch.ids, batch.labels, **how)
        return self.model(batch.ids, labels=batch.labels, **how)

    def on_before_optimizer_step(self, optimizer) -> None:
        """At the end of a window: the true loss over all ranks, or the end of the run if it is not finite."""
        if not self.window_finished():
            return
        if dist.is_initialized() and self.plan.world_size > 1:
            dist.all_reduce(self._sums)
        *losses, tokens = self._sums.tolist()
        loss = sum(losses) / self._trained
        if not abs(loss) < float("inf"):
            bad = [i for i, value in enumerate(losses) if not abs(value) < float("inf")]
            raise RunStopped(self._not_finite("loss", bad))
        lr = learning_rate(self._step, self.total_steps, self.config)
        epoch, _ = self.plan.locate(self._step)
        self._pending = Window(self._step + 1, epoch, loss, lr, int(tokens), self._trained)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # DeepSpeed takes no step when the gradient's norm is not finite, and decides it over all ranks.
        if not self.window_finished():
            return
        if self.trainer.model.optimizer.overflow:
            raise RunStopped(self._not_finite("gradient", range(self.plan.world_size * self.plan.accumulate)))
        self.window = self._pending

    def window_finished(self) -> bool:
        """Whether the micro-batch just done ended an optimiser step."""
        return self._micro + 1 == self.plan.accumulate

    def _not_finite(self, what: str, micro_batches) -> str:
        return (
            f"optimiser step {self._step + 1}: the {what} is not a finite number, from {self._rows(micro_batches)}; "
            "the step was not taken. Look at these rows and at the base model; a lower --lr_init or "
            "--precision fp32 helps where training diverged"
        )

    def _rows(self, micro_batches=None) -> str:
        """The origins of the samples in micro-batches of the window under way, by their index in `_sums`."""
        epoch, step = self.plan.locate(self._step)
        everything = range(self.plan.world_size * self.plan.accumulate)
        rows = []
        for index in everything if micro_batches is None else micro_batches:
            rank, micro = divmod(index, self.plan.accumulate)
            rows += self.plan.batch(epoch, step, micro, rank).rows
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        return ", ".join(rows[:8]) + more
