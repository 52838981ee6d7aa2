"""Calls into the compiled kernels: the same functions, under the same names, for the processor and for CUDA.

For an operator X the library exports X_forward, X_backward, X_saved_floats, X_workspace_floats and X_error (see
cuda/README.md). Everything here is the same for every operator.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_bone.ops import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ALIGNMENT = 16  # bytes; the kernels load vectors


@functools.cache
def library(operator: str, device_type: str) -> ctypes.CDLL:
    """Builds if need be and loads the operator's library for "cpu" or "cuda". Raises build.BuildError."""
    if device_type == "cpu":
        path = build.cpu_library(operator)
    else:
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        path = build.cuda_library(operator, [f"sm_{major}{minor}" for major, minor in sorted(found)])
    loaded = ctypes.CDLL(str(path))
    for name in ("saved_floats", "workspace_floats"):
        function = getattr(loaded, f"{operator}_{name}")
        function.argtypes, function.restype = [ctypes.c_int64] * 5, ctypes.c_int64
    getattr(loaded, f"{operator}_error").restype = ctypes.c_char_p
    return loaded


def scratch(operator: str, name: str, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """An uninitialised float32 buffer of `<operator>_<name>(B, T, H, N, D)` elements beside `like` [B, T, H, N]."""
    size = getattr(library(operator, like.device.type), f"{operator}_{name}")(*like.shape, documents(cu_seqlens))
    return torch.empty(size, dtype=torch.float32, device=like.device)


def documents(cu_seqlens: Tensor | None) -> int:
    """The interface's D: the number of packed documents; 0 if nothing is packed."""
    return 0 if cu_seqlens is None else cu_seqlens.numel() - 1


def ready(x: Tensor | None) -> Tensor | None:
    """x itself if a kernel can read it, otherwise a contiguous, aligned copy."""
    if x is None or (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def call(operator: str, step: str, like: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor | None) -> None:
    """Runs `<operator>_<step>(dtype, B, T, H, N, D, cu_seqlens, tensors..., device, stream)`; dtype and sizes are those
    of `like`, and D those of `cu_seqlens`.

    None is passed as a null pointer. On CUDA the kernel goes to the current stream of like's device, on the processor
    it gets PyTorch's number of threads. Raises RuntimeError with the library's own words.
    """
    loaded = library(operator, like.device.type)
    if like.is_cuda:
        device, stream = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    else:
        device, stream = torch.get_num_threads(), None
    code = getattr(loaded, f"{operator}_{step}")(
        ctypes.c_int(DTYPES[like.dtype]),
        *map(ctypes.c_int64, (*like.shape, documents(cu_seqlens))),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (cu_seqlens, *tensors)),
        ctypes.c_int(device),
        ctypes.c_void_p(stream),
    )
    if code:
        reason = getattr(loaded, f"{operator}_error")(code).decode()
        raise RuntimeError(f"{operator}_{step} failed on {like.device} with sizes {tuple(like.shape)}: {reason}")
