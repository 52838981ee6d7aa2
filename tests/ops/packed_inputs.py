"""Packed documents as test cases, and the same documents one at a time.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.ops import wkv6_inputs, wkv_inputs

# Shorter and longer than a chunk, a tile and a segment of any form, and exactly as long.
LENGTHS = (1, 5, 16, 17, 64, 65, 3, 129)
SHARED = {"wkv7": (), "wkv6": ("u",), "wkv5": ("u", "w")}  # what all documents have in common


def packed_case(
    operator: str, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS, H: int = 2, N: int = 16
) -> dict[str, Tensor]:
    """A case of the make_case functions in which B is 1 and documents lie one after another, with "cu_seqlens"."""
    make = wkv_inputs.make_case if operator == "wkv7" else partial(wkv6_inputs.make_case, operator)
    case = make(dtype, B=1, T=sum(lengths), H=H, N=N)
    # For their number of rows: every document has states of its own scale.
    states = make(dtype, B=len(lengths), T=1, H=H, N=N)
    offsets = torch.tensor((0, *lengths)).cumsum(0)
    return {**case, "state": states["state"], "dstate": states["dstate"], "cu_seqlens": offsets}


def alone(operator: str, case: dict[str, Tensor], d: int) -> dict[str, Tensor]:
    """Document d of a packed case, as a case that is not packed."""
    begin, end = case["cu_seqlens"][d : d + 2].tolist()

    def own(name: str, x: Tensor) -> Tensor:
        if name in SHARED[operator]:
            return x
        return x[d : d + 1] if name in ("state", "dstate") else x[:, begin:end].contiguous()

    return {name: own(name, x) for name, x in case.items() if name != "cu_seqlens"}


def join(operator: str, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all documents as one packed case gives them."""
    joined = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in ("state", "dstate0"):
            joined[name] = torch.cat(parts)
        elif name.removeprefix("d") in SHARED[operator]:
            joined[name] = torch.stack(parts).sum(0)
        else:
            joined[name] = torch.cat(parts, dim=1)
    return joined


def each_alone(operator: str, case: dict[str, Tensor], run: Callable[[dict], dict]) -> dict[str, Tensor]:
    return join(operator, [run(alone(operator, case, d)) for d in range(len(case["cu_seqlens"]) - 1)])
