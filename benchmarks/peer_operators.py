"""WKV operators of other projects, called with our tensors: optional, and never a reason for our check to fail.

A peer has its own conventions. `prepare` turns a case into them and `restore` turns the results back, by the chain
rule where need be; both are outside of what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Case = dict[str, Tensor]


class Peer(NamedTuple):
    """run(**leaves, cu_seqlens) -> (y, last state), in the peer's conventions."""

    prepare: Callable[[Case], Case]
    run: Callable[..., tuple[Tensor, Tensor]]
    restore: Callable[[Case, dict[str, Tensor]], dict[str, Tensor]]


class Missing(Exception):
    """Why a peer cannot be had, in words."""


# flash-linear-attention: the decay comes as its logarithm, states are [key, value], and r is scaled unless told not to.
# "fla" is what its defaults do: chunks of 16, and everything computed again in backward. "fla-bounded" is its fastest,
# which needs to be told how fast a state decays at most.
LOG_DECAY = {
    "wkv7": lambda raw: -math.exp(-0.5) * raw.double().sigmoid(),
    "wkv6": lambda raw: -raw.double().exp(),
}
SLOPE = {  # of the logarithm, along the raw decay
    "wkv7": lambda raw: -math.exp(-0.5) * raw.double().sigmoid() * (-raw.double()).sigmoid(),
    "wkv6": lambda raw: -raw.double().exp(),
}
FLA_FLAGS = {"fla": {}, "fla-bounded": {"lower_bound": -0.6066, "disable_recompute": True}}
PEERS = tuple(FLA_FLAGS)


def peer(name: str, operator: str) -> Peer:
    """Raises Missing."""
    if operator not in LOG_DECAY or (operator != "wkv7" and FLA_FLAGS[name]):
        raise Missing(f"{name} has no {operator}")
    try:
        if operator == "wkv7":
            from fla.ops.rwkv7 import chunk_rwkv7 as function
        else:
            from fla.ops.rwkv6 import chunk_rwkv6 as function
    except (ImportError, RuntimeError) as problem:  # it also asks for a driver
        raise Missing(f"{name} is not installed, or not usable: {problem}") from problem

    def raw(case: Case) -> Tensor:
        return case["w"] + case["w0"] if "w0" in case else case["w"]

    def prepare(case: Case) -> Case:
        turned = {name: case[name].mT.contiguous() for name in ("state", "dstate")}
        kept = {name: x for name, x in case.items() if name != "w0"}
        return kept | turned | {"w": LOG_DECAY[operator](raw(case)).float()}

    def run(*, state: Tensor, cu_seqlens: Tensor | None, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        flags = {"scale": 1.0, "output_final_state": True, "cu_seqlens": cu_seqlens} | FLA_FLAGS[name]
        return function(**leaves, initial_state=state, **flags)

    def restore(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
        turned = {name: results[name].mT for name in ("state", "dstate0")}
        return results | turned | {"dw": results["dw"].double() * SLOPE[operator](raw(case))}

    return Peer(prepare, run, restore)
