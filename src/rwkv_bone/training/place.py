"""Putting a prepared model where it is trained, tensor by tensor.

A prepared base is only mapped: its tensors are pages of the file, in the file's dtype. All processes share these pages,
and the system drops them when it needs the memory. Here each tensor gets its dtype and its device. At ZeRO stage 3 it
is partitioned at once, so that no rank ever holds more than its share and one full tensor: DeepSpeed would move a model
that is not partitioned to every GPU as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from rwkv_bone.adapters.registry import split_key
from rwkv_bone.checkpoints import param_part, taken_over
from rwkv_bone.models import RWKV
from rwkv_bone.training.module import TrainingModule


class PlaceModel(Callback):
    """Place the model of a TrainingModule as soon as the process group exists, before DeepSpeed gets it.

    dtype: of the frozen base.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def setup(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        strategy, partition = trainer.strategy, None
        if strategy.zero_stage_3:
            zero = strategy.config["zero_optimization"]
            zero.update(whole_at_a_time(module.model))
            partition = partitioner(zero)
        place(module.model, strategy.root_device, self.dtype, partition)


def place(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    partition: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Move a model to `device`, its frozen base as `dtype`; what is trained, adapters and initial states become fp32.

    A frozen tensor that has device and dtype already stays where it is, mapped if it was. `partition` is called with
    each parameter right after it was moved; every rank must then place the same model.
    """
    for name, parameter in model.named_parameters():
        base = not (parameter.requires_grad or split_key(name) or param_part(name) == "state")
        # The optimiser writes into what is trained, and the broadcast before a partition into every tensor. Each page
        # of a mapped file that is written to becomes memory of this process alone.
        written = parameter.requires_grad or partition is not None
        parameter.data = taken_over(parameter.data, device, dtype if base else torch.float32, copy=written)
        if partition:
            partition(parameter)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def whole_at_a_time(model: RWKV) -> dict[str, int]:
    """DeepSpeed's settings of stage 3 for how many elements of partitioned parameters are whole at a time.

    By default it keeps what is needed again within 10^9 elements, and so the whole of a smaller model from its forward
    pass to its backward. Here that is a block, which is needed again when it is computed again, and fetched ahead is
    half a block.
    """
    block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    return {
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": block,
        "stage3_prefetch_bucket_size": block // 2,
    }


def partitioner(zero: Mapping) -> Callable[[nn.Parameter], None]:
    """A function that reduces a parameter to this rank's share of it.

    zero: DeepSpeed's `zero_optimization`, which says whether the share lies on the CPU. The values of the main process
    are taken. The process group must exist, and every rank must call the function in the same order.
    """
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(zero)}
    # DeepSpeed is given an empty module because it then also keeps linear layers from storing gathered weights for
    # backward.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    return lambda parameter: init._convert_to_zero_parameters([parameter])
