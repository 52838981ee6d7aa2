"""What a call of a WKV operator launches on a CUDA device if it takes the chunked kernels, which use tensor cores.

Here is all that the host has to know about the kernels of cuda/wkv7_chunked.cuh and cuda/wkv6_chunked.cuh, as
ops/launches.py has it of the sequential ones. `label` is their mode and the number of tokens in a chunk (ops/sizes.py).

Three kernels make a direction, and a fourth adds up what WKV-5 and -6 have in common:
    prepare, prepare_backward    a block per chunk and head    what a chunk does to the state, whatever the state is
    scan, scan_backward          from chunk to chunk           the state at each chunk's start, or its gradient
    outputs, gradients           a block per chunk and head    what is returned

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed), L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rwkv_bone.ops import launches as shared
from rwkv_bone.ops.launches import Launch
from rwkv_bone.ops.sizes import Chunking, all_segments, backward_regions, chunking, forward_regions

HEAD_SIZES = (32, 64, 128)
# The lengths of chunks that kernels of a mode are made for, the usual one first, by head size. With heads of 128 longer
# chunks need more registers than there are, and operands in two parts more shared memory than any card has.
LENGTHS: dict[str, dict[int, tuple[int, ...]]] = {
    "chunked": {32: (32, 64), 64: (32, 64), 128: (16,)},
    "accurate": {32: (16,), 64: (16,)},
}
HEADERS = {"wkv7": "wkv7_chunked.cuh", "wkv6": "wkv6_chunked.cuh", "wkv5": "wkv6_chunked.cuh"}
OPERANDS = {"chunked": "wkv::Bf16", "accurate": "wkv::Bf16x3", "debug": "wkv::Exact32"}
# dtype of the tensors -> C++ types of r and of w. With "bfloat16w" the decay comes as bfloat16 too, without w0.
ELEMENTS = {
    "float32": ("float", "float"),
    "bfloat16": ("wkv::BFloat16", "float"),
    "bfloat16w": ("wkv::BFloat16", "wkv::BFloat16"),
}
FORWARD = ("prepare", "scan", "outputs")
BACKWARD = ("prepare_backward", "scan_backward", "gradients")
SCANS = ("scan", "scan_backward")
# WKV-7's scans: rows of the state that a warp carries, and how many blocks there should be if possible, two for each
# multiprocessor of an H100 or H200.
ROWS, WANTED_BLOCKS = 16, 264
# WKV-5's and -6's: threads of a block, each of which carries 8 elements of the state.
SCAN_THREADS = 128


def dtypes(operator: str) -> tuple[str, ...]:
    """The dtypes of ELEMENTS in which there are kernels of this operator."""
    return tuple(dtype for dtype in ELEMENTS if dtype != "bfloat16w" or operator == "wkv7")


def source(operator: str, label: str, dtypes: Iterable[str], head_sizes: Iterable[int]) -> str:
    """C++ that makes the operator's kernels of this label for each of these dtypes (see ELEMENTS) and head sizes."""
    mode, length = _chunking(label)
    head_sizes = tuple(head_sizes)
    lines = [f'#include "{HEADERS[operator]}"']
    for dtype in dtypes:
        types = ", ".join(ELEMENTS[dtype] if operator == "wkv7" else ELEMENTS[dtype][:1])
        lines += [
            f"{operator.upper()}_CHUNKED_KERNELS({types}, {OPERANDS[mode]}, {label}, {dtype}, {N}, {length})"
            for N in head_sizes
        ]
    return "\n".join(lines) + "\n"


def kernel_names(operator: str, label: str, dtype: str, N: int) -> list[str]:
    """The kernels that `source` makes for one dtype and head size."""
    parts = (*_parts(operator, "forward"), *_parts(operator, "backward"))
    return [f"{operator}_{label}_{part}_{dtype}_{N}" for part in parts]


def launches(
    operator: str,
    step: str,
    label: str,
    dtype: str,
    sizes: Sequence[int],
    offsets: int | None,
    tensors: Sequence[int | None],
) -> list[Launch]:
    """The launches of "forward" or "backward", in order: as launches.launches, with these tensors after the first.

        forward     y, last state, saved, w0, workspace
        backward    saved, dy, d last state, w0, workspace, the gradient of each input, d initial state
    Only WKV-7 has w0, a float32 [H, N] or None. Raises ValueError for what no kernel can take.
    """
    length = _chunking(label).tokens
    B, T, H, N, D = sizes
    extra = ["w0"] if operator == "wkv7" else []
    named = shared.name_tensors(operator, step, [*extra, *(["workspace"] if step == "forward" else [])], tensors)
    if dtype not in dtypes(operator):
        raise ValueError(f"dtype must be {' or '.join(dtypes(operator))}, found {dtype}")
    if dtype == "bfloat16w" and not named["w0"] or dtype == "bfloat16" and named.get("w0"):
        raise ValueError(f"{operator} {step}: w0 goes with a decay of bfloat16, and only with it")
    slots, heads = all_segments(label, B, T, D) * H, (D or B) * H
    if operator == "wkv7":
        splits = scan_splits(heads, N)
        scan = (heads * splits, 2 * N // splits)
    else:
        scan = (heads * (N * N // (8 * SCAN_THREADS)), SCAN_THREADS)
    shared.check(operator, step, HEAD_SIZES, sizes, offsets, named, max(slots, scan[0]))

    if step == "forward":
        regions = forward_regions(operator, label, B, T, H, N, D, save=named["saved"] is not None)
    else:
        regions = backward_regions(operator, label, B, T, H, N, D)
    words = shared.expand(named, regions)
    if "states" in words:
        words["saved"] = words.pop("states")
    arguments = shared.pack(sizes, offsets, words.values())

    threads = min(length * N // 8, 4 * N)
    blocks = dict.fromkeys(_parts(operator, step), (slots, threads))
    for part in blocks:
        if part in SCANS:
            blocks[part] = scan
        elif part == "sums":
            blocks[part] = (heads, threads)
    return [Launch(f"{operator}_{label}_{part}_{dtype}_{N}", *size, arguments) for part, size in blocks.items()]


def scan_splits(heads: int, N: int) -> int:
    """Into how many blocks WKV-7's scans divide the rows of each state: a power of two."""
    splits = 1
    while heads * splits < WANTED_BLOCKS and splits < N // ROWS:
        splits *= 2
    return splits


def _parts(operator: str, step: str) -> tuple[str, ...]:
    if step == "forward":
        return FORWARD
    return BACKWARD if operator == "wkv7" else (*BACKWARD, "sums")


def _chunking(label: str) -> Chunking:
    chunked = chunking(label)
    if chunked is None:
        raise ValueError(f"expected a label of chunked kernels, found {label}")
    return chunked
