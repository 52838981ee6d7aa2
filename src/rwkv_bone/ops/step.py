"""One token through a whole model on the processor: a list of operations for cuda/cpu/step.cpp, made once for a model.

A model that generates calls some two hundred small operators a token, each of which takes PyTorch longer to call than a
small model's arithmetic takes. Here the calls are made once, when the list is, and run in C++.

Vectors are float32, whatever the weights are: results are nearer to the exact ones than those of a bfloat16 model.

Sizes: C channels, H heads, N head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_bone.ops import native

CODES = ("embed", "norm", "mix", "rows", "column_sums", "fold", "time7", "time6", "gate")
AFTER = ("", "tanh", "sigmoid", "relu_square")
INT8, FOUR_BITS = 2, 3  # kinds of weights beside those of native.DTYPES
POINTERS = 18
LANES = 16  # of the widest vectors: vectors have room for whole ones
LARGEST_HEAD = 256


class _Op(ctypes.Structure):
    """As struct Op in step.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("code", "kind", "after", "add")),
        *((name, ctypes.c_int64) for name in ("m", "n", "state")),
        ("eps", ctypes.c_double),
        ("p", ctypes.c_void_p * POINTERS),
    )


class Steps:
    """The operations of one token. Each method adds one; x, y are vectors of `room`, others are the model's tensors.

    A matrix is read where it is, and kept alive; of a vector of parameters a float32 copy is kept. What happens in each
    is said in cuda/cpu/step_ops.h. Raises build.BuildError without a compiler.
    """

    def __init__(self, N: int):
        self.N = N
        self._library = native.library("step")
        self._ops: list[_Op] = []
        self._kept: list[Tensor] = []  # all tensors that pointers lead to
        self._run: ctypes.Array[_Op] | None = None
        self._room = self.room(1)  # for matrix products

    def room(self, size: int) -> Tensor:
        """A new vector, float32 [size]."""
        whole = torch.zeros(-(-size // LANES) * LANES)
        self._kept.append(whole)
        return whole[:size]

    def parameters(self, *vectors: Tensor) -> Tensor:
        """float32 [all numbers of all vectors], a copy."""
        whole = torch.cat([vector.detach().flatten().float() for vector in vectors])
        self._kept.append(whole)
        return whole

    def embed(self, table: Tensor, y: Tensor) -> None:
        """table [V, C]"""
        self._add("embed", [self._matrix(table), y], m=table.shape[1], kind=native.DTYPES[table.dtype])

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> None:
        self._add("norm", [x, self.parameters(weight), self.parameters(bias), y], m=len(x), eps=eps)

    def mix(self, x: Tensor, shares: Tensor, y: Tensor, state: int, changes: Tensor | None = None) -> None:
        """shares [mixes C] of `parameters`, changes and y [mixes C]; state: where the previous x is."""
        self._add("mix", [x, shares, changes, y], m=len(x), n=len(y) // len(x), state=state)

    def rows(
        self,
        weight: Tensor,
        x: Tensor,
        y: Tensor,
        *,
        after: str = "",
        add: bool = False,
        scales: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """weight [m, n]; or its codes, with scales, and with the 16 values of 4-bit codes."""
        if len(x) > len(self._room):
            self._room = self.room(len(x))
        kind, pairs = native.DTYPES.get(weight.dtype, INT8), None
        if table is not None:
            byte = torch.arange(256)
            kind = FOUR_BITS
            pairs = self.parameters(table, torch.stack([table[byte >> 4], table[byte & 15]], dim=1))
        pointers = [self._matrix(weight), x, y, None if scales is None else self._matrix(scales), pairs, self._room]
        self._add("rows", pointers, m=len(y), n=len(x), kind=kind, after=after, add=add)

    def column_sums(self, weight: Tensor, x: Tensor, y: Tensor, *, after: str = "", add: bool = False) -> None:
        """weight [n, m]"""
        kind = native.DTYPES[weight.dtype]
        self._add("column_sums", [self._matrix(weight), x, y], m=len(y), n=len(x), kind=kind, after=after, add=add)

    def fold(self, x: Tensor, y: Tensor) -> None:
        self._add("fold", [x, y], m=len(y), n=len(x))

    def time_mix(self, code: str, pointers: Sequence[Tensor | None], H: int, state: int, eps: float) -> None:
        """code: time7 or time6. state: where that of the WKV operator is."""
        self._add(code, pointers, m=H, n=self.N, state=state, eps=eps)

    def gate(self, gate: Tensor, value: Tensor, y: Tensor) -> None:
        self._add("gate", [gate, value, y], m=len(y))

    def run(self, token: int, before: Tensor, after: Tensor) -> None:
        """Read a token. before: the state, float32 and contiguous; after: room for the new one, not the same tensor."""
        if self._run is None:
            self._run = (_Op * len(self._ops))(*self._ops)
        code = self._library.step_run(
            self._run,
            ctypes.c_int64(len(self._ops)),
            ctypes.c_int64(self.N),
            ctypes.c_int64(token),
            ctypes.c_void_p(before.data_ptr()),
            ctypes.c_void_p(after.data_ptr()),
            torch.get_num_threads(),
        )
        if code:
            raise RuntimeError(f"a step of the model failed: {self._library.step_error(code).decode()}")

    def _matrix(self, weight: Tensor) -> Tensor:
        weight = weight.detach().contiguous()
        self._kept.append(weight)
        return weight

    def _add(
        self,
        code: str,
        pointers: Sequence[Tensor | None],
        *,
        m: int,
        n: int = 1,
        kind: int = 0,
        after: str = "",
        add: bool = False,
        state: int = 0,
        eps: float = 0.0,
    ) -> None:
        op = _Op(CODES.index(code), kind, AFTER.index(after), add, m, n, state, eps)
        for i, tensor in enumerate(pointers):
            op.p[i] = None if tensor is None else tensor.data_ptr()
        self._ops.append(op)
