"""The CUDA kernels as plain C++ behind a stand-in for the driver, so that Python's whole path runs without a GPU.

`ShimLibrary` has the methods of `wkv_abi.Library`, but calls what a run on a card calls: ops/launches.py or
ops/chunked_launches.py plans and packs the arguments, and ops/driver.py launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.ops import chunked_launches, driver
from rwkv_bone.ops.build import SOURCES
from rwkv_bone.ops.cuda import Kernels, Unit
from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES, Launch, source
from rwkv_bone.ops.sizes import EXACT, forward_workspace_floats
from tests.ops.wkv_abi import Case, Runner, pointer, poisoned

COMPILE = ["g++", "-x", "c++", "-std=c++17", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]


def compile_on_shim(kernels: str, target: Path, *flags: str, sources: Path = SOURCES) -> Path:
    """The text of kernels (and what it includes from `sources`) with the stand-in for the driver, as one library."""
    text = target.with_suffix(".cu")
    text.write_text(f'{kernels}\n#include "driver.cpp"\n')
    command = [*COMPILE, *(flags or ["-O2"]), f"-I{sources / 'shim'}", f"-I{sources}", str(text), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def build_shim(operator: str, folder: Path, label: str = EXACT) -> Path:
    """All kernels of an operator of one label (see ops/sizes.py), compiled once per content."""
    if label == EXACT:
        kernels = source(operator, ELEMENTS, HEAD_SIZES)
    else:
        dtypes = chunked_launches.dtypes(operator)
        kernels = chunked_launches.source(operator, label, dtypes, chunked_launches.HEAD_SIZES)
    return build_once(kernels, folder, f"{operator}-{label}")


def build_once(kernels: str, folder: Path, name: str) -> Path:
    """compile_on_shim, once per content."""
    texts = [path.read_bytes() for pattern in ("*.cuh", "shim/*") for path in sorted(SOURCES.glob(pattern))]
    content = hashlib.sha256(b"".join([kernels.encode(), *texts])).hexdigest()[:16]
    path = folder / f"{name}-{content}.so"
    if not path.exists():
        # Another process may do the same at the same time.
        compile_on_shim(kernels, path.with_name(f"{path.stem}-{os.getpid()}.partial")).rename(path)
    return path


class ShimCalls:
    """Stands in for `cuda.call`: PyTorch's operators on CPU tensors are run by CUDA's kernels on the shim.

    `taken` holds the unit and the step of each call. Units are compiled when they are first needed.
    """

    def __init__(self, folder: Path):
        self.folder, self.taken = folder, []
        self.loaded: dict[Kernels, tuple[driver.Driver, dict[str, driver.Kernel]]] = {}

    def load(self, path: Path, *units: Kernels) -> None:
        """Kernels that are compiled already."""
        library = driver.Driver(str(path))
        for unit in units:
            self.loaded[unit] = library, library.load(b"", unit.kernels(), device=0)

    def __call__(
        self, unit: Kernels, step: str, device: int, sizes: tuple[int, ...], pointers: list[int | None]
    ) -> None:
        if unit not in self.loaded:
            self.load(build_once(unit.source(), self.folder, "-".join(map(str, unit))), unit)
        library, kernels = self.loaded[unit]
        offsets, *tensors = pointers
        self.taken.append((unit, step))
        library.launch(kernels, unit.plan(step, sizes, offsets, tensors), device=0, stream=0)


@contextmanager
def schedule(raw: ctypes.CDLL, *, first: int = 0, last: int = 2**31, reverse: bool = False) -> Iterator[None]:
    """Run only blocks [first, last) of every launch, and the threads of a block in reverse order."""
    raw.shim_schedule(ctypes.c_int64(first), ctypes.c_int64(last), int(reverse))
    try:
        yield
    finally:
        raw.shim_schedule(ctypes.c_int64(0), ctypes.c_int64(2**31), 0)


class ShimLibrary(Runner):
    """One operator on the shim; `raw` is the library itself, `driver` what the product's driver.py makes of it.

    A case of a chunked label may have "w0" [H, N] float32: its w is then of r's dtype.
    """

    def __init__(self, path: Path, operator: str, label: str = EXACT):
        super().__init__(operator)
        self.label = label
        self.driver, self.raw = driver.Driver(str(path)), ctypes.CDLL(str(path))
        self.raw.shim_argument_bytes.restype = ctypes.c_size_t
        head_sizes, dtypes = HEAD_SIZES, tuple(ELEMENTS)
        if label != EXACT:
            head_sizes, dtypes = chunked_launches.HEAD_SIZES, chunked_launches.dtypes(operator)
        names = [name for dtype in dtypes for N in head_sizes for name in Unit(operator, label, dtype, N).kernels()]
        self.kernels = self.driver.load(b"", names, device=0)

    def planned(self, name: str, case: Case, *tensors: Tensor | None) -> list[Launch]:
        """The launches of forward or backward of `case`, with the tensors that follow the initial state.

        Those are the sequential kernels'; what chunked ones take besides is put in here: w0, and forward's workspace.
        """
        offsets, sizes, w0 = pointer(case.get("cu_seqlens")), self.sizes(case), case.get("w0")
        extra = [w0] if self.label != EXACT and self.operator == "wkv7" else []
        if self.label != EXACT and name == "forward":
            save = tensors[2] is not None
            self.workspace = poisoned((forward_workspace_floats(self.operator, self.label, *sizes, save=save),))
            extra.append(self.workspace)
        given = [*(case[key] for key in self.inputs), case["state"], *tensors[:3], *extra, *tensors[3:]]
        dtype = str(case["r"].dtype).removeprefix("torch.") + ("w" if case["w"].dtype == torch.bfloat16 else "")
        unit = Unit(self.operator, self.label, dtype, sizes[3])
        return unit.plan(name, sizes, offsets, list(map(pointer, given)))

    def call(self, name: str, case: Case, *tensors: Tensor | None) -> None:
        self.driver.launch(self.kernels, self.planned(name, case, *tensors), device=0, stream=0)
