"""One training step: loss, its normalisation, and the checks that stop a run before it damages anything.

An optimiser step consumes a *window*: `accumulate` micro-batches on each of `world_size` ranks. The gradient of a
window is that of (sum of the loss over its trained tokens) / (number of its trained tokens), however the window is
divided among devices, forward passes and micro-batches. Where answers are compared (--task dpo and its kin), the same
holds of the losses of its units, pairs or labelled answers, and their number.

On a GPU the Python code of a step runs ahead of the arithmetic, as long as nothing asks for a value. Only `Fetched`
does, once in an optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from rwkv_bone.config import ModelConfig, OptimConfig
from rwkv_bone.data import Batch, BatchPlan
from rwkv_bone.data.prefetch import Prefetch
from rwkv_bone.errors import UserError
from rwkv_bone.models import NOTHING, RWKV, Recompute
from rwkv_bone.preferences.objective import SUMS, Objective, figures, summed
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.optimizer import make_optimizer, parameter_groups
from rwkv_bone.training.prompts import shared_prompts
from rwkv_bone.training.schedule import learning_rate

# What ranks ask of one another at the end of a window: `TrainingModule.asks`, `TrainingModule.asked`.
ASKS = (
    "signal",  # the number of a signal to stop that has come; 0: none
    "save",  # 1: the state is due to be saved
    "time",  # 1: the time that the run was given is over
    "measure",  # what of the held-out data is to be measured after this step, as in measuring.py; 0: nothing
)


class RunStopped(UserError):
    """The run cannot go on. Every rank raises it, and the parameters are those before the failed step."""


@dataclass(frozen=True)
class Window:
    """The numbers of one finished optimiser step, over all ranks. What is not a finite number is None."""

    step: int  # 1 is the first of the run
    epoch: int  # 0 is the first of the run
    loss: float | None  # mean over trained tokens, nats; where answers are compared, over units
    lr: float
    tokens: int  # input tokens, padding not counted
    trained_tokens: int
    grad_norm: float | None  # before clipping; None: the step was skipped
    units: int | None = None  # pairs or labelled answers; None: answers are not compared
    figures: Mapping[str, float | None] | None = None  # FIGURES of preferences/objective.py

    def record(self) -> dict[str, Any]:
        """These numbers, as a line of the log has them."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("units", "figures")}
        if self.figures is None:
            return numbers
        return numbers | {"units": self.units, **self.figures}


class BadStep(NamedTuple):
    """An optimiser step that was skipped. The data and the learning rate go on as if it had been taken."""

    step: int  # 1 is the first of the run
    what: str  # "loss" or "gradient": what was not a finite number
    rows: str  # from where, such as `mine.jsonl:17`

    def __str__(self) -> str:
        return f"optimiser step {self.step}: the {self.what} is not a finite number, from {self.rows}"


def read_bad_steps(metadata: Mapping, path: Path) -> list[BadStep]:
    """The steps that were skipped before the state at `path`, with this metadata, was saved.

    The metadata's `bad_steps` is `TrainingModule.bad_steps` as JSON makes it; states of earlier versions have none.
    UserError for anything else.
    """
    found = metadata.get("bad_steps", [])
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, list) or [type(part) for part in one] != [int, str, str]:
            raise UserError(f"{path} is not the state of a run of this program: its bad_steps holds {one!r}")
    return [BadStep(*one) for one in found]


class MicroBatches:
    """The micro-batches of one rank, of `steps` optimiser steps after step `first_step` of the run, made by a thread
    while the model is busy.

    pin: put them into pinned memory, from which a GPU copies while the CPU goes on.
    """

    def __init__(self, plan: BatchPlan, steps: int, rank: int, first_step: int, pin: bool = False):
        self.plan, self.rank, self.first_step, self.pin = plan, rank, first_step, pin
        self.steps = steps
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

    first_step: the number of the last optimiser step of an earlier process, if this run continues one; bad_steps:
    those among them that were skipped. max_bad_steps: how many may be, in the whole run; each is told to `report`.
    lora_plus: see `parameter_groups`. recompute: what backward computes again. objective: the loss of answers that are
    compared; None: that of tokens. Where it needs one, `reference` is to be set before the first step.

    At the end of each window the ranks exchange numbers, and any part of a run may have one exchanged. Before it, such
    as in `on_before_optimizer_step`, a rank sets `asks[name]`, a name of ASKS; after it, such as in
    `on_train_batch_end`, every rank finds the largest number of all ranks in `asked[name]`.
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
        *,
        objective: Objective | None = None,
        bad_steps: Sequence[BadStep] = (),
        max_bad_steps: int = 0,
        report: Callable[[str], None] = print,
    ):
        super().__init__()
        self.model, self.plan, self.epochs, self.config = model, plan, epochs, config
        self.running, self.first_step, self.lora_plus = running, first_step, lora_plus
        self.recompute, self.objective = recompute, objective
        # Numbers of units, int64 [U] -> their answers' log-probabilities, float64 [U, members], and with labels that of
        # the prompt with another's answer in a further column.
        self.reference: Callable[[Tensor], Tensor] | None = None
        self.total_steps = plan.total_steps(epochs)
        self.steps_left = max(0, self.total_steps - first_step)  # for this process to take; fewer in a run that is over
        self.window: Window | None = None  # the last window that is finished
        self.bad_steps, self.max_bad_steps, self.report = list(bad_steps), max_bad_steps, report
        # What they were after the last step that was taken.
        self._good: tuple[Window | None, int] = None, len(self.bad_steps)
        self.doing = "held-out data was measured"  # where it is not trained: see `evaluating`
        self.asks = dict.fromkeys(ASKS, 0)  # by this rank
        self.asked = dict.fromkeys(ASKS, 0)  # by any rank, as known at the end of the last window
        self.batches: MicroBatches | None = None
        self._micro = self._trained = self._tokens = 0
        self._units = 0  # what the window's loss is a mean over: its units, or its trained tokens
        self._step = first_step
        # The numbers of the current window. Each rank has a row: the loss of each of its micro-batches, the sums of the
        # objective, then what it asks, input tokens and gradient norm.
        self._sums = slice(plan.accumulate, plan.accumulate + (len(SUMS) if objective else 0))
        self._table = torch.zeros(plan.world_size, self._sums.stop + len(ASKS) + 2, dtype=torch.float64)
        self._kl: Tensor | None = None  # the objective's estimate of the current window
        self._fetched: Fetched | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train_dataloader(self) -> MicroBatches:
        pin = self.trainer.strategy.root_device.type == "cuda"
        self.batches = MicroBatches(self.plan, self.steps_left, self.global_rank, self.first_step, pin)
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
        self._units = batch.answers.window_units if self.objective and batch.answers else self._trained
        # Each of them counts alike. DeepSpeed divides by world_size when it averages over ranks.
        scale = self.plan.world_size / self._units
        loss = self._loss(batch, scale)
        self._table[self.global_rank, self._micro] = loss.detach()
        self._tokens += batch.tokens
        # If the loss is not a finite number, this makes the scale and with it every gradient NaN, on every rank once
        # they are reduced. DeepSpeed then takes no step, and `finish_window` finds the reason.
        return loss * (scale + 0 * loss.detach())

    def _loss(self, batch: Batch, scale: float) -> Tensor:
        """Sum over the trained tokens or units of a micro-batch. scale: what it is multiplied by before backward."""
        if self.objective:
            return self._answers_loss(self.objective, batch)
        return self._run(batch, l2wrap=self.config.l2wrap, loss_scale=scale)

    def _answers_loss(self, objective: Objective, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch's units; what else is summed goes to the table."""
        answers, reference = batch.answers, None
        assert answers
        if objective.needs_reference:
            assert self.reference
            reference = self.reference(answers.units)
        if objective.needs_mismatched and self._micro == 0:
            self._kl = self._estimate_kl(batch)
        nll = self._run(batch, per_token=True)
        judged = None if reference is None else reference[:, : answers.members]
        loss, sums = objective(nll, answers, judged, self._kl)
        self._table[self.global_rank, self._sums] += sums
        return loss

    @torch.no_grad()
    def _estimate_kl(self, first: Batch) -> Tensor:
        """KTO's estimate of the KL divergence from the reference, from all units of the window, on all ranks.

        first: the first micro-batch of the window, which brings along the mismatched sequences of all.
        """
        assert first.answers and self.reference
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with evaluating(self, "the estimate of KL was made"):
            for batch in first.answers.mismatched:
                assert batch.answers
                logp, _ = summed(self._run(batch, per_token=True), batch.answers)
                total += (logp[:, 0] - self.reference(batch.answers.units)[:, -1]).sum()
        if dist.is_initialized() and self.plan.world_size > 1:
            dist.all_reduce(total)
        return (total / first.answers.window_units).clamp(min=0)

    def _run(self, batch: Batch, **options: Any) -> Tensor:
        """The model on one micro-batch: the sum over its trained tokens, or with per_token that of each."""
        options["recompute"] = self.recompute
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
        if batch.answers and batch.answers.members == 2 and batch.cu_seqlens is not None:
            return shared_prompts(self.model, batch, recompute=self.recompute)
        packed = {"cu_seqlens": batch.cu_seqlens, "label_rows": batch.label_rows}
        return self.model(batch.ids, labels=batch.labels, **packed, **options)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every rank the window's numbers of all ranks, and the optimiser its learning rate."""
        self._set_rates(optimizer)
        # fill_ because an assignment would copy the number to the GPU and wait for that.
        for place, number in enumerate([*self.asks.values(), self._tokens], self._sums.stop):
            self._table[self.global_rank, place].fill_(number)
        if dist.is_initialized() and self.plan.world_size > 1:
            dist.all_reduce(self._table)

    def _fetch(self) -> None:
        """Begin to copy the window's numbers to the CPU, before the first parameter changes."""
        if self._fetched is None:
            norm = torch.as_tensor(self.trainer.model.optimizer._global_grad_norm)
            self._table[:, -1] = norm.to(self._table, non_blocking=True)
            self._fetched = Fetched(self._table)

    def finish_window(self) -> None:
        """Look at the window's numbers, after DeepSpeed's step: `window` and `asked`.

        DeepSpeed takes no step if the norm of the gradient over all ranks is not a finite number. Then parameters,
        moments and AdamW's count of steps are as before, and the number of the step is used up. RunStopped if there
        were more such steps than may be: `window` and `bad_steps` are then those of the last step that was taken.
        """
        self._fetch()  # nothing is fetched yet if DeepSpeed took no step
        assert self._fetched
        rows, accumulate = self._fetched.tolist(), self.plan.accumulate
        losses = [loss for row in rows for loss in row[:accumulate]]
        *asked, tokens, norms = zip(*(row[self._sums.stop :] for row in rows), strict=True)
        self.asked = {name: int(max(numbers)) for name, numbers in zip(ASKS, asked, strict=True)}
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        skipped = not all(map(math.isfinite, norms))
        assert skipped or not bad, "DeepSpeed took a step on a gradient that is not finite"
        epoch, _ = self.plan.locate(self._step)
        loss = None if bad else sum(losses) / self._units
        norm = None if skipped else norms[0]
        self.window = Window(self._step + 1, epoch, loss, self._rate, int(sum(tokens)), self._trained, norm)
        if self.objective:
            sums = [sum(column) for column in zip(*(row[self._sums] for row in rows), strict=True)]
            self.window = replace(self.window, units=self._units, figures=figures(sums))
        if skipped:
            self._skip(BadStep(self._step + 1, "loss" if bad else "gradient", self._rows(bad or range(len(losses)))))
        else:
            self._good = self.window, len(self.bad_steps)

    def _skip(self, step: BadStep) -> None:
        """Count a step that was not taken. RunStopped if it is one too many."""
        self.bad_steps.append(step)
        count, most = len(self.bad_steps), self.max_bad_steps
        if count <= most:
            self.report(f"{step}; the step was skipped ({count} of the {most} that --max_bad_steps allows)")
            return
        message = self._too_many()
        self.window, good = self._good
        del self.bad_steps[good:]
        raise RunStopped(message)

    def _too_many(self) -> str:
        """Why the run stops: each of the bad steps, and the ways on."""
        *earlier, last = self.bad_steps
        before = "".join(f"\n{step}" for step in earlier)
        also = f". It is one more than --max_bad_steps {self.max_bad_steps} allows, after{before}" if earlier else ""
        if len(self.bad_steps) == self._step + 1:
            cause = "No step of this run went well, so look first at the base model"
        else:
            cause = "Look at these rows and at the base model"
        return (
            f"{last}; the step was not taken{also}\n{cause}. Where rows were at fault, mend or remove them and go on "
            "with the same command and --resume_with data_file. Where training diverged, go on with a lower --lr_init "
            "and --resume_with lr_init, or begin anew with --precision fp32"
        )

    def window_finished(self) -> bool:
        """Whether the micro-batch just done ended an optimiser step."""
        return self._micro + 1 == self.plan.accumulate

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


@contextmanager
def evaluating(module: TrainingModule, doing: str = "held-out data was measured") -> Iterator[None]:
    """In this context no dropout acts, which is for training alone. An error leaves it there: see `place_of`.

    doing: what is being done.
    """
    module.doing = doing
    module.eval()
    yield
    module.train()
