"""The inputs on which the chunked kernels must agree with float64 and with their specifications, and how closely.

Sizes: B batch, T tokens, H heads, N head size, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops import wkv6_inputs, wkv_inputs
from tests.ops.packed_inputs import each_alone, packed_case

OPERATORS = ("wkv7", "wkv6", "wkv5")
_NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate0")

# Against float64: relative Frobenius errors of RWKV-7 with one bfloat16 product, outputs in bfloat16 included, about
# twice the worst of many seeds at T up to 4096, or with repeated keys up to 130.
BOUNDS = {
    "ordinary": dict(zip(_NAMES, (9e-3, 8e-3, 8e-3, 1.1e-2, 9e-3, 1.1e-2, 1.3e-2, 1.5e-2, 6e-3), strict=True)),
    "repeated": dict(zip(_NAMES, (1.1e-2, 1.2e-2, 1.0e-2, 1.1e-2, 7e-3, 3e-2, 2.8e-2, 1.7e-2, 4e-3), strict=True)),
}
# The same for RWKV-6 and RWKV-5, whose keys do not meet each other.
BOUNDS6 = {"y": 7e-3} | dict.fromkeys(("state", "dr", "dw", "dk", "dv", "du", "dstate0"), 8e-3)
# Of all that is not rounded to bfloat16 on its way out, with three products, and with operands that are not rounded.
FINER_BOUNDS = {"bf16x3": {"ordinary": 5e-5, "repeated": 2e-4}, "fp32": {"ordinary": 1e-5, "repeated": 2e-5}}
# A kernel against its specification. In bfloat16 for T up to 130, or one kernel given its own inputs: in a longer chain
# sums of another order round to other neighbours.
AGAINST_SPEC = {"bf16": 1.7e-3, "fp32": 1e-6}


def bounds(operator: str, kind: str, operand: str = "bf16") -> dict[str, float]:
    """name of a result -> its bound. kind: "ordinary" or "repeated" (see Input). operand: see chunk_model.Rounding."""
    table = BOUNDS[kind] if operator == "wkv7" else BOUNDS6
    return table if operand == "bf16" else dict.fromkeys(table, FINER_BOUNDS[operand][kind])


class Input(NamedTuple):
    """make(dtype) -> case, as the make_case functions and packed_case give it. kind: which bounds hold for it."""

    make: Callable[[torch.dtype], dict]
    kind: str = "ordinary"


def inputs(operator: str, L: int, N: int = 64) -> dict[str, Input]:
    """name -> Input, for chunks of L tokens: what the make_case modules hold, with the chunk's own boundaries."""
    named: dict[str, dict] = {
        "random_without_states": {"T": 2 * L + 1, "states": None},
        "three_rows_with_different_states": {"T": L + 1, "B": 3},
        "asymmetric_rank1_states": {"T": 17, "states": "rank1"},
        "repeated_keys": {"T": 129, "H": 1, "repeated": True},
        "repeated_keys_over_one_boundary": {"T": L + 2, "H": 1, "repeated": True},
    }
    if operator == "wkv7":
        make = wkv_inputs.make_case
        named |= {"slow_decay": {"T": 130, "H": 1, "raw": -9.0}, "fast_decay": {"T": 65, "raw": 8.0}}
    else:
        make = partial(wkv6_inputs.make_case, operator)
        named |= {
            "slow_decay": {"T": 130, "H": 1, "raw": (-9.2, -8.8)},
            "fast_decay": {"T": 65, "raw": (7.8, 8.2)},
            "decay_that_differs_by_powers_of_ten": {"T": 65, "raw": (-9.0, 20.0)},
            "decay_beyond_the_range_of_exp": {"T": 17, "raw": (80.0, 120.0)},
        }
    lengths = sorted({1, 15, 16, 17, L - 1, L, L + 1, 63, 65})
    named |= {f"length_{T}": {"T": T, "H": 1} for T in lengths}
    found = {
        name: Input(partial(make, N=N, seed=i, **sizes), "repeated" if "repeated" in sizes else "ordinary")
        for i, (name, sizes) in enumerate(named.items())
    }
    documents = (1, L - 1, L, L + 1, 3)
    return found | {"packed": Input(partial(packed_case, operator, lengths=documents, N=N))}


def reference(operator: str, case: dict) -> dict[str, Tensor]:
    """float64 results and gradients of a case, packed or not, with "w0" or not.

    Packed documents add up their gradients of what they share. With "w0", dw is that of w + w0, which is w's as well.
    """
    gradients = wkv_inputs.reference_gradients if operator == "wkv7" else wkv6_inputs.reference_gradients
    case = with_one_decay(case)
    return each_alone(operator, case, gradients) if "cu_seqlens" in case else gradients(case)


def with_two_decays(case: dict) -> dict:
    """An RWKV-7 case with the raw decay in two parts, as models make it: w in r's dtype and a large "w0" [H, N]."""
    w = case["w"]
    w0 = torch.linspace(-6, -1, w[0, 0].numel(), dtype=w.dtype).view(w.shape[2:])
    return {**case, "w": (0.3 * w).to(case["r"].dtype), "w0": w0}


def with_one_decay(case: dict) -> dict:
    """A case whose "w0", if it has one, is added to w, in w0's dtype."""
    if "w0" not in case:
        return case
    rest = {name: x for name, x in case.items() if name != "w0"}
    return {**rest, "w": case["w"].to(case["w0"].dtype) + case["w0"]}
