"""Calls into the compiled kernels: one function for the processor's library and for CUDA's kernels."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_bone.ops import build, cuda
from rwkv_bone.ops.launches import ALIGNMENT
from rwkv_bone.ops.sizes import CPU

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the processor's libraries know them
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # as CUDA's kernels are called


@functools.cache
def library(operator: str) -> ctypes.CDLL:
    """Builds if need be and loads the operator's library for the processor. Raises build.BuildError."""
    loaded = ctypes.CDLL(str(build.cpu_library(operator)))
    getattr(loaded, f"{operator}_error").restype = ctypes.c_char_p
    return loaded


def documents(cu_seqlens: Tensor | None) -> int:
    """D: the number of packed documents; 0 if nothing is packed."""
    return 0 if cu_seqlens is None else cu_seqlens.numel() - 1


def ready(x: Tensor | None) -> Tensor | None:
    """x itself if a kernel can read it, otherwise a contiguous, aligned copy."""
    if x is None or (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def call(
    operator: str, step: str, like: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor | None, label: str = CPU
) -> None:
    """Runs "forward" or "backward" of an operator on `tensors`, in the order of cuda/README.md; None = null pointer.

    dtype and sizes are those of `like` [B, T, H, N], D is that of `cu_seqlens`. `label` says which kernels: see
    ops/sizes.py. CUDA's go to the current stream of like's device; the processor's library gets PyTorch's number of
    threads. Raises RuntimeError with the driver's or the library's own words.
    """
    shape = (*like.shape, documents(cu_seqlens))
    if label != CPU:
        r, w, *_ = tensors
        assert r is not None and w is not None
        dtype = NAMES[r.dtype] + ("w" if w.dtype == torch.bfloat16 else "")
        return launch(cuda.Unit(operator, label, dtype, shape[3]), step, like, shape, cu_seqlens, *tensors)
    loaded = library(operator)
    code = getattr(loaded, f"{operator}_{step}")(
        ctypes.c_int(DTYPES[like.dtype]),
        *map(ctypes.c_int64, shape),
        *map(ctypes.c_void_p, _pointers(cu_seqlens, *tensors)),
        ctypes.c_int(torch.get_num_threads()),
        None,
    )
    if code:
        raise _failed(operator, step, like, shape, getattr(loaded, f"{operator}_error")(code).decode())


def launch(
    unit: cuda.Kernels,
    step: str,
    like: Tensor,
    sizes: tuple[int, ...],
    offsets: Tensor | None,
    *tensors: Tensor | None,
) -> None:
    """Puts "forward" or "backward" of CUDA's kernels on the current stream of like's device; None = null pointer.

    Sizes, offsets and tensors are those of the unit's `plan`. The tensors must be contiguous and aligned: see `ready`.
    Raises RuntimeError.
    """
    try:
        cuda.call(unit, step, like.device.index, sizes, _pointers(offsets, *tensors))
    except ValueError as problem:
        raise _failed(next(iter(unit)), step, like, sizes, problem) from problem


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _failed(name: object, step: str, like: Tensor, sizes: tuple[int, ...], reason: object) -> RuntimeError:
    return RuntimeError(f"{name}_{step} failed on {like.device} with sizes {sizes}: {reason}")
