"""How much scratch memory the compiled kernels need.

`cuda/README.md` says what the numbers hold. They are known here too, so that torch.compile knows every shape without
asking a library. Plain arithmetic: the sizes may be symbolic.

`label` says which kernels: "cpu" are the processor's, "exact" CUDA's sequential ones. CUDA's chunked kernels are a mode
and the number of tokens in a chunk: "chunked32", "accurate16". Tests on the host also have the mode "debug".

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed), L tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

CPU, EXACT = "cpu", "exact"
# Tokens between the states that a sequential kernel keeps: SEGMENT in cuda/cpu/sequences.h, kSegment in
# cuda/common.cuh.
SEGMENT = {CPU: 128, EXACT: 64}
# Bytes of a number that a chunked kernel hands to the next one: bf16, two bf16 whose sum counts, float.
HANDED_OVER = {"chunked": 2, "accurate": 4, "debug": 4}
FLOAT = 4  # bytes


class Chunking(NamedTuple):
    """What a label of chunked kernels says."""

    mode: str  # see HANDED_OVER
    tokens: int


def chunking(label: str) -> Chunking | None:
    """None if the label is that of sequential kernels. Raises ValueError for what is no label."""
    if label in SEGMENT:
        return None
    mode = label.rstrip("0123456789")
    if mode not in HANDED_OVER or mode == label:
        raise ValueError(f"expected {' or '.join(SEGMENT)}, or one of {', '.join(HANDED_OVER)} and a number: {label}")
    return Chunking(mode, int(label.removeprefix(mode)))


def saved_floats(operator: str, label: str, B: int, T: int, H: int, N: int, D: int) -> int:
    """Numbers that the forward pass of wkv5, wkv6 or wkv7 leaves for backward."""
    states = all_segments(label, B, T, D) * H * N * N
    if chunked := chunking(label):
        return states * HANDED_OVER[chunked.mode] // FLOAT
    if operator != "wkv7":
        return states
    rows = B * T * H * N  # a removed value per token
    return states + rows if label == CPU else rows


def workspace_floats(operator: str, label: str, B: int, T: int, H: int, N: int, D: int) -> int:
    """Numbers that the backward pass works in."""
    return sum(backward_regions(operator, label, B, T, H, N, D).values()) // FLOAT


def forward_workspace_floats(operator: str, label: str, B: int, T: int, H: int, N: int, D: int, *, save: bool) -> int:
    """Numbers that the forward pass works in. `save`: something is left for backward."""
    return sum(forward_regions(operator, label, B, T, H, N, D, save=save).values()) // FLOAT


def forward_regions(operator: str, label: str, B: int, T: int, H: int, N: int, D: int, *, save: bool) -> dict[str, int]:
    """The parts of the forward pass's workspace in the order of their addresses, in bytes."""
    if not chunking(label):
        return {}
    regions = _factors(operator, label, B, T, H, N, D)
    # The states at the chunks' starts are what is left for backward; otherwise they live here.
    return regions if save else regions | {"states": FLOAT * saved_floats(operator, label, B, T, H, N, D)}


def backward_regions(operator: str, label: str, B: int, T: int, H: int, N: int, D: int) -> dict[str, int]:
    """The same for the backward pass."""
    states = FLOAT * all_segments(label, B, T, D) * H * N * N
    if label == CPU:
        return {}
    if label == EXACT:
        rows = FLOAT * B * T * H * N
        return {"dsa": rows, "key_products": rows, "boundaries": states} if operator == "wkv7" else {"ends": states}
    regions = _factors(operator, label, B, T, H, N, D)
    regions["dstates"] = FLOAT * saved_floats(operator, label, B, T, H, N, D)
    if operator != "wkv7":
        # Of each chunk, its part of the gradients that all tokens share.
        regions["sums"] = FLOAT * all_segments(label, B, T, D) * H * 2 * N
    return regions


def _factors(operator: str, label: str, B: int, T: int, H: int, N: int, D: int) -> dict[str, int]:
    """What makes a chunk's last state of its first: see cuda/chunked.md."""
    chunked = chunking(label)
    assert chunked
    slots = all_segments(label, B, T, D) * H
    rows = slots * chunked.tokens * N * HANDED_OVER[chunked.mode]
    decay = FLOAT * slots * N
    return {**dict.fromkeys(("W", "bt", "Q"), rows), "whole": decay} if operator == "wkv7" else {"growth": decay}


def all_segments(label: str, B: int, T: int, D: int) -> int:
    """Room for the segments, or chunks, of all sequences. Documents are numbered by rounding down, which may leave
    gaps."""
    chunked = chunking(label)
    length = chunked.tokens if chunked else SEGMENT[label]
    return T // length + D if D else B * ((T + length - 1) // length)
