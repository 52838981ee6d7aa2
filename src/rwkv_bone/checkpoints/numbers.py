"""Whether the numbers of a checkpoint are ones that can be computed with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints.pages import give_back
from rwkv_bone.checkpoints.stream import DTYPE_NAMES
from rwkv_bone.errors import UserError

PIECE = 1 << 22  # values counted at once


def check_dtypes(state: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError naming a tensor that does not hold floating point of a kind that checkpoints have."""
    for key, tensor in state.items():
        if tensor.dtype not in DTYPE_NAMES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: {key} holds {dtype}, expected float32, bfloat16 or float16: is the model quantised?"
            )


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError naming a tensor that holds NaN or infinity. One pass over all values, faster than their checksums;
    no page of a mapped file stays resident."""
    bad = []
    for key, tensor in state.items():
        if not is_finite(tensor):
            bad.append(key)
        give_back(tensor)
    if bad:
        tensor = state[bad[0]].reshape(-1)
        count = sum(int((~piece.isfinite()).sum()) for piece in tensor.split(PIECE))
        others = f", and so do {len(bad) - 1} other tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{source}: {bad[0]} holds NaN or infinity ({count:,} of {tensor.numel():,} values){others}: the run that "
            "made it diverged, or the numbers were too large for the dtype; use an earlier save, or the original file"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy: a NaN is its own minimum and maximum."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
