"""Calls into the compiled kernels: one function for the processor's library and for CUDA's kernels."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_bone.ops import build, cuda
from rwkv_bone.ops.launches import ALIGNMENT
from rwkv_bone.ops.sizes import CPU

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


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
    pointers = [None if x is None else x.data_ptr() for x in (cu_seqlens, *tensors)]
    if label != CPU:
        r, w, *_ = tensors
        assert r is not None and w is not None
        dtype = str(r.dtype).removeprefix("torch.") + ("w" if w.dtype == torch.bfloat16 else "")
        unit = cuda.Unit(operator, label, dtype, like.shape[-1])
        try:
            return cuda.call(unit, step, like.device.index, shape, pointers)
        except ValueError as problem:
            raise _failed(operator, step, like, problem) from problem
    loaded = library(operator)
    code = getattr(loaded, f"{operator}_{step}")(
        ctypes.c_int(DTYPES[like.dtype]),
        *map(ctypes.c_int64, shape),
        *map(ctypes.c_void_p, pointers),
        ctypes.c_int(torch.get_num_threads()),
        None,
    )
    if code:
        raise _failed(operator, step, like, getattr(loaded, f"{operator}_error")(code).decode())


def _failed(operator: str, step: str, like: Tensor, reason: object) -> RuntimeError:
    return RuntimeError(f"{operator}_{step} failed on {like.device} with sizes {tuple(like.shape)}: {reason}")
