"""DeepSpeed's ZeRO optimisers, without what fp32 parameters and a single device do not need.

DeepSpeed keeps a master copy of the parameters in fp32, since it expects them in fewer bits; ours are fp32 already. And
it reduces, partitions and gathers on one device as it does on many: gradients go through a bucket and two flat copies.
Of the 24 to 28 bytes of a trained parameter 12 are left here on one device, its value and two moments, and 4 as soon
as its gradient is there; at most 20 in the step, where gradients are flattened. At stage 3 backward begins with 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

NORM_PIECE = 2**22  # elements: in fp64, 32 MB


def lighten(zero: Any) -> None:
    """Take from the ZeRO optimiser that `deepspeed.initialize` made what it need not have. What it computes stays.

    At stages 1 and 2 with offload the master copy stays, since it is on the CPU; but there is no second one, rounded,
    through which DeepSpeed would send it to the device.
    """
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        _share(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat)
    elif zero.cpu_offload:
        zero.param_buffer_of_bit16_for_cpu_offload_groups = list(zero.single_partition_of_fp32_groups)
    else:
        rank = torch.distributed.get_rank(zero.dp_process_group)
        _share(zero.single_partition_of_fp32_groups, [parts[rank] for parts in zero.parallel_partitioned_bit16_groups])
        # Each parameter knows its place in the flat tensors: in the new ones.
        zero._link_all_hp_params()
        if zero.partition_count == [1] * len(zero.partition_count):
            zero.__class__ = OneDeviceZero
            zero.begin()


def _share(masters: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Let what the optimiser updates be this rank's part of the flat parameters, instead of a copy of it.

    After a step DeepSpeed copies the one to the other, now onto itself.
    """
    for master, part in zip(masters, parts, strict=True):
        assert master.dtype == part.dtype and torch.equal(master, part)
        master.data = part  # at stage 3 with offload both are on the CPU


def _norm(flat: Tensor) -> Tensor:
    """The norm of a flat tensor, in fp64. Piece by piece, since PyTorch makes a copy in fp64 of what it gets."""
    pieces = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in flat.split(NORM_PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces))


class OneDeviceZero(DeepSpeedZeroOptimizer):
    """Stages 1 and 2 on one device, where both are the same: nothing is reduced, partitioned or gathered.

    An optimiser that DeepSpeed has made becomes this by its class. Autograd makes each gradient when its own first one
    arrives, and adds the window's others to it; `step` joins those of a group. A step is not taken where their norm is
    not a finite number; that is decided on the device, for which nothing waits.
    """

    def begin(self) -> None:
        """To be called once, when an optimiser has become this one."""
        for hook in self._grad_acc_hooks:  # those which would fill the bucket
            hook.remove()

    def _joined(self) -> list[Tensor]:
        """The gradients of each group in one flat tensor, zeros where none has come; those of parameters are freed."""
        joined: list[Tensor] = []
        for flat, parameters in zip(self.single_partition_of_fp32_groups, self.round_robin_bit16_groups, strict=True):
            pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            pieces.append(flat.new_zeros(flat.numel() - sum(p.numel() for p in parameters)))
            joined.append(self.flatten(pieces))
            for parameter in parameters:
                parameter.grad = None
        return joined

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip, and have AdamW take its step. `overflow` stays False: `_global_grad_norm` says whether it was taken."""
        flat, gradients = self.single_partition_of_fp32_groups, self._joined()
        norms = [_norm(gradient).square().float().sqrt() for gradient in gradients]
        norm = self._global_grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.clip_grad:
            torch._foreach_mul_(gradients, 1 / ((norm + 1e-6) / self.clip_grad).clamp(min=1.0))
        for parameter, gradient in zip(flat, gradients, strict=True):
            parameter.grad = gradient
        # The fused step reads this flag, and then changes neither parameters nor moments nor the count of steps.
        self.optimizer.found_inf = (norm * 0).ne(0).float()
        self.optimizer.step()
        for parameter in flat:
            parameter.grad = None
        self._lazy_init_hp_params_optimizer_state()
