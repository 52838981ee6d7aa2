"""Calls a compiled operator on CPU tensors, all of whose outputs start as NaN."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.ops import sizes

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
INPUTS = {"wkv5": "rwkvu", "wkv6": "rwkvu", "wkv7": "rwkvab"}  # in the interface's order, each of one letter

# As the make_case functions of wkv_inputs and wkv6_inputs give it; packed documents have "cu_seqlens" as well.
Case = dict[str, Tensor | None]


def pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """All bits are set: NaN in whatever number format somebody reads it."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(torch.uint8).fill_(255)
    return tensor


class Runner:
    """Forward and backward of one operator ("wkv5", "wkv6" or "wkv7") on CPU tensors, whatever computes them."""

    label = "cpu"  # of the kernels whose scratch memory it needs: see ops/sizes.py

    def __init__(self, operator: str):
        self.operator, self.inputs = operator, INPUTS[operator]

    def call(self, name: str, case: Case, *tensors: Tensor | None) -> None:
        """forward or backward of `case`, with the tensors that follow s0 in the interface."""
        raise NotImplementedError

    def floats(self, name: str, *problem: int) -> int:
        """saved_floats or workspace_floats of B, T, H, N, D."""
        return getattr(sizes, name)(self.operator, self.label, *problem)

    def sizes(self, case: Case) -> tuple[int, ...]:
        """B, T, H, N, D."""
        return *case["r"].shape, len(case["cu_seqlens"]) - 1 if "cu_seqlens" in case else 0

    def scratch(self, case: Case) -> tuple[Tensor, Tensor]:
        """What forward saves for backward, and backward's workspace."""
        saved, workspace = (self.floats(name, *self.sizes(case)) for name in ("saved_floats", "workspace_floats"))
        return poisoned((saved,)), poisoned((workspace,))

    def gradients(self, case: Case) -> dict[str, Tensor]:
        """Outputs of backward in the interface's order, as it wants them: a row per sequence of what all share."""
        r = case["r"]
        B, _, H, N, D = self.sizes(case)
        outputs = {}
        for name in self.inputs:
            shape = tuple(r.shape) if case[name].dim() == 4 else (D or B, H, N)
            outputs[f"d{name}"] = poisoned(shape, case[name].dtype)
        return {**outputs, "dstate0": poisoned((D or B, H, N, N))}

    def run(self, case: Case) -> dict[str, Tensor]:
        """y, state and every gradient, named and shaped as the `reference_gradients` functions do it."""
        r = case["r"]
        B, _, H, N, D = self.sizes(case)
        saved, workspace = self.scratch(case)
        y, state = poisoned(tuple(r.shape), r.dtype), poisoned((D or B, H, N, N))
        self.call("forward", case, y, state, saved)
        outputs = self.gradients(case)
        self.call("backward", case, saved, case["dy"], case["dstate"], workspace, *outputs.values())
        summed = {name: x.sum(0) for name, x in outputs.items() if x.dim() == 3}
        return {"y": y, "state": state, **outputs, **summed}


class Library(Runner):
    """The functions of one operator of a shared library with the C interface; `raw` is the library itself."""

    def __init__(self, path: Path | str, operator: str):
        super().__init__(operator)
        self.raw = ctypes.CDLL(str(path))
        start = [INT, *[SIZE] * 5, *[POINTER] * (len(self.inputs) + 2)]  # dtype; B, T, H, N, D; offsets, inputs, s0
        end = [INT, POINTER]  # threads, unused
        constants = 1 if operator == "wkv7" else 0  # w0
        self.function("forward").argtypes = [*start, *[POINTER] * (3 + constants), *end]  # y sT saved w0
        # saved dy dsT w0 workspace, gradients of inputs and s0
        self.function("backward").argtypes = [*start, *[POINTER] * (4 + constants + len(self.inputs) + 1), *end]
        self.function("saved_floats").argtypes, self.function("saved_floats").restype = [SIZE] * 5, SIZE
        self.function("error").restype = ctypes.c_char_p

    def function(self, name: str):
        return getattr(self.raw, f"{self.operator}_{name}")

    def error(self, code: int) -> str:
        return self.function("error")(code).decode()

    def call(self, name: str, case: Case, *tensors: Tensor | None) -> None:
        if self.operator == "wkv7":
            tensors = (*tensors[:3], case.get("w0"), *tensors[3:])
        code = self.function(name)(*self.problem(case), *map(pointer, tensors), 0, None)
        assert code == 0, self.error(code)

    def problem(self, case: Case) -> tuple:
        """The arguments that begin both calls. `case` must outlive the call."""
        offsets, tensors = pointer(case.get("cu_seqlens")), (pointer(case[name]) for name in (*self.inputs, "state"))
        return DTYPES[case["r"].dtype], *self.sizes(case), offsets, *tensors
