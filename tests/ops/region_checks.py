"""What the regions' CUDA kernels are held to, on the host shim or on a card: see test_regions_source.py.

A check calls PyTorch's operators of ops/regions/compiled.py; where their tensors lie says what runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops import cuda
from rwkv_bone.ops.cross_entropy import _cuda
from rwkv_bone.ops.regions import compiled, launches
from rwkv_bone.ops.regions.launches import Unit
from tests.ops.region_cases import MIX, MIX6, RELU_SQUARE, Case, make_case
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
    if region == RELU_SQUARE:
        return {"one": dict(T=1, C=1), "no whole pack": dict(T=7, C=13), "more than a block has": dict(T=33, C=72)}
    return SHIFTS if region in (MIX, MIX6) else HEADS


@functools.cache
def case_of(region: str, dtypes: str, size: str, device: str = "cpu", **others: int) -> Case:
    return moved(make_case(region, *DTYPES[dtypes], **sizes(region)[size], **others), device)


def moved(case: Case, device: str) -> Case:
    """What is given; what must come lies on the processor."""
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.given.items()}
    return case._replace(given=given, grads=[g.to(device) for g in case.grads])


@contextmanager
def on_the_shim(calls: ShimCalls) -> Iterator[None]:
    """The compiled regions on CPU tensors are run by CUDA's kernels; what nobody writes is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_run", compiled._launch)
        patch.setattr(cuda, "call", calls)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
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
    # Kernels that leave no sums give the rest all the same.
    fewer = results(region, case, want=False)
    is_the_same(fewer, {name: first[name] for name in fewer})
    assert len(fewer) < len(first) or region == RELU_SQUARE


PARAMETERS = {"w0", "a0", "v0_bias", "k_k", "k_a", "r_k", "ln_weight", "ln_bias", "shares"}


def strips_do_not_matter(region: str, case: Case) -> None:
    """But for sums over tokens, which are divided otherwise: those are right."""
    expected = results(region, case)
    with longest_strips():
        found = results(region, case)
        equals_its_definition(region, case)
    for name, x in found.items():
        assert name.split()[-1] in PARAMETERS or torch.equal(x, expected[name]), name


def documents_are_alone(region: str, device: str = "cpu") -> None:
    lengths, C, M, carried = [3, 1, 29, 33, 1], 48, 6, 2
    whole = case_of(region, "bf16", "documents, some carried", device)
    found, begin = results(region, whole), 0
    for i, length in enumerate(lengths):
        part = slice(begin, begin + length)
        begin += length
        given = dict(whole.given, cu_seqlens=None, x=whole.given["x"][:, part])
        if "changes" in given:
            given["changes"] = whole.given["changes"][:, :, part].contiguous()
        given.pop("last")
        if i < carried:
            given["last"] = whole.given["last"][i : i + 1]
        alone = results(region, whole._replace(given=given, grads=[g[:, part].contiguous() for g in whole.grads]))
        for name, x in alone.items():
            if name.endswith("shares"):
                continue
            if name.endswith("last"):
                assert torch.equal(x[0], found[name][i])
            else:
                there = found[name][:, :, part] if name.endswith("changes") else found[name][:, part]
                assert torch.equal(x, there), (name, i)
    assert begin == whole.given["x"].shape[1] and C == whole.given["x"].shape[2] and M == len(whole.grads)


def first_layer_adds_both_parts(dtypes: str, device: str = "cpu") -> None:
    """The gradient of its value, whose own case has none."""
    case = case_of("pre7 of the first layer", dtypes, "the usual head", device)
    names = ("pa", "pv", "k0", "v0", "v_first", "a0", "v0_bias", "k_k", "k_a", "N")
    dw, dk, da, db = case.grads
    found = compiled.pre7_backward(*map(case.given.get, names), dw, dk, da, db, dw, dk, db, True)
    assert torch.equal(found[4], (da.float() + db.float()).to(da.dtype))


def cross_entropy_equals_its_definition(vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> None:
    draw, l2wrap = torch.Generator().manual_seed(0), 0.125
    logits = (3 * torch.randn(5, vocabulary, generator=draw)).to(dtype)
    targets = torch.randint(vocabulary, (5,), generator=draw)
    targets[0] = 0
    # Two largest logits: the first of them counts.
    logits[1, vocabulary // 2 :] = logits[1].max() + 1
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    for row, at in enumerate(logits.float().argmax(1).tolist()):
        first = (logits[row] == logits[row, at]).nonzero()[0]
        expected[row, first] += l2wrap * logits[row, at].item()

    there = logits.to(device, copy=True)
    found = _cuda(there, targets.to(device), l2wrap, gradient=False)
    assert torch.equal(there.cpu(), logits)
    assert torch.equal(found, _cuda(there, targets.to(device), l2wrap, True))
    assert_equals(found.cpu()[None], losses.detach()[None], "losses")
    assert_equals(there.cpu(), expected, "gradients")


def cross_entropy_of_strange_rows(dtype: torch.dtype, device: str = "cpu") -> None:
    logits = torch.randn(4, 40).to(dtype)
    logits[0, ::2] = -torch.inf
    logits[0, 16:24] = -torch.inf  # all that a thread has
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    found = logits.to(device, copy=True)
    targets = torch.tensor([1, 2, 3, 40], device=device)  # the last is none of the vocabulary
    losses = _cuda(found, targets, 0.0, True).cpu()
    expected = torch.nn.functional.cross_entropy(logits[:1].double(), targets[:1].cpu())
    assert torch.allclose(losses[0].double(), expected, rtol=1e-6) and found[0].isfinite().all()
    assert losses[1:].isnan().all() and found[1:3].isnan().all()


def cross_entropy_is_the_same_in_any_order(raw) -> None:
    def run() -> tuple[Tensor, Tensor]:
        logits = torch.randn(2, 4104, generator=torch.Generator().manual_seed(0)).bfloat16()
        return _cuda(logits, torch.tensor([100, 4000]), 0.125, True), logits

    expected = run()
    with schedule(raw, reverse=True):
        assert all(map(torch.equal, run(), expected))


def plans(unit: Unit) -> list[tuple[str, tuple[int, ...], int]]:
    """(step, sizes, how many tensors) of calls that want everything."""
    region, _, size = unit
    if region in ("mix", "mix6"):
        shape = (1, 5, 16, 0, size, 1, 1, 0)
        return [("forward", shape, 4 + size), ("backward", shape, 9 + size)]
    if region == "cross_entropy":
        return [("forward", (5, 16, 0, 1), 3)]
    if region == "relu_square":
        return [("forward", (100,), 2), ("backward", (100,), 3)]
    extra = {"pre7": ((), (1,))}.get(region, ((1,), (1,)))
    count = {step: len(launches.TENSORS[f"{region}_{step}"].split()) for step in ("forward", "backward")}
    return [
        ("forward", (5, 2, size, 0, *extra[0]), count["forward"]),
        ("backward", (5, 2, size, 0, *extra[1]), count["backward"] + 1),
    ]
