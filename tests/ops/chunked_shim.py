"""The chunked CUDA kernels on the host shim, a launch at a time, with what each hands to the next.

Sizes: B batch, T tokens, H heads, N head size, D documents, L tokens of a chunk.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_bone.ops import chunked_launches, driver
from rwkv_bone.ops.cuda import Unit
from rwkv_bone.ops.launches import Launch
from rwkv_bone.ops.sizes import backward_regions, chunking, forward_regions
from tests.ops.shim import ShimLibrary, build_once
from tests.ops.wkv_abi import Case, Runner

MOST_SHARED = 512 * 1024  # bytes of a block: kSharedBytes of cuda/shim/cuda_runtime.h, since no card runs "debug"
# mode -> (dtype of a hand-over's numbers, how many of them, at the same place of one plane each, make an element)
PLANES = {"debug": (torch.float32, 1), "chunked": (torch.bfloat16, 1), "accurate": (torch.bfloat16, 2)}
DTYPES = {"debug": torch.float32, "chunked": torch.bfloat16, "accurate": torch.float32}  # of tensors, in tests


def dtype_of(label: str) -> str:
    """That of chunked_launches.ELEMENTS with which tests run kernels of a label."""
    chunked = chunking(label)
    assert chunked
    return str(DTYPES[chunked.mode]).removeprefix("torch.")


class Step(NamedTuple):
    """A kernel of a run, with copies of what lay in memory before and after it: tensors and hand-overs, by name."""

    part: str
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class ChunkedShim(ShimLibrary):
    """The kernels of one unit. traffic: part -> bytes that it last read from and wrote to global memory."""

    def __init__(self, path: Path, unit: Unit) -> None:
        Runner.__init__(self, unit.operator)
        self.unit, self.label = unit, unit.label
        chunked = chunking(unit.label)
        assert chunked
        self.mode, self.L = chunked
        self.raw = ctypes.CDLL(str(path))
        self.raw.shim_most_shared(MOST_SHARED)
        self.driver = driver.Driver(str(path))
        self.kernels = self.driver.load(b"", unit.kernels(), device=0)
        self.splits: int | None = None  # of a scan, instead of what is planned
        self.traffic: dict[str, tuple[int, int]] = {}
        self.steps: list[Step] | None = None  # of the last run, if they are wanted

    @classmethod
    def build(cls, unit: Unit, folder: Path) -> ChunkedShim:
        return cls(build_once(unit.source(), folder, "-".join(map(str, unit))), unit)

    def planned(self, name: str, case: Case, *tensors: Tensor | None) -> list[Launch]:
        return [self._split(launch, case) for launch in super().planned(name, case, *tensors)]

    def call(self, name: str, case: Case, *tensors: Tensor | None) -> None:
        launches = self.planned(name, case, *tensors)
        names = ("y", "state") if name == "forward" else (*(f"d{x}" for x in self.inputs), "dstate0")
        outputs = dict(zip(names, tensors[-len(names) :] if name == "backward" else tensors, strict=False))
        saved = tensors[2] if name == "forward" else tensors[0]
        workspace = self.workspace if name == "forward" else tensors[3]

        def memory() -> dict[str, Tensor]:
            given = {key: x.clone() for key, x in outputs.items() if x is not None}
            return given | self.handed_over(name, case, workspace, saved)

        for launch in launches:
            before = memory() if self.steps is not None else {}
            self.launch(launch)
            if self.steps is not None:
                self.steps.append(Step(self.part(launch), before, memory()))

    def launch(self, launch: Launch) -> None:
        counted = ctypes.c_int64(), ctypes.c_int64()
        self.raw.shim_traffic(*map(ctypes.byref, counted))
        self.driver.launch(self.kernels, [launch], device=0, stream=0)
        self.raw.shim_traffic(*map(ctypes.byref, counted))
        self.traffic[self.part(launch)] = counted[0].value, counted[1].value

    def run_in_steps(self, case: Case) -> tuple[list[Step], dict[str, Tensor]]:
        """What run() returns, and how it came about."""
        self.steps = []
        try:
            return self.steps, self.run(case)
        finally:
            self.steps = None

    def part(self, launch: Launch) -> str:
        """prepare, scan, outputs .."""
        return launch.kernel.removeprefix(f"{self.operator}_{self.label}_").removesuffix(
            f"_{self.unit.dtype}_{self.unit.N}"
        )

    def _split(self, launch: Launch, case: Case) -> Launch:
        # WKV-5's and -6's scan has nothing to choose.
        if self.splits is None or self.operator != "wkv7" or self.part(launch) not in chunked_launches.SCANS:
            return launch
        B, _, H, _, D = self.sizes(case)
        heads = (D or B) * H
        threads = launch.threads * launch.blocks // heads
        return launch._replace(blocks=heads * self.splits, threads=threads // self.splits)

    def handed_over(self, name: str, case: Case, workspace: Tensor, saved: Tensor) -> dict[str, Tensor]:
        """Copies of all hand-overs that forward or backward works with: matrices as float32 [slots, H, rows, columns].

        As in the specifications (chunk_spec7.py), W and bt have tokens as rows.
        """
        B, T, H, N, D = self.sizes(case)
        if name == "forward":
            regions = forward_regions(self.operator, self.label, B, T, H, N, D, save=True)
        else:
            regions = backward_regions(self.operator, self.label, B, T, H, N, D)
        parts = dict(zip(regions, workspace.view(torch.uint8).split(list(regions.values())), strict=True))
        parts["states"] = saved.view(torch.uint8)
        shapes = {"W": (N, self.L), "bt": (self.L, N), "Q": (self.L, N), "states": (N, N), "dstates": (N, N)}
        found = {}
        for key, raw in parts.items():
            if key in shapes:
                found[key] = self.matrices(raw, *shapes[key]).unflatten(0, (-1, H))
            else:
                numbers = raw.view(torch.float32).clone()
                found[key] = numbers.unflatten(0, (-1, H, 2, N) if key == "sums" else (-1, H, N))
        if "W" in found:
            found["W"] = found["W"].mT
        if "growth" in found:
            found["whole"] = 1 + found.pop("growth").double()
        return found

    def matrices(self, raw: Tensor, rows: int, columns: int) -> Tensor:
        """bytes -> float32 [.., rows, columns]"""
        dtype, planes = PLANES[self.mode]
        numbers = raw.view(dtype).view(-1, planes, rows * columns)[..., places(rows, columns)]
        return numbers.float().sum(1)


def places(rows: int, columns: int, *, shared: bool = False) -> Tensor:
    """[rows, columns]: where the elements of an operand lie: Arrangement of cuda/warp.cuh.

    8 x 8 matrices one after another, along a row of them first. In shared memory there are 8 elements between them.
    """
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    matrix = row // 8 * (columns // 8) + column // 8
    return matrix * (72 if shared else 64) + row % 8 * 8 + column % 8
