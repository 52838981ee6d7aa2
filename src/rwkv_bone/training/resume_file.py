"""The state of a run, from which it is continued: `resume.pth`, and `resume.previous.pth`, the one before it.

For every trained parameter a file holds its value, under its own name, and AdamW's moments, under `NAME.exp_avg` and
`NAME.exp_avg_sq`: full tensors in fp32, whatever the ZeRO stage. The metadata holds the step, the configuration,
fingerprints of base and data, and the name of the adapter that was saved with it, if one was. Everything in a file has
a checksum, and nothing of it is used before all of them are compared: what is damaged is as good as missing, and the
one before counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import atomic_path, give_back
from rwkv_bone.checkpoints.numbers import check_finite, is_finite
from rwkv_bone.checkpoints.stream import write_tensors
from rwkv_bone.cluster.signs import progress
from rwkv_bone.console import with_bar
from rwkv_bone.errors import UserError
from rwkv_bone.training import project
from rwkv_bone.training.gather import full_shape, gathered, part_size
from rwkv_bone.training.module import TrainingModule

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


# The metadata that every state has.
KINDS = {"trained": str, "step": int, "config": dict, "architecture": dict, "base": str | None, "data": str}


@dataclass(frozen=True)
class Found:
    """A state that was found in order: its file, its metadata, and what is wrong with the newer one, in words."""

    path: Path
    metadata: dict
    notes: tuple[str, ...] = ()


def read_newest(folder: Path) -> Found | None:
    """The newest usable state in a folder; None if there is none at all. Only reads.

    UserError if there are states, and none of them is in order: it names them and the way on.
    """
    problems: list[str] = []
    paths = [folder / name for name in (project.RESUME_FILE, project.PREVIOUS_FILE)]
    for path in paths:
        if not path.exists():
            problems.append(f"{path} is missing")
            continue
        try:
            metadata = verify(path)
        except (UserError, OSError) as error:
            problems.append(str(error))
            continue
        return Found(path, metadata, tuple(f"{path.name} is used, the state before: {why}" for why in problems))
    if not any(path.exists() for path in paths):
        return None
    raise UserError(
        f"no state of the run in {folder} can be used: {'; '.join(problems)}. Start a new run from its newest adapter, "
        "with --peft_load and another --proj_dir, or begin again with --overwrite 1"
    )


def verify(path: Path) -> dict:
    """The metadata of a state, after all that can be known without the model was compared: checksums, structure,
    metadata, and that the values can be trained on. UserError, or OSError, that says what is wrong."""
    metadata = checkpoints.read_metadata(path) or {}
    if not all(name in metadata and isinstance(metadata[name], kind) for name, kind in KINDS.items()):
        raise UserError(f"{path} is not the state of a run of this program, or is damaged")
    if isinstance(metadata["step"], bool) or metadata["step"] < 1:
        raise UserError(f"{path} is damaged: it says that it is of step {metadata['step']}")
    check_values(checkpoints.read_state(path), path)
    return metadata


def write(
    folder: Path,
    zero: ZeROOptimizer,
    parameters: Mapping[str, nn.Parameter],
    metadata: dict,
    *,
    keep: bool,
    rotate: bool,
) -> str | None:
    """Replace the state in a folder, atomically, tensor by tensor. Every rank must call it.

    keep: this rank writes the file; the others only take part in the gathering. rotate: the state that is there is in
    order, and becomes the previous one. Returns what went wrong on the disk, or that a value cannot be trained on; it
    is not raised here because the other ranks know nothing of it.
    """
    _begin_moments(zero, 0)  # every step so far may have been skipped
    _link_moments(zero)
    path, bad = folder / project.RESUME_FILE, list[str]()
    tensors, problem = _tensors(parameters, keep, bad), None
    if keep:
        try:
            with atomic_path(path, True, folder / project.PREVIOUS_FILE if rotate else None) as temporary:
                shapes = layout(parameters)
                write_tensors(temporary, shapes, with_bar(tensors, len(shapes), f"saving {path.name}"), metadata)
                if bad:
                    raise UserError(diverged(bad))
        except (OSError, UserError) as error:
            problem = str(error) or type(error).__name__
    for _ in tensors:
        pass  # the other ranks take part in each gathering; the writing rank too, if its disk has failed
    return problem


def _tensors(parameters: Mapping[str, nn.Parameter], keep: bool, bad: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, full tensor) in the order of the file, on the CPU. Every rank must exhaust it.

    The keys of those that cannot be trained on are added to `bad`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    not_kept = torch.empty(0)
    for name, parameter in parameters.items():
        with gathered(parameter):
            value = parameter.detach().to("cpu", torch.float32, copy=True) if keep else not_kept
        if not _is_usable(name, value):
            bad.append(name)
        progress()
        yield name, value
        for moment in MOMENTS if parameter.requires_grad else ():
            full = safe_get_full_optimizer_state(parameter, moment)
            value = full.cpu() if keep else not_kept
            if not _is_usable(f"{name}.{moment}", value):
                bad.append(f"{name}.{moment}")
            yield f"{name}.{moment}", value


def layout(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Keys and shapes of the file, without values."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = torch.empty(full_shape(parameter), device="meta")
        if parameter.requires_grad:
            tensors |= {f"{name}.{moment}": tensors[name] for moment in MOMENTS}
    return tensors


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """UserError unless a file's tensors have the keys, shapes and dtypes that `layout` says."""
    checkpoints.match_keys(expected, state, path)
    for key, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise UserError(f"{path}: {key} holds {str(tensor.dtype).removeprefix('torch.')}, expected float32")


def check_values(state: Mapping[str, Tensor], path: Path) -> None:
    """UserError if values or moments cannot be trained on."""
    second = {key: tensor for key, tensor in state.items() if _is_square(key)}
    check_finite({key: tensor for key, tensor in state.items() if key not in second}, path)
    for key, tensor in second.items():
        if not _is_usable(key, tensor):
            raise UserError(f"{path}: {key} holds NaN")
        give_back(tensor)


def diverged(keys: Sequence[str]) -> str:
    """Why nothing is saved: these tensors hold NaN or infinity."""
    others = f", and so do {len(keys) - 1} other tensors" if len(keys) > 1 else ""
    return (
        f"{keys[0]} holds NaN or infinity{others}: that is not saved, and no earlier file is replaced. Training "
        "diverged: a lower --lr_init or --precision fp32 helps"
    )


def _is_usable(key: str, tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. The square of a large gradient may be infinite; a run goes on with that."""
    if not _is_square(key):
        return is_finite(tensor)
    return not tensor.numel() or not bool(torch.stack(tensor.aminmax()).isnan().any())


def _is_square(key: str) -> bool:
    return key.endswith(f".{MOMENTS[1]}")


def is_moment(key: str) -> bool:
    return key.endswith(tuple(f".{moment}" for moment in MOMENTS))


class RestoreMoments(Callback):
    """Give the optimiser, as soon as DeepSpeed has made it, the moments in the resume file at `path`.

    The main process alone reads it, since the other machines need not see its disk. step: how many optimiser steps were
    taken before, without those that were skipped.
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
    _begin_moments(zero, step, anew=True)
    _link_moments(zero)
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = _from_main(None if state is None else state[f"{name}.{moment}"], full_shape(parameter), device)
            if partitioned:
                # The function for full values fails where a parameter does not divide evenly among the ranks.
                safe_set_local_optimizer_state(parameter, _part(value, part_size(parameter)), moment)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)


def _begin_moments(zero: ZeROOptimizer, step: int, anew: bool = False) -> None:
    """Give AdamW moments of zero: the same entries as it makes itself at its first step.

    step: how many steps it has taken. anew: also where it has moments.
    """
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups:
        if anew or not zero.optimizer.state[flat]:
            count = torch.tensor(float(step), device=flat.device)
            zero.optimizer.state[flat] = {"step": count, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}


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
