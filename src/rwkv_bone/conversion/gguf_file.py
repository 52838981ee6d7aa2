"""GGUF files, for llama.cpp and the programs around it: RWKV-6 and RWKV-7, written one tensor at a time.

`gguf_names.py` has the names and orientations; the PyPI package `gguf` has the container and its number formats.
Matrices are stored in the type asked for. All other tensors, the low-rank networks among them, stay fp32 in every type,
as llama.cpp wants them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_bone.checkpoints import Architecture, match_keys, param_part
from rwkv_bone.conversion.gguf_names import VERSIONS, Row, from_gguf, left_out, rows, to_gguf
from rwkv_bone.errors import UserError
from rwkv_bone.models import build

log = logging.getLogger("rwkv_bone")

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
# The name, in gguf's enumerations, of a tensor's type and of a file whose matrices are mostly of it.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 32  # numbers of q8_0 that share a scale, in fp16
# The largest number that a type holds. One of q8_0 is an integer of up to 127 times the scale.
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()}
LARGEST["q8_0"] = 127 * LARGEST["f16"]
CONTEXT_LENGTH = 1 << 20  # RWKV has no limit; llama.cpp wants a number, and this is what its own converter writes
LAYER_NORM_EPS = 1e-5  # of ln0, ln1, ln2, ln_out; llama.cpp knows that of ln_x


def obstacle(arch: Architecture, keys: Iterable[str]) -> str:
    """Why a model with these keys cannot be written as GGUF; "" if it can."""
    if arch.version not in VERSIONS:
        return f"llama.cpp knows RWKV-6 and RWKV-7, and this is RWKV-{arch.version}"
    states = [key for key in keys if param_part(key) == "state"]
    if states:
        return f"GGUF has no place for an initial state, and this model has one, such as {states[0]}"
    return ""


def chosen_outtype(outtype: str, shapes: Mapping[str, Tensor]) -> str:
    """The type of matrices that `outtype` means: auto is the one that all matrices have, or f32."""
    if outtype != "auto":
        return outtype
    dtypes = {tensor.dtype for key, tensor in shapes.items() if _is_matrix(key)}
    return next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), "f32")


def write_gguf(
    path: Path,
    arch: Architecture,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    outtype: str,
    tokens: Sequence[bytes],
    chat_template: str | None = None,
) -> None:
    """Write a model to a GGUF file; equal input gives equal bytes.

    shapes: upstream's keys with shapes and dtypes, all of the model's and no other; the values are not read. tensors:
    (key, tensor) pairs in that order, of which one at a time is in memory. outtype: f32, f16, bf16, q8_0, or auto.
    tokens: the bytes of each id, none for id 0, which ends a document; ids from there to the end of the model's
    vocabulary are never made of text. chat_template: in Jinja.

    UserError if the model has no such form, or a number is too large for its type.
    """
    raise NotImplementedError


def read_gguf(path: Path) -> Mapping[str, Tensor]:
    raise NotImplementedError


def _is_matrix(key: str) -> bool:
    return param_part(key) in ("emb", "head", "projection")
