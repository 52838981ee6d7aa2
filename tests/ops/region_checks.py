"""What the regions' CUDA kernels are held to, on the host shim or on a card: see test_regions_source.py.

A check calls PyTorch's operators of ops/regions/compiled.py; where their tensors lie says what runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops import cuda, native
from rwkv_bone.ops.regions import compiled, launches
from rwkv_bone.ops.regions.launches import Unit
from tests.ops.region_cases import MIX, MIX6, POST7, PRE7, REGIONS, RELU_SQUARE, Case, make_case
from tests.ops.shim import ShimCalls, schedule
from tests.ops.test_regions_native import DTYPES, assert_equals, backward, forward

HEADS = {
    "one token": dict(T=1, H=1),
    "the usual head": dict(B=2, T=35, H=3),
    "more channels than a block has": dict(T=5, H=9),
}
SHIFTS = {
    "one token": dict(T=1, C=8, M=1),
    "one lerp": dict(B=2, T=67, C=72, M=1),
    "six": dict(B=3, T=34, C=72),
    "carried": dict(B=3, T=33, C=24, M=1, carried=3),
    "documents": dict(documents=[1, 31, 1, 1, 40, 2], C=40),
    "more documents than blocks": dict(documents=[1] * 70 + [3, 2] * 9, C=8, M=1),
    "documents, some carried": dict(documents=[3, 1, 29, 33, 1], C=48, M=6, carried=2),
    "documents, all carried": dict(documents=[1, 1, 62], C=16, M=1, carried=3),
}
# What a default run compiles: the head size of released models, M of RWKV-7's two halves.
USUAL = [
    Unit(region, dtype, size)
    for dtype in launches.ELEMENTS
    for region, size in (
        *(("mix", 1), ("mix", 6), ("mix6", 1), ("mix6", 6), ("relu_square", 1)),
        *(("pre7", 64), ("post7", 64), ("gated_norm", 64), ("cross_entropy", 1)),
    )
]


def sizes(region: str) -> dict[str, dict]:
    return SHIFTS if region in (MIX, MIX6) else HEADS


@functools.cache
def case_of(region: str, dtypes: str, size: str, device: str = "cpu", **others: int) -> Case:
    case = make_case(region, *DTYPES[dtypes], **sizes(region)[size], **others)

    def moved(x):
        return x.to(device) if isinstance(x, Tensor) else x

    given = {name: moved(x) for name, x in case.given.items()}
    return case._replace(given=given, grads=list(map(moved, case.grads)))


@contextmanager
def on_the_shim(calls: ShimCalls) -> Iterator[None]:
    """The compiled regions on CPU tensors are run by CUDA's kernels; what nobody writes is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_run", compiled._launch)
        patch.setattr(cuda, "call", calls)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@contextmanager
def longest_strips() -> Iterator[None]:
    """Each thread walks as many tokens as it does in large problems."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "WANTED_BLOCKS", 1)
        yield


def results(region: str, case: Case, want: bool = True) -> dict[str, Tensor]:
    """All that both directions give."""
    found = {f"result {i}": x for i, x in enumerate(forward(region, case))}
    return found | {f"gradient of {name}": x for name, x in backward(region, case, want).items()}


def equals_its_definition(region: str, case: Case) -> None:
    expected = {f"result {i}": x for i, x in enumerate(case.outputs)}
    expected |= {f"gradient of {name}": x for name, x in case.gradients.items()}
    found = results(region, case)
    if region.startswith("pre7 of"):
        expected["gradient of v0"] = torch.zeros_like(expected["gradient of k0"])
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert_equals(x.cpu(), expected[name], name)


def is_the_same(found: dict[str, Tensor], expected: dict[str, Tensor], but: str = "") -> None:
    """Bit for bit, without the names that end so."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert (but and name.endswith(but)) or torch.equal(x, expected[name]), name


def is_the_same_in_any_order(raw, region: str, case: Case) -> None:
    first = results(region, case)
    is_the_same(results(region, case), first)
    with schedule(raw, reverse=True):
        is_the_same(results(region, case), first)
