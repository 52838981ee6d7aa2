"""The CUDA form of the operators: compile what a run needs for the card that is there, keep it, launch it.

A unit is one operator in one dtype and head size: four or five kernels, compiled by NVRTC in about a second and kept as
machine code. cuda/README.md follows a launch from Python to the card.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.ops import build, driver, nvrtc
from rwkv_bone.ops.launches import HEADERS, kernel_names, launches, source


def compiled(operator: str, dtype: str, N: int, target: str, compiler: nvrtc.Nvrtc, cache: Path | None = None) -> Path:
    """The kernels of one operator, dtype and head size for a target of `Nvrtc.target`, compiled if need be.

    The file's name holds everything that decides its content: sources, options, target, version of the compiler.
    Raises BuildError.
    """
    text, headers = source(operator, [dtype], [N]), _headers(operator)
    content = repr((text, headers, nvrtc.OPTIONS, target, compiler.version))
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:20]
    kind = "cubin" if target.startswith("sm_") else "ptx"

    def make(path: Path) -> None:
        path.write_bytes(compiler.compile(text, headers, target))

    return build.kept(f"{operator}-{dtype}-{N}-{target}-{fingerprint}.{kind}", make, cache)


def _headers(operator: str) -> dict[str, str]:
    names = ("common.cuh", HEADERS[operator])
    for name in names:
        if not (build.SOURCES / name).is_file():
            raise build.BuildError(build.MISSING.format(build.SOURCES / name))
    return {name: (build.SOURCES / name).read_text(encoding="utf-8") for name in names}


@functools.cache
def kernels(operator: str, dtype: str, N: int, device: int) -> dict:
    """The unit's kernels on a device, compiled and loaded on first use. Raises BuildError or driver.DriverError."""
    compiler = nvrtc.find()
    target = compiler.target(torch.cuda.get_device_capability(device))
    image = compiled(operator, dtype, N, target, compiler).read_bytes()
    return driver.find().load(image, kernel_names(operator, dtype, N), device)


def call(operator: str, step: str, like: Tensor, sizes: tuple[int, ...], pointers: list[int | None]) -> None:
    """Puts "forward" or "backward" on the current stream of like's device. See launches.launches for the arguments."""
    dtype, device = str(like.dtype).removeprefix("torch."), like.device.index
    offsets, *tensors = pointers
    planned = launches(operator, step, dtype, sizes, offsets, tensors)
    loaded = kernels(operator, dtype, like.shape[-1], device)
    driver.find().launch(loaded, planned, device, torch.cuda.current_stream(device).cuda_stream)
