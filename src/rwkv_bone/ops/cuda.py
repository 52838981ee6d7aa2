"""The CUDA form of the operators: compile what a run needs for the card that is there, keep it, launch it.

A unit is one operator in one form, dtype and head size: four to seven kernels, compiled by NVRTC in a few seconds and
kept as machine code. cuda/README.md follows a launch from Python to the card.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from rwkv_bone.ops import build, chunked_launches, driver, launches, nvrtc
from rwkv_bone.ops.sizes import EXACT

INCLUDE = re.compile(r'^#include "(\w+\.cuh)"', re.MULTILINE)


CALLS = 1024  # plans that are kept: one for each length of a sequence, where lengths differ
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # cheaper than an object for it, where torch has it


class Kernels(Protocol):
    """What is compiled and loaded at a time. A NamedTuple, whose words make the name of its file."""

    @property
    def dynamic_shared(self) -> bool:
        """Whether each of its kernels has to be told how much shared memory it gets."""

    def __iter__(self) -> Iterator[object]: ...

    def __hash__(self) -> int: ...

    def source(self) -> str:
        """C++ that makes the kernels."""

    def kernels(self) -> list[str]:
        """Their names."""

    def plan(
        self, step: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]
    ) -> list[launches.Launch]:
        """The launches of "forward" or "backward". Raises ValueError for what no kernel can take."""


class Unit(NamedTuple):
    """The kernels of a recurrence."""

    operator: str
    label: str  # see ops/sizes.py
    dtype: str  # of launches.ELEMENTS, or of chunked_launches.ELEMENTS
    N: int

    @property
    def dynamic_shared(self) -> bool:
        """Of the chunked kernels."""
        return self.label != EXACT

    def source(self) -> str:
        """C++ that makes the unit's kernels."""
        operator, label, dtype, N = self
        if label == EXACT:
            return launches.source(operator, [dtype], [N])
        return chunked_launches.source(operator, label, [dtype], [N])

    def kernels(self) -> list[str]:
        """Their names."""
        operator, label, dtype, N = self
        if label == EXACT:
            return launches.kernel_names(operator, dtype, N)
        return chunked_launches.kernel_names(operator, label, dtype, N)

    def plan(
        self, step: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]
    ) -> list[launches.Launch]:
        """See launches.launches and chunked_launches.launches. Raises ValueError for what no kernel can take."""
        operator, label, dtype, _ = self
        if label == EXACT:
            return launches.launches(operator, step, dtype, sizes, offsets, tensors)
        return chunked_launches.launches(operator, step, label, dtype, sizes, offsets, tensors)


def compiled(unit: Kernels, target: str, compiler: nvrtc.Nvrtc, cache: Path | None = None) -> Path:
    """The kernels of a unit for a target of `Nvrtc.target`, compiled if need be.

    The file's name holds everything that decides its content: sources, options, target, version of the compiler.
    Raises BuildError.
    """
    text = unit.source()
    headers = read_headers(text)
    content = repr((text, headers, nvrtc.OPTIONS, target, compiler.version))
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:20]
    kind = "cubin" if target.startswith("sm_") else "ptx"

    def make(path: Path) -> None:
        path.write_bytes(compiler.compile(text, headers, target))

    name = f"{'-'.join(map(str, unit))}-{target}-{fingerprint}.{kind}"
    return build.kept(name, make, cache)


def read_headers(text: str) -> dict[str, str]:
    """The kernels' headers that a source includes, and theirs: {name: content}. Raises BuildError if one is missing."""
    found: dict[str, str] = {}
    wanted = INCLUDE.findall(text)
    while wanted:
        name = wanted.pop(0)
        if name in found:
            continue
        if not (build.SOURCES / name).is_file():
            raise build.BuildError(build.MISSING.format(build.SOURCES / name))
        found[name] = (build.SOURCES / name).read_text(encoding="utf-8")
        wanted += INCLUDE.findall(found[name])
    return found


@functools.cache
def kernels(unit: Kernels, device: int) -> dict[str, driver.Kernel]:
    """The unit's kernels on a device, compiled and loaded on first use. Raises BuildError or driver.DriverError."""
    compiler = nvrtc.find()
    target = compiler.target(torch.cuda.get_device_capability(device))
    image = compiled(unit, target, compiler).read_bytes()
    loaded = driver.find().load(image, unit.kernels(), device)
    for name, kernel in loaded.items():
        # Launched with too little, it would put an end to everything that this process does on the device.
        if unit.dynamic_shared and not kernel.shared:
            raise driver.DriverError(f"the driver does not find {name}_shared in the compiled kernels")
    return loaded


def call(unit: Kernels, step: str, device: int, sizes: tuple[int, ...], pointers: Sequence[int | None]) -> None:
    """Puts "forward" or "backward" on the device's current stream; pointers are the offsets', then the tensors'.

    See `plan` of the unit for the arguments, and for what raises ValueError. A plan is made once for all calls of the
    same sizes.
    """
    if any([pointer % launches.ALIGNMENT for pointer in pointers if pointer]):
        unit.plan(step, sizes, pointers[0], pointers[1:])  # which says of what
    ready = _prepared(unit, step, device, sizes, tuple([not pointer for pointer in pointers]))
    ready(pointers, _raw_stream(device) if _raw_stream else torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(CALLS)
def _prepared(unit: Kernels, step: str, device: int, sizes: tuple[int, ...], null: tuple[bool, ...]) -> driver.Call:
    offsets, *tensors = [None if missing else launches.stand_in(i) for i, missing in enumerate(null)]
    planned = unit.plan(step, sizes, offsets, tensors)
    return driver.find().prepare(kernels(unit, device), planned, device)
