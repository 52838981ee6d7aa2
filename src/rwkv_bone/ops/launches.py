"""What a call of a WKV operator launches on a CUDA device: which kernels, in how many blocks, with which arguments.

Here is all that the host has to know about the sequential kernels of cuda/wkv7.cuh and cuda/wkv6.cuh: their names,
their source, and the layout of the one struct that each takes by value. For the chunked kernels that is in
ops/chunked_launches.py, which shares the second half of this file. Pure arithmetic: nothing is compiled or loaded.

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rwkv_bone.ops.sizes import EXACT, SEGMENT, all_segments, backward_regions

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
# Above the bits of an address, and of every size: so high up a stand-in has its number.
STAND_IN_BITS = 48


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    arguments: bytes  # the kernel's struct


def stand_in(number: int) -> int:
    """What a plan holds in place of the pointer of that number, 0 and up, which differs from call to call.

    A plan may add to it, as to the pointer itself. `ops/driver.py` puts the pointers in.
    """
    return (number + 1) << STAND_IN_BITS


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
    named = name_tensors(operator, step, (), tensors)
    if dtype not in ELEMENTS:
        raise ValueError(f"dtype must be {' or '.join(ELEMENTS)}, found {dtype}")
    segments, heads = all_segments(EXACT, B, T, D) * H, (D or B) * H
    # Also of forward: a problem without a backward pass is refused at once.
    check(operator, step, HEAD_SIZES, sizes, offsets, named, heads if operator == "wkv7" else segments * (N // COLUMNS))
    if step == "forward":
        blocks = {"forward": heads}
    else:
        blocks = dict.fromkeys((f"backward_{part}" for part in BACKWARD[operator]), heads)
        if operator != "wkv7":
            blocks |= {"backward_keys": segments, "backward_receptance": segments}
            blocks["backward_decay"] = (segments if operator == "wkv6" else heads) * (N // COLUMNS)
    regions = backward_regions(operator, EXACT, B, T, H, N, D) if step == "backward" else {}
    arguments = pack(sizes, offsets, expand(named, regions).values())
    threads = 2 * N  # Layout<N>::kThreads
    return [Launch(f"{operator}_{name}_{dtype}_{N}", count, threads, arguments) for name, count in blocks.items()]


def name_tensors(
    operator: str, step: str, extra: Sequence[str], tensors: Sequence[int | None]
) -> dict[str, int | None]:
    """The tensors of a call by their names; `extra` are those that follow the first and the saved ones."""
    inputs = INPUTS[operator]
    names = [*inputs, "s0", *(("y", "sT", "saved") if step == "forward" else ("saved", "dy", "dsT")), *extra]
    if step == "backward":
        names += ["workspace", *(f"d{name}" for name in inputs), "ds0"]
    if len(tensors) != len(names):
        raise ValueError(f"{operator} {step} takes {len(names)} tensors, found {len(tensors)}")
    return dict(zip(names, tensors, strict=True))


def check(
    operator: str,
    step: str,
    head_sizes: Sequence[int],
    sizes: Sequence[int],
    offsets: int | None,
    tensors: Mapping[str, int | None],
    blocks: int,
) -> None:
    """Raises ValueError for sizes and pointers that no kernel can take."""
    B, T, H, N, D = sizes
    if N not in head_sizes:
        raise ValueError(f"head size must be {', '.join(map(str, head_sizes[:-1]))} or {head_sizes[-1]}, found {N}")
    if min(B, T, H) < 1 or T > LARGEST - SEGMENT[EXACT]:
        raise ValueError(f"batch, tokens and heads must be at least 1, and tokens below 2^31, found {B}, {T}, {H}")
    if (D > 0) != (offsets is not None) or D < 0 or D > T or (D and B != 1):
        raise ValueError(f"documents need a batch of 1 and offsets, and must not be more than the tokens, found {D}")
    if blocks > LARGEST:
        raise ValueError(f"blocks of threads must be below 2^31, found {blocks} for {(B, T, H, N)}")
    optional = {"s0", "sT", "dsT", "ds0", "w0", *(("saved",) if step == "forward" else ())}
    for name, pointer in tensors.items():
        if not pointer and name not in optional:
            raise ValueError(f"{operator} {step}: {name} is missing")
        if pointer and pointer % ALIGNMENT:
            raise ValueError(f"{operator} {step}: {name} is not aligned to {ALIGNMENT} bytes")


def expand(tensors: Mapping[str, int | None], regions: Mapping[str, int]) -> dict[str, int | None]:
    """The tensors, with the regions of the workspace in its place: {name: bytes}, as ops/sizes.py lays them out."""
    expanded: dict[str, int | None] = {}
    for name, pointer in tensors.items():
        if name != "workspace":
            expanded[name] = pointer
            continue
        address = pointer or 0
        for region, size in regions.items():
            expanded[region] = address
            address += size
    return expanded


def pack(sizes: Sequence[int], offsets: int | None, pointers: Iterable[int | None]) -> bytes:
    """The struct that a kernel takes: which sequences (`Sequences` in common.cuh), then pointers."""
    B, T, H, _, D = sizes
    words = [D or B, T, H, offsets or 0, *(pointer or 0 for pointer in pointers)]
    return struct.pack(f"={len(words)}Q", *words)
