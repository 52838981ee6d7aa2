"""One token of each of some sequences through a whole model on the processor: operations for cuda/cpu/step.cpp.

A model that generates calls some two hundred small operators a token, each of which takes PyTorch longer to call than a
small model's arithmetic takes. Here the calls are made once, when the list is, and run in C++.

Vectors are float32, whatever the weights are: results are nearer to the exact ones than those of a bfloat16 model.

Sizes: C channels, H heads, N head size, R sequences, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_bone.ops import native

CODES = ("embed", "norm", "mix", "rows", "column_sums", "fold", "time7", "time6", "gate")
AFTER = ("", "tanh", "sigmoid", "relu_square")
INT8, FOUR_BITS = 2, 3  # kinds of weights beside those of native.DTYPES
POINTERS = 18
LANES = 16  # of the widest vectors: vectors have room for whole ones
PADDED = 64  # what a matrix is multiplied by is padded to a multiple of it, as in step.cpp
LARGEST_HEAD = 256


class _Op(ctypes.Structure):
    """As struct Op in step.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("code", "kind", "after", "add")),
        *((name, ctypes.c_int64) for name in ("m", "n", "state")),
        ("eps", ctypes.c_double),
        ("p", ctypes.c_void_p * POINTERS),
    )


@dataclass(frozen=True)
class Vector:
    """`size` floats of each sequence, from place `start` of its room on."""

    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def split(self, size: int) -> tuple[Vector, ...]:
        """Parts of `size` floats; a rest is left out."""
        return tuple(Vector(self.start + at, size) for at in range(0, self.size - size + 1, size))


class Steps:
    """The operations of one token. Each method adds one; x, y are vectors of `room`, others are the model's tensors.

    A matrix is read where it is, and kept alive; of a vector of parameters a float32 copy is kept. What happens in each
    is said in cuda/cpu/step_ops.h. Raises build.BuildError without a compiler.
    """

    def __init__(self, N: int):
        self.N = N
        self._library = native.library("step")
        self._ops: list[tuple[_Op, dict[int, Vector]]] = []  # and which of its pointers lead to vectors
        self._kept: list[Tensor] = []  # all tensors that other pointers lead to
        self._free = self._stride = self._longest = 0
        self._rooms, self._prepared = torch.empty(0, 0), torch.empty(0)
        self._run: ctypes.Array[_Op] | None = None

    def room(self, size: int) -> Vector:
        """A new vector."""
        vector = Vector(self._free, size)
        self._free += -(-size // LANES) * LANES
        self._stride = max(self._stride, self._free)
        return vector

    @contextmanager
    def reused(self) -> Iterator[None]:
        """The rooms that are made inside are free again afterwards."""
        free = self._free
        yield
        self._free = free

    def parameters(self, *vectors: Tensor) -> Tensor:
        """float32 [all numbers of all vectors], a copy."""
        whole = torch.cat([vector.detach().flatten().float() for vector in vectors])
        self._kept.append(whole)
        return whole

    def embed(self, table: Tensor, y: Vector) -> None:
        """table [V, C]"""
        self._add("embed", [self._matrix(table), y], m=table.shape[1], kind=native.DTYPES[table.dtype])

    def norm(self, x: Vector, weight: Tensor, bias: Tensor, y: Vector, eps: float) -> None:
        self._add("norm", [x, self.parameters(weight), self.parameters(bias), y], m=len(x), eps=eps)

    def mix(
        self, x: Vector, shares: Tensor, y: Vector, state: int, changes: Vector | None = None, last: bool = True
    ) -> None:
        """shares [mixes C] of `parameters`, changes and y [mixes C]; state: where the previous x is.

        last: no later operation of this token asks for the previous x: x takes its place.
        """
        self._add("mix", [x, shares, changes, y], m=len(x), n=len(y) // len(x), state=state, add=last)

    def rows(
        self,
        weight: Tensor,
        x: Vector,
        y: Vector,
        *,
        after: str = "",
        add: bool = False,
        scales: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """weight [m, n]; or its codes, with scales, and with the 16 values of 4-bit codes."""
        self._longest = max(self._longest, -(-len(x) // PADDED) * PADDED)
        kind, pairs = native.DTYPES.get(weight.dtype, INT8), None
        if table is not None:
            byte = torch.arange(256)
            kind = FOUR_BITS
            pairs = self.parameters(table, torch.stack([table[byte >> 4], table[byte & 15]], dim=1))
        pointers: list[Tensor | Vector | None] = [self._matrix(weight), x, y]
        pointers += [None if scales is None else self._matrix(scales), pairs]
        self._add("rows", pointers, m=len(y), n=len(x), kind=kind, after=after, add=add)

    def column_sums(self, weight: Tensor, x: Vector, y: Vector, *, after: str = "", add: bool = False) -> None:
        """weight [n, m]"""
        kind = native.DTYPES[weight.dtype]
        self._add("column_sums", [self._matrix(weight), x, y], m=len(y), n=len(x), kind=kind, after=after, add=add)

    def fold(self, x: Vector, y: Vector) -> None:
        self._add("fold", [x, y], m=len(y), n=len(x))

    def time_mix(self, code: str, pointers: Sequence[Tensor | Vector | None], H: int, state: int, eps: float) -> None:
        """code: time7 or time6. state: where that of the WKV operator is."""
        self._add(code, pointers, m=H, n=self.N, state=state, eps=eps)

    def gate(self, gate: Vector, value: Vector, y: Vector) -> None:
        self._add("gate", [gate, value, y], m=len(y))

    def run(
        self, tokens: Sequence[int], before: Sequence[Tensor], after: Sequence[Tensor], *, rounded: bool = False
    ) -> None:
        """Read a token of each sequence.

        before: their states, float32 and contiguous; after: room for the new ones, which may be the same tensors.
        rounded: vectors are rounded to bfloat16 where they meet a matrix of that, if the processor is faster so.
        What a sequence gives depends neither on the others nor on their number.
        """
        R = len(tokens)
        if self._run is None or R > len(self._rooms):
            self._make(R)
        pointers = ctypes.c_void_p * R
        code = self._library.step_run(
            self._run,
            ctypes.c_int64(len(self._ops)),
            ctypes.c_int64(self.N),
            ctypes.c_int64(R),
            (ctypes.c_int64 * R)(*tokens),
            pointers(*(state.data_ptr() for state in before)),
            pointers(*(state.data_ptr() for state in after)),
            ctypes.c_int64(self._stride),
            ctypes.c_void_p(self._prepared.data_ptr()),
            rounded,
            torch.get_num_threads(),
        )
        if code:
            raise RuntimeError(f"a step of the model failed: {self._library.step_error(code).decode()}")

    def result(self, vector: Vector, R: int) -> Tensor:
        """What the last token of the first R sequences left in a vector: float32 [R, size], a view."""
        return self._rooms[:R, vector.start : vector.start + vector.size]

    def _make(self, R: int) -> None:
        """Make room for R sequences."""
        self._rooms, self._prepared = torch.zeros(R, self._stride), torch.empty(R * self._longest)
        for op, vectors in self._ops:
            for i, vector in vectors.items():
                op.p[i] = self._rooms.data_ptr() + vector.start * self._rooms.element_size()
        self._run = (_Op * len(self._ops))(*(op for op, _ in self._ops))

    def _matrix(self, weight: Tensor) -> Tensor:
        weight = weight.detach().contiguous()
        self._kept.append(weight)
        return weight

    def _add(
        self,
        code: str,
        pointers: Sequence[Tensor | Vector | None],
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
        for i, given in enumerate(pointers):
            op.p[i] = given.data_ptr() if isinstance(given, Tensor) else None
        self._ops.append((op, {i: given for i, given in enumerate(pointers) if isinstance(given, Vector)}))
