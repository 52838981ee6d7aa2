"""Whole tensors from parameters that ZeRO stage 3 has spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn


def whole(parameter: nn.Parameter):
    """A context in which `parameter` is whole. Every rank must enter it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def gather(parameters: Iterable[tuple[str, nn.Parameter]], keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU of named parameters, whatever the ZeRO stage. Every rank must call it, in the same order.

    One parameter at a time, so that stage 3 never holds more than one whole; `keep` = this rank wants the result.
    """
    state = {}
    for name, parameter in parameters:
        with whole(parameter):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state
