"""Full tensors of parameters of which, at ZeRO stage 3, each rank holds only a part."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rwkv_bone.cluster.signs import progress


def gathered(parameter: nn.Parameter, writes: bool = False) -> AbstractContextManager[None]:
    """A context in which this rank has the full `parameter`. Every rank must enter it.

    writes: what the main process has written into it by the end of the context, every rank has.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def part_size(parameter: nn.Parameter) -> int:
    """How many elements of a partitioned parameter each rank holds, padding included."""
    # DeepSpeed adds this attribute to the parameters that it partitions.
    return parameter.ds_tensor.numel()  # type: ignore[attr-defined]


def gather(parameters: Iterable[tuple[str, nn.Parameter]], keep: bool) -> dict[str, Tensor]:
    """Full copies of named parameters on the CPU, whatever the ZeRO stage. Every rank must call it, in the same order.

    Parameters are gathered one at a time, so that at stage 3 only one of them is ever full on the device. keep: this
    rank wants the result; the others get an empty dictionary.
    """
    state = {}
    for name, parameter in parameters:
        with gathered(parameter):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
        progress()
    return state
