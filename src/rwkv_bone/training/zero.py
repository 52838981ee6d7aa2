"""DeepSpeed's ZeRO optimiser of stages 1 and 2, without what fp32 parameters and a single device do not need.

DeepSpeed keeps a master copy of the parameters in fp32, since it expects them in fewer bits; here they are fp32 already.
And it reduces, partitions and gathers on one device as it does on many: gradients go through a bucket and two flat
copies. Per trained parameter that is 28 bytes; what is left here are 16 on one device: value, gradient, two moments.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def lighten(zero: Any) -> None:
    """Take from the ZeRO optimiser that `deepspeed.initialize` made what it need not have. What it computes stays.

    An optimiser of stage 3 stays as it is, and one whose state is offloaded: there the master copy is on the CPU.
    """
    if type(zero) is not DeepSpeedZeroOptimizer or zero.cpu_offload:
        return
    _share_master_copies(zero)
    if zero.partition_count == [1] * len(zero.partition_count):
        zero.__class__ = OneDeviceZero
        zero.find_places()


def _share_master_copies(zero: DeepSpeedZeroOptimizer) -> None:
    """Let what the optimiser updates be this rank's part of the flat parameters, instead of a copy of it.

    After a step DeepSpeed copies the one to the other, now onto itself.
    """
    rank = torch.distributed.get_rank(zero.dp_process_group)
    for master, parts in zip(
        zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
    ):
        assert master.dtype == parts[rank].dtype and torch.equal(master, parts[rank])
        master.data = parts[rank]
    # Each parameter knows its place in the flat tensors: in the new ones.
    zero._link_all_hp_params()


class OneDeviceZero(DeepSpeedZeroOptimizer):
    """Stages 1 and 2 on one device, where both are the same: nothing is reduced, partitioned or gathered.

    An optimiser that DeepSpeed has made becomes this by its class. A gradient is added to the flat gradient of its
    group as soon as backward has it, so only one tensor's exists twice, and only for a moment. A step is not taken where
    the norm is not a finite number; that is decided on the device, for which nothing waits.
    """

    def find_places(self) -> None:
        """Look up where each parameter lies in the flat tensor of its group."""
        self._places: dict[nn.Parameter, tuple[int, int]] = {}  # offset and size
        for parameters, offsets in zip(self.round_robin_bit16_groups, self.round_robin_bit16_offsets, strict=True):
            self._places |= {p: (offset, p.numel()) for p, offset in zip(parameters, offsets, strict=True)}
        self._gradients: dict[int, Tensor] = {}  # of each group, from the first of a window to its step
        self._begun: set[nn.Parameter] = set()  # those that have a gradient in this window

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Called for each parameter of group `i` when backward has its gradient."""
        if i not in self._gradients:
            # Zeros: a parameter may have no gradient, and the end of the flat tensor is padding.
            self._gradients[i] = torch.zeros_like(self.single_partition_of_fp32_groups[i], requires_grad=False)
        place = self._gradients[i].narrow(0, *self._places[param]).view_as(param)
        if param in self._begun:
            place.add_(param.grad)
        else:
            place.copy_(param.grad)
            self._begun.add(param)
        param.grad = None

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """At the end of a window, for stage 1: there is nothing to reduce."""

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """At the end of each backward pass, for stage 2: there is nothing to partition."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip, and have AdamW take its step. `overflow` stays False: `_global_grad_norm` says whether it was taken."""
        flat = self.single_partition_of_fp32_groups
        gradients = [self._gradients.get(i, torch.zeros_like(x)) for i, x in enumerate(flat)]
        self._gradients, self._begun = {}, set()
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64).square().float().sqrt() for x in gradients]
        norm = self._global_grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.clip_grad:
            scale = 1 / ((norm + 1e-6) / self.clip_grad).clamp(min=1.0)
            torch._foreach_mul_(gradients, scale)
        for parameter, gradient in zip(flat, gradients, strict=True):
            parameter.grad = gradient
        # The fused step reads this flag, and then changes neither parameters nor moments nor the count of steps.
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        for parameter in flat:
            parameter.grad = None
        self._lazy_init_hp_params_optimizer_state()
