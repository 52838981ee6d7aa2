"""Putting a prepared model where it is trained, tensor by tensor.

A base is only mapped when a run is prepared: its tensors are pages of the file, in the file's dtype, which all
processes share and the system drops when it needs them. Here each tensor gets its dtype and its device. At ZeRO stage 3
it is partitioned the moment it is there, so that no rank ever holds more than its share and one whole tensor; a model
that is handed to DeepSpeed unpartitioned goes whole to every GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback
from torch import nn

from rwkv_bone.adapters.registry import split_key
from rwkv_bone.checkpoints import param_part


class PlaceModel(Callback):
    """Place the model of a TrainingModule once the processes have met, before the strategy sees it.

    dtype: as `place` takes it.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def setup(self, trainer, module, stage) -> None:
        strategy = trainer.strategy
        partition = partitioner(strategy.config["zero_optimization"]) if strategy.zero_stage_3 else None
        place(module.model, strategy.root_device, self.dtype, partition)


def place(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    partition: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Move a model to `device`, its frozen base in `dtype`; what is trained, adapters and initial states are fp32.

    A tensor that has both already stays as it is, mapped if it was. `partition` is called with each parameter as soon
    as it is there; every rank must then place the same model.
    """
    for name, parameter in model.named_parameters():
        base = not (parameter.requires_grad or split_key(name) or param_part(name) == "state")
        # The optimiser writes into what is trained, and the broadcast before a partition into everything: each page of
        # a mapped file that is written to becomes this process's own.
        written = parameter.requires_grad or partition is not None
        parameter.data = parameter.data.to(device, dtype if base else torch.float32, copy=written)
        if partition:
            partition(parameter)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def partitioner(zero: Mapping) -> Callable[[nn.Parameter], None]:
    """What leaves a parameter with this rank's share of it alone, on the host if DeepSpeed's `zero_optimization` says
    so. The main process's values count, every rank must call it in the same order, and the process group must exist.
    """
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(zero)}
    # With a module, though an empty one: DeepSpeed then also has linear layers keep no gathered weight for backward.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    return lambda parameter: init._convert_to_zero_parameters([parameter])
