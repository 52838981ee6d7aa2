"""`resume.pth`, from which a run is continued: its layout, and how it is written and read back.

For every trained parameter the file holds its value, under its own name, and AdamW's moments, under `NAME.exp_avg` and
`NAME.exp_avg_sq`: full tensors in fp32, whatever the ZeRO stage. The metadata holds the step, the configuration, and
fingerprints of base and data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.checkpoints.numbers import check_finite
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.console import with_bar
from rwkv_bone.errors import UserError
from rwkv_bone.training.gather import full_shape, gathered, part_size
from rwkv_bone.training.module import TrainingModule

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 12  # of a trained one: its value and two moments, in fp32


def write(
    path: Path, zero: ZeROOptimizer, parameters: Mapping[str, nn.Parameter], metadata: dict, keep: bool
) -> str | None:
    """Replace the file at `path`, atomically, tensor by tensor. Every rank must call it.

    keep: this rank writes the file; the others only take part in the gathering. Returns what went wrong on the disk:
    it is not raised here because the other ranks know nothing of it.
    """
    _link_moments(zero)
    tensors, problem = _tensors(parameters, keep), None
    if keep:
        try:
            with atomic_path(path, overwrite=True) as temporary:
                shapes = layout(parameters)
                write_tensors(temporary, shapes, with_bar(tensors, len(shapes), f"saving {path.name}"), metadata)
        except (OSError, UserError) as error:
            problem = str(error)
    for _ in tensors:
        pass  # the other ranks take part in each gathering; the writing rank too, if its disk has failed
    return problem


def _tensors(parameters: Mapping[str, nn.Parameter], keep: bool) -> Iterator[tuple[str, Tensor]]:
    """(key, full tensor) in the order of the file, on the CPU. Every rank must exhaust it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    not_kept = torch.empty(0)
    for name, parameter in parameters.items():
        with gathered(parameter):
            value = parameter.detach().to("cpu", torch.float32, copy=True) if keep else not_kept
        yield name, value
        for moment in MOMENTS if parameter.requires_grad else ():
            value = safe_get_full_optimizer_state(parameter, moment)
            yield f"{name}.{moment}", value.cpu() if keep else not_kept


def layout(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Keys and shapes of the file, without values."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = torch.empty(full_shape(parameter), device="meta")
        if parameter.requires_grad:
            tensors |= {f"{name}.{moment}": tensors[name] for moment in MOMENTS}
    return tensors


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """UserError unless a file's tensors have the keys, shapes and dtypes that `layout` says, and can be trained on."""
    checkpoints.match_keys(expected, state, path)
    for key, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise UserError(f"{path}: {key} holds {str(tensor.dtype).removeprefix('torch.')}, expected float32")
    # The square of a large gradient may be infinite; the run went on with that, too.
    check_finite({key: tensor for key, tensor in state.items() if not key.endswith(f".{MOMENTS[1]}")}, path)


class RestoreMoments(Callback):
    """Give the optimiser, as soon as DeepSpeed has made it, the moments in the resume file at `path`.

    The main process alone reads it, since the other machines need not see its disk. step: how many optimiser steps were
    taken before.
    """

    def __init__(self, path: Path, step: int):
        self.path, self.step = path, step

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        state = checkpoints.read_state(self.path) if trainer.is_global_zero else None
        restore_moments(trainer.model.optimizer, trained, state, self.step, module.device)


def restore_moments(
    zero: ZeROOptimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor] | None,
    step: int,
    device: torch.device,
) -> None:
    """Set AdamW's state of every parameter. Every rank must call it.

    zero: DeepSpeed's optimiser of stage 1 to 3, which wraps AdamW. state: on rank 0, whose values all ranks get
    by way of `device`.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    partitioned = hasattr(next(iter(parameters.values())), "ds_id")
    flat_groups = zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
    for flat in flat_groups:
        # The same entries as AdamW makes at its first step.
        count = torch.tensor(float(step), device=flat.device)
        zero.optimizer.state[flat] = {"step": count, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    _link_moments(zero)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = _from_main(None if state is None else state[f"{name}.{moment}"], full_shape(parameter), device)
            if partitioned:
                # The function for full values fails where a parameter does not divide evenly among the ranks.
                safe_set_local_optimizer_state(parameter, _part(value, part_size(parameter)), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)


def _from_main(value: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """The fp32 tensor of rank 0 on every rank. value: None on the others."""
    if dist.get_world_size() == 1:
        assert value is not None
        return value
    value = torch.empty(shape, device=device) if value is None else value.to(device, copy=True)
    dist.broadcast(value, 0)
    return value


def _link_moments(zero: ZeROOptimizer) -> None:
    """At stages 1 and 2, tell each parameter where its moments lie in the flat tensor of its group.

    DeepSpeed itself does this once, after the first step of its first group, when other groups have no moments yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "single_partition_of_fp32_groups"):
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _part(value: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a flattened parameter; zeros stand beyond its end."""
    part = value.reshape(-1)[dist.get_rank() * size :][:size]
    return nn.functional.pad(part, (0, size - part.numel()))
