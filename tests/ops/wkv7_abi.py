"""Calls a WKV-7 library through its C interface (`cuda/README.md`) on CPU tensors. All outputs start as NaN."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    start = [INT, SIZE, SIZE, SIZE, SIZE, *[POINTER] * 7]  # dtype; B, T, H, N; r w k v a b s0
    end = [INT, POINTER]  # device, stream
    library.wkv7_forward.argtypes = [*start, *[POINTER] * 3, *end]  # y sT saved
    library.wkv7_backward.argtypes = [*start, *[POINTER] * 11, *end]  # saved dy dsT workspace dr dw dk dv da db ds0
    for name in ("wkv7_saved_floats", "wkv7_workspace_floats"):
        getattr(library, name).argtypes = [SIZE] * 4
        getattr(library, name).restype = SIZE
    library.wkv7_error.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, code: int) -> None:
    assert code == 0, library.wkv7_error(code).decode()


def pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def problem(case: dict[str, Tensor | None]) -> tuple:
    """The arguments that begin both calls, for one case of `wkv_inputs`. `case` must outlive the call."""
    r = case["r"]
    return DTYPES[r.dtype], *r.shape, *(pointer(case[name]) for name in ("r", "w", "k", "v", "a", "b", "state"))


def scratch(library: ctypes.CDLL, case: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What forward saves for backward, and backward's workspace."""
    sizes = case["r"].shape
    return poisoned((library.wkv7_saved_floats(*sizes),)), poisoned((library.wkv7_workspace_floats(*sizes),))


def run(library: ctypes.CDLL, case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """y, state and every gradient of one case of `wkv_inputs`, named as `reference_gradients` names them."""
    B, T, H, N = sizes = tuple(case["r"].shape)
    dtype = case["r"].dtype
    saved, workspace = scratch(library, case)
    y, state = poisoned(sizes, dtype), poisoned((B, H, N, N))
    forward = (y, state, saved)
    check(library, library.wkv7_forward(*problem(case), *map(pointer, forward), 0, None))

    outputs = {name: poisoned(sizes, torch.float32 if name == "dw" else dtype)
               for name in ("dr", "dw", "dk", "dv", "da", "db")}
    outputs["dstate0"] = poisoned((B, H, N, N))
    backward = (saved, case["dy"], case["dstate"], workspace, *outputs.values())
    check(library, library.wkv7_backward(*problem(case), *map(pointer, backward), 0, None))
    return {"y": y, "state": state, **outputs}
