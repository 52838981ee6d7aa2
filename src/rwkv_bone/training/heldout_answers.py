"""Held-out preference data, measured: the task's loss, the figures of its answers, and how far the model has moved.

Sizes: n units, M members of a unit, R labelled tokens, N positions, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rwkv_bone.console import with_bar
from rwkv_bone.data import Batch, BatchPlan, Dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.data.sampler import Answers
from rwkv_bone.preferences.divergence import Rows, divergence, places
from rwkv_bone.preferences.losses import kl_estimate
from rwkv_bone.preferences.objective import SUMS, Objective, figures, summed
from rwkv_bone.training import project
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.reference import Kept, Reference, from_main


class Loss(NamedTuple):
    """What a pass over held-out data gives."""

    loss: float  # nats per trained token; of preference data the task's loss of a unit
    tokens: int  # trained tokens
    preference: dict[str, float | None] | None = None  # of preference data: FIGURES and the divergence


class MeasureAnswers:
    """Measures preference data. Every rank does the same.

    The answers of a dataset are compared with what `reference` gives of them, to be set before `begin` where the
    objective needs one. The divergence is that from the model at the first step of the run: of a dataset that is
    measured there the rows are kept, in the file too, for a run that goes on.
    """

    def __init__(self, objective: Objective, kept: Kept, *, micro_bsz: int, chunk: int, report: Callable[[str], None]):
        self.objective = objective
        self._kept, self._micro_bsz, self._chunk, self._report = kept, micro_bsz, chunk, report
        self.reference: Reference | None = None
        self._references: dict[str, Tensor] = {}  # float64 [n, M], of kto [n, M + 1]
        self._starts: dict[str, Tensor] = {}  # [N, C]
        self._silent = False  # whether there is no divergence

    def begin(self, trainer: Trainer, module: TrainingModule, datasets: Mapping[str, Dataset]) -> None:
        """Have what the datasets, under these names, are compared with. To be called on every rank."""
        if self.objective.needs_reference:
            assert self.reference
            for name, dataset in datasets.items():
                data = data_fingerprint(dataset)
                self._references[name] = self.reference.table(trainer, module, name, dataset, data)
        if any(parameter.requires_grad for parameter in module.model.head.parameters()):
            self._silent = True
            self._report("held-out  no divergence from the start (KL): it is computed for a head that is not trained")
        elif module.first_step:
            self._read_starts(trainer, module, datasets)

    def _read_starts(self, trainer: Trainer, module: TrainingModule, datasets: Mapping[str, Dataset]) -> None:
        lacks = []
        for name, dataset in datasets.items():
            rows = None
            if trainer.is_global_zero:
                rows = self._kept.read(_rows_of(name), data_fingerprint(dataset))
            shape = trainer.strategy.broadcast(None if rows is None else (tuple(rows.shape), rows.dtype))
            if shape is None:
                lacks.append(name)
                continue
            rows = torch.empty(shape[0], dtype=shape[1]) if rows is None else rows
            self._starts[name] = from_main(rows.to(module.device))
        if lacks:
            self._report(
                f"held-out  no divergence from the start (KL) of {', '.join(lacks)}: {self._kept.path} does not have "
                "what it is computed from"
            )

    @torch.no_grad()
    def __call__(self, module: TrainingModule, name: str, dataset: Dataset) -> Loss:
        """Measure a dataset that `begin` knows under this name, by the module as it is."""
        reference, members = self._references.get(name), dataset.members
        each = dataset.subset(np.arange(len(dataset)))
        each.repeats = None  # once, whatever --data_weights says
        plan = BatchPlan(each, micro_bsz=self._micro_bsz, pack=True)
        rows = None if self._silent else Rows(module.model.ln_out, places(dataset))
        found: list[tuple[Tensor, Answers]] = []
        gains: list[tuple[Tensor, Tensor]] = []  # kto: log-probabilities of prompts with answers of others
        tokens, steps = 0, plan.total_steps(1)
        for step in with_bar(range(steps), steps, "measuring the held-out loss"):
            batch = plan.batch(0, step, 0, 0).to(module.device)
            assert batch.answers
            if rows is None:
                nll = self._run(module, batch)
            else:
                with rows.of(batch):
                    nll = self._run(module, batch)
            found.append((nll, batch.answers))
            tokens += batch.window_tokens
            for other in batch.answers.mismatched if self.objective.needs_mismatched else ():
                assert other.answers and reference is not None
                policy = summed(self._run(module, other), other.answers)[0][:, 0]
                gains.append((policy, reference[other.answers.units, -1]))
        kl = kl_estimate(*map(torch.cat, zip(*gains, strict=True))) if gains else None
        loss = torch.zeros((), dtype=torch.float64, device=module.device)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=module.device)
        for nll, answers in found:
            judged = None if reference is None else reference[answers.units, :members]
            outcome = self.objective(nll, answers, judged, kl)
            loss, sums = loss + outcome.loss, sums + outcome.sums
        moved = None if rows is None else self._moved(module, name, dataset, rows.all())
        preference = figures(sums.tolist()) | {"divergence": moved}
        return Loss(loss.item() / len(dataset), tokens, preference)

    def _run(self, module: TrainingModule, batch: Batch) -> Tensor:
        """-log p of each labelled token, [R]."""
        # The module itself is called, not its model: at stage 3 DeepSpeed's hooks begin with that call.
        where, model = batch, cast("Callable[..., Tensor]", module)
        if self._chunk:
            assert batch.host
            where, model = batch.host, partial(chunked_loss, module, chunk=self._chunk)
        packed = {"label_rows": where.label_rows, "cu_seqlens": where.cu_seqlens}
        return model(batch.ids, labels=batch.labels, per_token=True, **packed)

    def _moved(self, module: TrainingModule, name: str, dataset: Dataset, rows: Tensor) -> float | None:
        """The mean divergence from the start, nats per token; before the first step these rows are the start."""
        if name not in self._starts:
            if module.first_step or module.window:
                return None
            self._starts[name] = rows
            if module.global_rank == 0:
                with project.spared("a continued run has no divergence from the start", self._report):
                    self._kept.keep(_rows_of(name), rows, data_fingerprint(dataset))
        model = module.model
        found = divergence(rows, self._starts[name], model.head, model.arch.vocab_size).double().mean().item()
        return found if math.isfinite(found) else None


def _rows_of(name: str) -> str:
    """Under which name the file has the rows of a dataset."""
    return f"{name}, rows"
