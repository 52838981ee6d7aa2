"""Forward and backward of every kernel on small shapes: memcheck.py cuda|cpu [chunked], under compute-sanitizer.

Lengths end inside and at the end of a segment or chunk; every head size, both dtypes, whole and packed. With "chunked"
one packed problem of each kind of chunked kernels: what looks at every access to shared memory takes long. Only memory
is looked at here, and that results are finite: the tests compare them.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rwkv_bone.ops import chunked_launches
from rwkv_bone.ops.regions.trial import trial
from rwkv_bone.ops.wkv6 import wkv5, wkv6
from rwkv_bone.ops.wkv7 import wkv7

LENGTHS = (1, 16, 37)
HEAD_SIZES = (8, 16, 32, 64, 128)
H = 2
OPERATORS = {wkv7: "rwkvab", wkv6: "rwkvu", wkv5: "rwkvu"}


class Kind(NamedTuple):
    """Kernels that are compiled together."""

    form: str
    dtype: torch.dtype
    N: int
    w0: bool = False  # the decay in two parts, of wkv7 alone


# All head sizes of the form that is used most; the other forms are the same source.
CHUNKED = [Kind("cuda-chunked", torch.bfloat16, N) for N in chunked_launches.LENGTHS["chunked"]]
CHUNKED += [Kind(f"cuda-{label}", torch.bfloat16, 64) for label in ("chunked64", "accurate")]
CHUNKED += [Kind("cuda-accurate", torch.float32, 64), Kind("cuda-chunked", torch.bfloat16, 64, w0=True)]


def kinds(device: str) -> Iterator[Kind]:
    for dtype in (torch.bfloat16, torch.float32):
        for N in HEAD_SIZES:
            yield Kind("cuda-exact" if device == "cuda" else device, dtype, N)
    if device == "cuda":
        yield from CHUNKED


def cases(device: str) -> Iterator[tuple[int, torch.Tensor | None]]:
    """(T, offsets or None)"""
    yield from ((T, None) for T in LENGTHS)
    yield sum(LENGTHS), torch.tensor([0, *LENGTHS], device=device).cumsum(0)


def once(operator, kind: Kind, T: int, offsets, device: str) -> None:
    form, dtype, N, w0 = kind
    shapes = {"u": (H, N)} | ({"w": (H, N)} if operator is wkv5 else {})
    sequences = 1 if offsets is None else len(offsets) - 1
    wide = "u" if w0 else "wu"
    leaves = {
        name: (0.1 * torch.randn(*shapes.get(name, (1, T, H, N)), device=device)).to(
            torch.float32 if name in wide else dtype
        )
        for name in OPERATORS[operator]
    }
    leaves["state"] = torch.randn(sequences, H, N, N, device=device)
    for leaf in leaves.values():
        leaf.requires_grad_()
    constants = {"w0": torch.randn(H, N, device=device)} if w0 else {}
    y, last = operator(**leaves, **constants, cu_seqlens=offsets, output_state=True, op=form)
    (y.float().sum() + last.sum()).backward()
    for name, tensor in {"y": y, "last": last, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}.items():
        assert tensor.isfinite().all(), f"{operator.__name__}, T {T}, {kind}: {name} is not finite"


def main(device: str, only: str = "") -> None:
    torch.manual_seed(0)
    count = 0
    for operator in OPERATORS:
        for kind in CHUNKED if only else kinds(device):
            if kind.w0 and operator is not wkv7 or only and kind.N != 64:
                continue
            for T, offsets in list(cases(device))[-1 if only else 0 :]:
                once(operator, kind, T, offsets, device)
                count += 1
    # The regions: their trial has all of them, packed documents and carried rows too.
    for dtype in (torch.bfloat16,) if only else (torch.bfloat16, torch.float32):
        for N in (64,) if only else HEAD_SIZES:
            trial(torch.device(device), dtype, N)
            count += 1
    print(f"{count} problems, forward and backward, all finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
