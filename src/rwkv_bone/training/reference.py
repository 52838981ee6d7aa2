"""What dpo and kto compare with: the log-probabilities of the answers by the model that the run begins with.

They are computed once, before the first step, so that no second model is in memory and a step has no second forward.
A file of the results folder keeps them, since the trained tensors soon hold other values: a continued run reads it, and
where it is lost, or lacks units that a longer run reads, the trained tensors get their first values for the pass.

Sizes: n units of a dataset, U units of a micro-batch, M members of a unit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.cluster.signs import progress
from rwkv_bone.config import TrainConfig
from rwkv_bone.console import counted, with_bar
from rwkv_bone.data import Batch, BatchPlan, Dataset
from rwkv_bone.errors import UserError
from rwkv_bone.models import NOTHING
from rwkv_bone.preferences.objective import Objective, summed
from rwkv_bone.training import project
from rwkv_bone.training.context import chunked_loss
from rwkv_bone.training.gather import full_shape, gathered
from rwkv_bone.training.module import MicroBatches, TrainingModule, evaluating
from rwkv_bone.training.prompts import shared_prompts

if TYPE_CHECKING:
    from rwkv_bone.training.saving import Output

TRAINING = "training"  # the name under which the file has the log-probabilities of the training data


@dataclass(frozen=True)
class Start:
    """The model that is compared with.

    name: what it is, in one word or hash. values: of the trained part, by key, if these are not what the model has when
    this process takes its first step; on the main process alone. obstacle: why they cannot be had.
    """

    name: str
    values: Mapping[str, Tensor] | None = None
    obstacle: str = ""


class Kept:
    """`reference.safetensors`: tensors under names, each with a text that says all that it was made from.

    The main process alone may use it. The file has checksums, and what is damaged is as good as missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem = ""  # what was wrong when it was last read, in words

    def read(self, name: str, made_from: str) -> Tensor | None:
        """The tensor, if it is there, in order, and made from that; else None, and `problem` says why."""
        try:
            tensors, origins = self._content()
        except (UserError, OSError) as error:
            self.problem = str(error)
            return None
        self.problem = ""
        if name not in tensors:
            self.problem = f"{self.path} has none of them"
        elif origins.get(name) != made_from:
            self.problem = f"those in {self.path} are of another model, or of other data"
        return None if self.problem else tensors[name]

    def keep(self, name: str, tensor: Tensor, made_from: str) -> None:
        """Add a tensor of floating-point numbers, or replace it. The file is replaced as a whole. OSError."""
        try:
            tensors, origins = self._content()
        except (UserError, OSError):
            tensors, origins = {}, {}
        tensors[name], origins[name] = tensor.detach().cpu(), made_from
        with checkpoints.atomic_path(self.path, overwrite=True) as temporary:
            checkpoints.save_tensors(temporary, tensors, {"made_from": origins})

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not self.path.exists():
            raise UserError(f"{self.path} is missing")
        tensors = checkpoints.read_state(self.path)
        origins = (checkpoints.read_metadata(self.path) or {}).get("made_from")
        if not isinstance(origins, dict):
            raise UserError(f"{self.path} does not say what it was made from")
        return dict(tensors), origins


class Reference(Callback):
    """Have the log-probabilities of all units that a run reads before its first step, and give them to the module.

    config: of a run that goes through the model as in training, so that the pass needs no more memory than a step.
    objective: what they are for. output: which part of the model is trained, and the fingerprints of base and data.
    """

    def __init__(
        self, config: TrainConfig, objective: Objective, start: Start, output: Output, report: Callable[[str], None]
    ):
        self.objective, self.start, self.keys, self.report = objective, start, output.keys, report
        self.micro_bsz, self.chunk = config.data.micro_bsz, config.model.chunk_ctx
        self.kept = Kept(Path(config.run.proj_dir) / project.REFERENCE)
        about = {name: output.metadata[name] for name in ("base", "architecture", "kind", "quant", "start")}
        self._made_from = about | {"precision": config.run.precision}
        self._data = output.metadata["data"]
        self._table = torch.empty(0)

    def of(self, numbers: Tensor) -> Tensor:
        """The log-probabilities of units, int64 [U] on the module's device -> float64 [U, M], of kto [U, M + 1]."""
        return self._table[numbers]

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        plan = module.plan
        units = plan.units_read(module.total_steps)
        self._table = self.table(trainer, module, TRAINING, plan.dataset, self._data, units)
        module.reference = self.of

    def made_from(self, data: str) -> str:
        """All that log-probabilities of data with this fingerprint depend on, as the file keeps it beside them."""
        return json.dumps(self._made_from | {"data": data}, sort_keys=True)

    def table(
        self,
        trainer: Trainer,
        module: TrainingModule,
        name: str,
        dataset: Dataset,
        data: str,
        units: np.ndarray | None = None,
    ) -> Tensor:
        """The log-probabilities by the model that is compared with, of these units (None: of all): from the file, under
        this name, and what that lacks computed and added to it. data: the fingerprint of the dataset.

        To be called on every rank. Returns float64 [n, M] (kto: M + 1) on the module's device, NaN where not asked for.
        """
        units = np.arange(len(dataset)) if units is None else units
        shape, made_from = (len(dataset), dataset.members + self.objective.needs_mismatched), self.made_from(data)
        found = self.kept.read(name, made_from) if trainer.is_global_zero else None
        if found is None or found.shape != shape:
            if module.first_step and self.kept.problem:
                self.report(f"reference {self.kept.problem}: it is computed anew, as of the start of the run")
            found = torch.full(shape, torch.nan, dtype=torch.float64)
        table = from_main(found.to(module.device))
        unknown = units[table.isnan().any(1).cpu().numpy()[units]]
        if not len(unknown):
            self.report(f"reference {_counted(dataset, name, len(units))} as {self.kept.path} has them")
            return table
        begin = time.perf_counter()
        how: dict[str, Any] = {"mismatched": self.objective.needs_mismatched}
        with self.model(trainer, module):
            rows = log_probabilities(module, dataset, unknown, micro_bsz=self.micro_bsz, chunk=self.chunk, **how)
        table[torch.from_numpy(unknown).to(module.device)] = rows
        said = f"reference {_counted(dataset, name, len(unknown))} in {time.perf_counter() - begin:.0f} s"
        if trainer.is_global_zero:
            with project.spared("a continued run computes them anew", self.report):
                self.kept.keep(name, table, made_from)
                said += f", kept in {self.kept.path}"
        self.report(said)
        return table

    @contextmanager
    def model(self, trainer: Trainer, module: TrainingModule) -> Iterator[None]:
        """In this context the module is the model that is compared with. Every rank must enter it.

        UserError where that model cannot be had any more.
        """
        obstacle, other = trainer.strategy.broadcast((self.start.obstacle, self.start.values is not None))
        if obstacle:
            folder = self.kept.path.parent
            raise UserError(
                f"--task {self.objective.task} compares with log-probabilities of the model that the run began with, "
                f"which cannot be had again: {obstacle}. Mend that, or put {self.kept.path.name} back into {folder} "
                "from a copy; another --proj_dir begins a new run"
            )
        if not other:
            yield
            return
        values = self.start.values or {}
        parameters = dict(module.model.named_parameters())
        before = {key: exchange(parameters[key], values.get(key)) for key in self.keys}
        yield
        for key in self.keys:
            exchange(parameters[key], before[key])


def _counted(dataset: Dataset, name: str, units: int) -> str:
    of = "" if name == TRAINING else f" of {name}"
    return f"log-probabilities of {counted(units, dataset.unit)}{of}"


@torch.no_grad()
def log_probabilities(
    module: TrainingModule,
    dataset: Dataset,
    units: np.ndarray | None = None,
    *,
    micro_bsz: int,
    chunk: int,
    mismatched: bool = False,
    doing: str = "computing the reference",
) -> Tensor:
    """The summed log-probabilities of the answers of some units (None: all), by the module as it is, without dropout.

    To be called on every rank. Returns float64 [n, M] on the module's device, n of `units` in their order; mismatched:
    with a further column, of each prompt with another prompt's answer. UserError, with the rows, where one is no finite
    number.
    """
    part = dataset if units is None else dataset.subset(units)
    part.repeats = None  # each once, whatever --data_weights says
    ranks = module.plan.world_size
    plan = BatchPlan(part, micro_bsz=micro_bsz, world_size=ranks, pack=True)
    # The module itself is called, not its model: at stage 3 DeepSpeed's hooks begin with that call.
    model = partial(chunked_loss, module, chunk=chunk) if chunk else module
    rows = torch.zeros(len(part), part.members + mismatched, dtype=torch.float64, device=module.device)

    def run(batch: Batch) -> Tensor:
        assert batch.host and batch.answers
        where, how = batch.host if chunk else batch, {"widest": batch.widest} if chunk else {}
        if batch.answers.members == 2 and not chunk:
            return summed(shared_prompts(module, batch, recompute=NOTHING), batch.answers)[0]
        packed = {"label_rows": where.label_rows, "cu_seqlens": where.cu_seqlens}
        return summed(model(batch.ids, labels=batch.labels, per_token=True, **packed, **how), batch.answers)[0]

    batches = MicroBatches(plan, plan.total_steps(1), module.global_rank, 0, module.device.type == "cuda")
    try:
        with evaluating(module, "the reference was computed"):
            for batch in with_bar(batches, len(batches), doing):
                batch = batch.to(module.device)
                assert batch.answers
                rows[batch.answers.units, : part.members] = run(batch)
                for other in batch.answers.mismatched if mismatched else ():
                    assert other.answers
                    rows[other.answers.units, part.members] = run(other)[:, 0]
    finally:
        batches.close()
    if dist.is_initialized() and ranks > 1:
        dist.all_reduce(rows)
    bad = np.flatnonzero(~rows.isfinite().all(1).cpu().numpy())
    if len(bad):
        named = ", ".join(part.sequences(int(number))[0].origin for number in bad[:3]) + ", ..." * (len(bad) > 3)
        raise UserError(
            f"the model gives {counted(len(bad), 'answer')} no finite probability ({named}): look at these rows and at "
            "the base model; --precision fp32 helps where numbers grew beyond what bf16 holds"
        )
    return rows


@torch.no_grad()
def exchange(parameter: nn.Parameter, value: Tensor | None) -> Tensor | None:
    """Give a placed parameter the main process's `value`, on every rank; what it held before, on the CPU, there."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    partitioned = hasattr(parameter, "ds_id")
    with gathered(parameter, writes=True):
        before = parameter.detach().to("cpu", copy=True) if main else None
        if partitioned:
            if main:
                assert value is not None
                parameter.copy_(value)
        else:
            new = torch.empty(full_shape(parameter), dtype=parameter.dtype) if value is None else value
            parameter.copy_(from_main(new.to(parameter, copy=True)))
    progress()
    return before


def from_main(value: Tensor) -> Tensor:
    """A tensor of the main process on every rank; `value` is one of the same shape, dtype and device there."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(value, 0)
    return value
