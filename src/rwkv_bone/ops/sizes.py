"""How much scratch memory the compiled kernels need: the twins in Python of X_saved_floats and X_workspace_floats.

`cuda/README.md` says what the numbers hold. They are known here too, so that torch.compile knows every shape without
asking a library. Plain arithmetic: the sizes may be symbolic.

Sizes: B batch, T tokens, H heads, N head size, D documents (0: not packed).
"""

from __future__ import annotations

# Tokens between the states that a kernel keeps: SEGMENT in cuda/cpu/sequences.h, kSegment in cuda/common.h.
SEGMENT = {"cpu": 32, "cuda": 64}


def saved_floats(operator: str, device_type: str, B: int, T: int, H: int, N: int, D: int) -> int:
    """Numbers that the forward pass of wkv5, wkv6 or wkv7 leaves for backward, on "cpu" or "cuda"."""
    states = all_segments(device_type, B, T, D) * H * N * N
    if operator != "wkv7":
        return states
    rows = B * T * H * N  # a removed value per token
    return states + rows if device_type == "cpu" else rows


def workspace_floats(operator: str, device_type: str, B: int, T: int, H: int, N: int, D: int) -> int:
    """Numbers that the backward pass works in."""
    if device_type == "cpu":
        return 0
    states = all_segments(device_type, B, T, D) * H * N * N
    return states + 2 * B * T * H * N if operator == "wkv7" else states


def all_segments(device_type: str, B: int, T: int, D: int) -> int:
    """Room for the segments of all sequences. Documents are numbered by rounding down, which may leave gaps."""
    length = SEGMENT[device_type]
    return T // length + D if D else B * ((T + length - 1) // length)
