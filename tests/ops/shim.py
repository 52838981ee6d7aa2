"""The CUDA kernels as plain C++ behind a stand-in for the driver, so that Python's whole path runs without a GPU.

`ShimLibrary` has the methods of `wkv_abi.Library`, but calls what a run on a card calls: ops/launches.py plans, and
ops/driver.py packs the arguments and launches.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rwkv_bone.ops import driver
from rwkv_bone.ops.build import SOURCES
from rwkv_bone.ops.launches import ELEMENTS, HEAD_SIZES, kernel_names, launches, source
from tests.ops.wkv_abi import Case, Runner, pointer

COMPILE = ["g++", "-x", "c++", "-std=c++17", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]


def compile_on_shim(kernels: str, target: Path, *flags: str) -> Path:
    """The text of kernels (and what it includes) with the stand-in for the driver, as one library."""
    text = target.with_suffix(".cu")
    text.write_text(f'{kernels}\n#include "driver.cpp"\n')
    command = [*COMPILE, *(flags or ["-O2"]), f"-I{SOURCES / 'shim'}", f"-I{SOURCES}", str(text), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def build_shim(operator: str, folder: Path) -> Path:
    """All kernels of an operator, compiled once per content."""
    kernels = source(operator, ELEMENTS, HEAD_SIZES)
    texts = [path.read_bytes() for pattern in ("*.cuh", "shim/*") for path in sorted(SOURCES.glob(pattern))]
    name = hashlib.sha256(b"".join([kernels.encode(), *texts])).hexdigest()[:16]
    path = folder / f"{operator}-{name}.so"
    if not path.exists():
        compile_on_shim(kernels, path.with_suffix(".partial")).rename(path)
    return path


@contextmanager
def schedule(raw: ctypes.CDLL, *, first: int = 0, last: int = 2**31, reverse: bool = False) -> Iterator[None]:
    """Run only blocks [first, last) of every launch, and the threads of a block in reverse order."""
    raw.shim_schedule(ctypes.c_int64(first), ctypes.c_int64(last), int(reverse))
    try:
        yield
    finally:
        raw.shim_schedule(ctypes.c_int64(0), ctypes.c_int64(2**31), 0)


class ShimLibrary(Runner):
    """One operator on the shim; `raw` is the library itself, `driver` what the product's driver.py makes of it."""

    device_type = "cuda"

    def __init__(self, path: Path, operator: str):
        super().__init__(operator)
        self.driver, self.raw = driver.Driver(str(path)), ctypes.CDLL(str(path))
        self.raw.shim_argument_bytes.restype = ctypes.c_size_t
        names = [name for dtype in ELEMENTS for N in HEAD_SIZES for name in kernel_names(operator, dtype, N)]
        self.kernels = self.driver.load(b"", names, device=0)

    def planned(self, name: str, case: Case, *tensors: Tensor | None):
        """The launches of forward or backward of `case`, with the tensors that follow the initial state."""
        given = [*(case[key] for key in self.inputs), case["state"], *tensors]
        dtype = str(case["r"].dtype).removeprefix("torch.")
        offsets = pointer(case.get("cu_seqlens"))
        return launches(self.operator, name, dtype, self.sizes(case), offsets, list(map(pointer, given)))

    def call(self, name: str, case: Case, *tensors: Tensor | None) -> None:
        self.driver.launch(self.kernels, self.planned(name, case, *tensors), device=0, stream=0)
