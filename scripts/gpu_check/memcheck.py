"""Forward and backward of every kernel on small shapes: memcheck.py cuda|cpu, to be run under compute-sanitizer.

Lengths end inside and at the end of a segment; every head size, both dtypes, whole and packed. Only memory is looked
at here, and that results are finite: the tests compare them.
"""

import sys

import torch

from rwkv_bone.ops.wkv6 import wkv5, wkv6
from rwkv_bone.ops.wkv7 import wkv7

LENGTHS = (1, 16, 37)
HEAD_SIZES = (8, 16, 32, 64, 128)
H = 2


def cases(device: str, dtype: torch.dtype, N: int):
    """(T, offsets or None)"""
    yield from ((T, None) for T in LENGTHS)
    yield sum(LENGTHS), torch.tensor([0, *LENGTHS], device=device).cumsum(0)


def once(operator, names: str, T: int, offsets, dtype: torch.dtype, N: int, device: str) -> None:
    shapes = {"u": (H, N)} | ({"w": (H, N)} if operator is wkv5 else {})
    sequences = 1 if offsets is None else len(offsets) - 1
    leaves = {
        name: (0.1 * torch.randn(*shapes.get(name, (1, T, H, N)), device=device)).to(
            torch.float32 if name in "wu" else dtype
        )
        for name in names
    }
    leaves["state"] = torch.randn(sequences, H, N, N, device=device)
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, last = operator(**leaves, cu_seqlens=offsets, output_state=True, op=device)
    (y.float().sum() + last.sum()).backward()
    for name, tensor in {"y": y, "last": last, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}.items():
        assert tensor.isfinite().all(), f"{operator.__name__}, T {T}, N {N}, {dtype}: {name} is not finite"


def main(device: str) -> None:
    torch.manual_seed(0)
    count = 0
    for operator, names in ((wkv7, "rwkvab"), (wkv6, "rwkvu"), (wkv5, "rwkvu")):
        for dtype in (torch.bfloat16, torch.float32):
            for N in HEAD_SIZES:
                for T, offsets in cases(device, dtype, N):
                    once(operator, names, T, offsets, dtype, N, device)
                    count += 1
    print(f"{count} problems, forward and backward, all finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
