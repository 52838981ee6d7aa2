"""What a call of a WKV operator launches on a CUDA device: which kernels, in how many blocks, with which arguments.

The kernels are those of cuda/wkv7.cuh and cuda/wkv6.cuh. Here is all that the host has to know about them: their names,
their source, and the layout of the one struct that each takes by value. Pure arithmetic: nothing is compiled or loaded.

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rwkv_bone.ops.sizes import SEGMENT, all_segments

HEAD_SIZES = (8, 16, 32, 64, 128)
ELEMENTS = {"float32": "float", "bfloat16": "wkv::BFloat16"}  # a dtype's name -> its C++ type
HEADERS = {"wkv7": "wkv7.cuh", "wkv6": "wkv6.cuh", "wkv5": "wkv6.cuh"}
INPUTS = {"wkv7": "rwkvab", "wkv6": "rwkvu", "wkv5": "rwkvu"}  # the tensors before the initial state, a letter each
BACKWARD = {
    "wkv7": ("rows", "keys", "decay"),
    "wkv6": ("values", "keys", "receptance", "decay"),
    "wkv5": ("values", "keys", "receptance", "decay"),
}
LARGEST = 2**31 - 1  # of 32-bit token numbers, and of a grid
COLUMNS = 8  # of the states that a block of WKV-5's and -6's backward_decay takes: kColumns
ALIGNMENT = 16  # bytes; the kernels load vectors


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    arguments: bytes  # the kernel's struct


def source(operator: str, dtypes: Iterable[str], head_sizes: Iterable[int]) -> str:
    """C++ that makes the operator's kernels for each of these dtypes (see ELEMENTS) and head sizes."""
    head_sizes = tuple(head_sizes)
    lines = [f'#include "{HEADERS[operator]}"']
    lines += [f"{operator.upper()}_KERNELS({ELEMENTS[dtype]}, {dtype}, {N})" for dtype in dtypes for N in head_sizes]
    return "\n".join(lines) + "\n"


def kernel_names(operator: str, dtype: str, N: int) -> list[str]:
    """The kernels that `source` makes for one dtype and head size."""
    steps = ("forward", *(f"backward_{part}" for part in BACKWARD[operator]))
    return [f"{operator}_{step}_{dtype}_{N}" for step in steps]


def launches(
    operator: str, step: str, dtype: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]
) -> list[Launch]:
    """The launches of "forward" or "backward", in order.

    sizes (B, T, H, N, D). Pointers are numbers, None = null; `offsets` is that of the documents' int64 [D + 1].
    tensors are, in this order, the inputs (see INPUTS) and the initial state, then
        forward     y, last state, saved
        backward    saved, dy, d last state, workspace, the gradient of each input, d initial state
    States, and what forward saves, may be None: zeros, or not wanted. Raises ValueError for what no kernel can take.
    """
    B, T, H, N, D = sizes
    _check(operator, step, dtype, sizes, offsets, tensors)
    sequences = D or B
    words = [sequences, T, H, *(pointer or 0 for pointer in (offsets, *tensors))]
    heads = sequences * H
    if step == "forward":
        blocks = {"forward": heads}
    else:
        blocks = dict.fromkeys((f"backward_{part}" for part in BACKWARD[operator]), heads)
        if operator == "wkv7":
            # The workspace holds dsa, products of k and b, and dS at the segments: see Backward in wkv7.cuh.
            at = 4 + len(INPUTS[operator]) + 1 + 3
            words[at : at + 1] = [words[at] + part * 4 * B * T * H * N for part in range(3)]
        else:
            segments = all_segments("cuda", B, T, D) * H
            blocks |= {"backward_keys": segments, "backward_receptance": segments}
            blocks["backward_decay"] = (segments if operator == "wkv6" else heads) * (N // COLUMNS)
    arguments = struct.pack(f"={len(words)}Q", *words)
    threads = 2 * N  # Layout<N>::kThreads
    return [Launch(f"{operator}_{name}_{dtype}_{N}", count, threads, arguments) for name, count in blocks.items()]


def _check(
    operator: str, step: str, dtype: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]
) -> None:
    B, T, H, N, D = sizes
    if N not in HEAD_SIZES:
        raise ValueError(f"head size must be {', '.join(map(str, HEAD_SIZES[:-1]))} or {HEAD_SIZES[-1]}, found {N}")
    if dtype not in ELEMENTS:
        raise ValueError(f"dtype must be {' or '.join(ELEMENTS)}, found {dtype}")
    if min(B, T, H) < 1 or T > LARGEST - SEGMENT["cuda"]:
        raise ValueError(f"batch, tokens and heads must be at least 1, and tokens below 2^31, found {B}, {T}, {H}")
    if (D > 0) != (offsets is not None) or D < 0 or D > T or (D and B != 1):
        raise ValueError(f"documents need a batch of 1 and offsets, and must not be more than the tokens, found {D}")
    blocks = (D or B) * H if operator == "wkv7" else all_segments("cuda", B, T, D) * H * (N // COLUMNS)
    if blocks > LARGEST:
        raise ValueError(f"blocks of threads must be below 2^31, found {blocks} for {(B, T, H, N)}")
    inputs = len(INPUTS[operator])
    optional = {inputs, inputs + 2, inputs + 3} if step == "forward" else {inputs, inputs + 3, 2 * inputs + 5}
    expected = inputs + 4 if step == "forward" else 2 * inputs + 6
    if len(tensors) != expected:
        raise ValueError(f"{operator} {step} takes {expected} tensors, found {len(tensors)}")
    for i, pointer in enumerate(tensors):
        if not pointer and i not in optional:
            raise ValueError(f"{operator} {step}: tensor {i} is missing")
        if pointer and pointer % ALIGNMENT:
            raise ValueError(f"{operator} {step}: tensor {i} is not aligned to {ALIGNMENT} bytes")
