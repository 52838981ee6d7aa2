"""Calls a WKV-6 or WKV-5 library through its C interface on CPU tensors. All outputs start as NaN."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from tests.ops.wkv7_abi import DTYPES, INT, POINTER, SIZE, pointer, poisoned


class Library:
    """The functions of one operator ("wkv6" or "wkv5") of a shared library; `raw` is the library itself."""

    def __init__(self, path: Path | str, operator: str):
        self.raw, self.operator = ctypes.CDLL(str(path)), operator
        start = [INT, SIZE, SIZE, SIZE, SIZE, *[POINTER] * 6]  # dtype; B, T, H, N; r w k v u s0
        end = [INT, POINTER]  # device, stream
        self.function("forward").argtypes = [*start, *[POINTER] * 3, *end]  # y sT saved
        # saved dy dsT workspace dr dw dk dv du ds0
        self.function("backward").argtypes = [*start, *[POINTER] * 10, *end]
        for name in ("saved_floats", "workspace_floats"):
            self.function(name).argtypes, self.function(name).restype = [SIZE] * 4, SIZE
        self.function("error").restype = ctypes.c_char_p

    def function(self, name: str):
        return getattr(self.raw, f"{self.operator}_{name}")

    def call(self, name: str, *arguments) -> None:
        code = self.function(name)(*arguments)
        assert code == 0, self.function("error")(code).decode()


def problem(case: dict[str, Tensor | None]) -> tuple:
    """The arguments that begin both calls, for one case of `wkv6_inputs`. `case` must outlive the call."""
    r = case["r"]
    return DTYPES[r.dtype], *r.shape, *(pointer(case[name]) for name in ("r", "w", "k", "v", "u", "state"))


def scratch(library: Library, case: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What forward saves for backward, and backward's workspace."""
    sizes = case["r"].shape
    saved, workspace = (library.function(name)(*sizes) for name in ("saved_floats", "workspace_floats"))
    return poisoned((saved,)), poisoned((workspace,))


def gradients(library: Library, case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """NaN-filled outputs of backward, in the order of its arguments."""
    B, T, H, N = case["r"].shape
    dtype, rows = case["r"].dtype, (B, H, N)
    return {
        "dr": poisoned((B, T, H, N), dtype),
        "dw": poisoned((B, T, H, N) if library.operator == "wkv6" else rows),
        "dk": poisoned((B, T, H, N), dtype),
        "dv": poisoned((B, T, H, N), dtype),
        "du": poisoned(rows),
        "dstate0": poisoned((B, H, N, N)),
    }


def run(library: Library, case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """y, state and every gradient of one case of `wkv6_inputs`, named and shaped as `reference_gradients` does it."""
    B, _, H, N = case["r"].shape
    saved, workspace = scratch(library, case)
    y, state = poisoned(case["r"].shape, case["r"].dtype), poisoned((B, H, N, N))
    library.call("forward", *problem(case), *map(pointer, (y, state, saved)), 0, None)
    outputs = gradients(library, case)
    given = (saved, case["dy"], case["dstate"], workspace, *outputs.values())
    library.call("backward", *problem(case), *map(pointer, given), 0, None)
    summed = {name: outputs[name].sum(0) for name in ("dw", "du") if outputs[name].dim() == 3}
    return {"y": y, "state": state, **outputs, **summed}
