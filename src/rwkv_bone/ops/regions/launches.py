"""What a region launches on a CUDA device: which kernels of cuda/regions.cuh, in how many blocks, with which arguments.

Here is all that the host has to know about these kernels, as ops/launches.py has it of the recurrences'. Pure
arithmetic: nothing is compiled or loaded. A region goes forward in one launch, and backward in one, or two where
gradients of parameters are wanted: each block of tokens leaves its part of their sums, and `totals` adds the parts up.
The rows of the head's cross-entropy (cuda/cross_entropy.cuh) are planned here, too.

Sizes: B batch, T tokens, C channels, H heads, N head size, M mixes, D documents (0: not packed), k carried rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_bone.ops.launches import ALIGNMENT, ELEMENTS, HEAD_SIZES, LARGEST, Launch

LARGEST_M = 6  # kMost
THREADS = 256  # kThreads
ROW_THREADS = 512  # kThreads in cuda/cross_entropy.cuh
MIX_LANES = 8  # kMixLanes, and the fewest of a head's: kHeadLanes
COLUMNS = 32  # of a block of `totals`: kColumns
STRIPS = (8, 4, 2)  # tokens that a thread walks, if so many still leave the wanted blocks, else 1
WANTED_BLOCKS = 528  # four for each multiprocessor of an H100 or H200
WIDTHS = {"float32": 4, "bfloat16": 8}  # channels of a thread: 16 bytes
FLOAT = 4  # bytes

# The parameters of a region, in the order of their parts and of their gradients.
TRAINED = {"mix": 1, "mix6": 1, "pre7": 5, "post7": 3, "gated_norm": 2}
# The tensors of each step in the order of ops/regions/compiled.py. A name that begins with d_ is the gradient of a
# parameter.
TENSORS = {
    "relu_square_forward": "h out",
    "relu_square_backward": "h g out",
    "pre7_forward": "pw pa pv k0 v0 v_first w0 a0 v0_bias k_k k_a w k v a b",
    "pre7_backward": "pa pv k0 v0 v_first a0 v0_bias k_k k_a dw dk dv da db dk_bonus dv_bonus "
    "dpw dpa dpv dk0 dv0 dv_first d_w0 d_a0 d_v0_bias d_k_k d_k_a",
    "post7_forward": "y r k v g r_k weight bias z",
    "post7_backward": "y r k v g r_k weight bias dz dy dr dk dv dg d_r_k d_weight d_bias",
    "gated_norm_forward": "y gate weight bias z",
    "gated_norm_backward": "y gate weight bias dz dy dgate d_weight d_bias",
}
PARAMETERS = {"w0", "a0", "v0_bias", "k_k", "k_a", "r_k", "weight", "bias", "shares"}
# What may be null, besides gradients of parameters; more is asked for where the step needs it.
OPTIONAL = {
    "pre7": {"pv", "v_first", "v0_bias", "w", "v", "dpv", "dv_first", "workspace"},
    "mix": {"x", "last", "changes", "dlast", "dchanges", "workspace"},
    "mix6": {"last", "dlast", "workspace"},
}


class Unit(NamedTuple):
    """What is compiled and loaded at a time: a region's kernels of one dtype, and of one head size or M."""

    region: str  # mix, mix6, relu_square, pre7, post7, gated_norm, or cross_entropy
    dtype: str  # of ELEMENTS
    size: int  # N, or M; 1 of relu_square and cross_entropy

    @property
    def dynamic_shared(self) -> bool:
        """None of them has to be told."""
        return False

    def source(self) -> str:
        """C++ that makes the unit's kernels."""
        region, dtype, size = self
        header = "cross_entropy.cuh" if region == "cross_entropy" else "regions.cuh"
        return f'#include "{header}"\n{region.upper()}_KERNELS({ELEMENTS[dtype]}, {dtype}, {size})\n'

    def kernels(self) -> list[str]:
        """Their names."""
        steps = ["forward"] if self.region == "cross_entropy" else ["forward", "backward"]
        steps += ["trained", "totals"] if self.region in TRAINED else []
        return [self._kernel(step) for step in steps]

    def _kernel(self, step: str) -> str:
        return f"{self.region}_{step}_{self.dtype}_{self.size}"

    def plan(self, step: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]) -> list[Launch]:
        """The launches of "forward" or "backward", in order.

        sizes       mix, mix6: (B, T, C, D, M, k, rows of dlast, wide), wide = 1 if parameters are float32 else 0
                    pre7: (B T, H, N, wide), and of backward whether dw is float32
                    post7, gated_norm: (B T, H, N, wide, bits of eps as float32)
                    relu_square: (numbers,)
                    cross_entropy, forward alone: (R, V, bits of l2wrap, 1 if the gradient is wanted else 0)
        tensors     pointers as numbers, None = null, in the order of TENSORS, of mix as `_mix` has them; backward of a
                    region with parameters has a workspace besides, which is last: see `workspace_floats`
        Raises ValueError for what no kernel can take.
        """
        if self.dtype not in ELEMENTS:
            raise ValueError(f"dtype must be {' or '.join(ELEMENTS)}, found {self.dtype}")
        if self.region == "cross_entropy":
            return self._cross_entropy(step, sizes, tensors)
        if self.region == "relu_square":
            return self._relu_square(step, sizes, tensors)
        if self.region in ("mix", "mix6"):
            return self._mix(step, sizes, offsets, tensors)
        return self._heads(step, sizes, tensors)

    def _cross_entropy(self, step: str, sizes: Sequence[int], tensors: Sequence[int | None]) -> list[Launch]:
        rows, vocabulary, l2wrap, gradient = sizes
        named = self._named(step, ["logits", "targets", "losses"], tensors)
        if vocabulary < 1:
            raise ValueError("the vocabulary must have at least one token")
        words = [vocabulary, named["logits"], named["targets"], l2wrap, gradient, named["losses"]]
        return [Launch(self._kernel(step), _blocks(rows), ROW_THREADS, _pack(words))]

    def _relu_square(self, step: str, sizes: Sequence[int], tensors: Sequence[int | None]) -> list[Launch]:
        (numbers,) = sizes
        named = self._named(step, TENSORS[f"relu_square_{step}"].split(), tensors)
        blocks = _blocks(-(-numbers // (THREADS * WIDTHS[self.dtype])))
        words = [numbers, named["h"], named.get("g"), named["out"]]
        return [Launch(self._kernel(step), blocks, THREADS, _pack(words))]

    def _mix(self, step: str, sizes: Sequence[int], offsets: int | None, tensors: Sequence[int | None]) -> list[Launch]:
        """tensors: x, last, shares, changes, then forward: M results; backward: dx, dlast, d_shares, dchanges, M
        gradients, workspace."""
        B, T, C, D, M, rows, carried, wide = sizes
        if not 1 <= M <= LARGEST_M or self.size != M:
            raise ValueError(f"M must be 1 to {LARGEST_M} and that of the kernels, found {M}")
        if min(B, T, C) < 1 or C % WIDTHS[self.dtype]:
            raise ValueError(f"there must be a token, and C a multiple of {WIDTHS[self.dtype]}, found {(B, T, C)}")
        if (D > 0) != (offsets is not None) or D < 0 or D > T or (D and B != 1):
            raise ValueError(
                f"documents need a batch of 1 and offsets, and must not be more than the tokens, found {D}"
            )
        if not 0 <= max(rows, carried) <= (D or B):
            raise ValueError(f"there are {D or B} sequences, fewer than carried rows: {rows}, {carried}")
        many = [f"{'out' if step == 'forward' else 'g'}{m}" for m in range(M)]
        names = ["x", "last", "shares", "changes"]
        names += many if step == "forward" else ["dx", "dlast", "d_shares", "dchanges", *many, "workspace"]
        named = self._named(step, names, tensors)
        trained = step == "backward" and named["d_shares"] is not None
        reads_x = step == "forward" or trained or self.region == "mix6"
        needed = {"x": reads_x, "last": reads_x and rows, "dlast": step == "backward" and carried, "workspace": trained}
        self._need(step, named, [name for name, wanted in needed.items() if wanted])

        area = _area(B * T, C, self.dtype, MIX_LANES)
        # `Sequences` of common.cuh: how many, their tokens, heads, offsets.
        words = [D or B, T, 1, offsets, *area[:3], named["x"], named["last"], rows, named["shares"], wide]
        words.append(named["changes"])
        ends = [named[name] for name in many] + [None] * (LARGEST_M - M)
        if step == "forward":
            return [Launch(self._kernel(step), area.blocks, THREADS, _pack([*words, *ends]))]
        words += [*ends, named["dx"], named["dlast"], carried, named["dchanges"]]
        words.append(named["workspace"] if trained else None)
        launches = [Launch(self._kernel("trained" if trained else step), area.blocks, THREADS, _pack(words))]
        if trained:
            launches.append(self._totals(area, M * C, M * C, named["workspace"], [named["d_shares"]]))
        return launches

    def _heads(self, step: str, sizes: Sequence[int], tensors: Sequence[int | None]) -> list[Launch]:
        tokens, H, N, wide, *rest = sizes
        if N not in HEAD_SIZES or self.size != N:
            found = f"{N}, kernels for {self.size}"
            raise ValueError(f"head size must be one of {', '.join(map(str, HEAD_SIZES))}, found {found}")
        if min(tokens, H) < 1:
            raise ValueError(f"tokens and heads must be at least 1, found {tokens}, {H}")
        names = TENSORS[f"{self.region}_{step}"].split()
        named = self._named(step, [*names, *(["workspace"] if step == "backward" else [])], tensors)
        gradients = [name for name in names if name.startswith("d_")]
        trained = any(named[name] is not None for name in gradients)
        self._need(step, named, ["workspace"] if trained else [])
        if self.region == "pre7":
            self._check_first_layer(step, named, trained)

        area = _area(tokens, H * N, self.dtype, max(MIX_LANES, N // WIDTHS[self.dtype]))
        words: list[int | None] = [*area[:3]]
        if self.region != "pre7":
            words += rest  # eps
        for name in names:
            if name in gradients:
                continue
            words.append(named[name])
            if name in PARAMETERS:
                words.append(wide)
            elif name == "dw":
                words += rest
        if step == "forward":
            return [Launch(self._kernel(step), area.blocks, THREADS, _pack(words))]
        words.append(named["workspace"] if trained else None)
        launches = [Launch(self._kernel("trained" if trained else step), area.blocks, THREADS, _pack(words))]
        if trained:
            outputs = [named[name] for name in gradients]
            launches.append(self._totals(area, len(outputs) * H * N, H * N, named["workspace"], outputs))
        return launches

    def _totals(self, area: Area, columns: int, each: int, parts: int | None, outputs: Sequence[int | None]) -> Launch:
        words = [parts, area.token_blocks, columns, each, *outputs, *[None] * (LARGEST_M - len(outputs))]
        return Launch(self._kernel("totals"), -(-columns // COLUMNS), THREADS, _pack(words))

    def _named(self, step: str, names: Sequence[str], tensors: Sequence[int | None]) -> dict[str, int | None]:
        if len(tensors) != len(names):
            raise ValueError(f"{self.region} {step} takes {len(names)} tensors, found {len(tensors)}")
        named = dict(zip(names, tensors, strict=True))
        for name, pointer in named.items():
            if pointer and pointer % ALIGNMENT:
                raise ValueError(f"{self.region} {step}: {name} is not aligned to {ALIGNMENT} bytes")
        optional = OPTIONAL.get(self.region, {"workspace"})
        self._need(step, named, [name for name in names if name not in optional and not name.startswith("d_")])
        return named

    def _need(self, step: str, named: dict[str, int | None], names: Sequence[str]) -> None:
        for name in names:
            if not named[name]:
                raise ValueError(f"{self.region} {step}: {name} is missing")

    def _check_first_layer(self, step: str, named: dict[str, int | None], trained: bool) -> None:
        """All of what the first layer has not, or nothing of it."""
        group = ["pv", "v_first", "v0_bias", *(["v"] if step == "forward" else ["dpv", "dv_first"])]
        if step == "backward" and trained:
            group.append("d_v0_bias")
        if len({bool(named[name]) for name in group}) > 1:
            raise ValueError(f"pre7 {step}: {', '.join(group)} go together")


class Area(NamedTuple):
    """How tokens and channels are shared out: `Area` of regions.cuh, and the blocks of threads."""

    tokens: int
    channels: int
    strip: int
    blocks: int
    token_blocks: int


def workspace_floats(region: str, dtype: str, tokens: int, channels: int, size: int) -> int:
    """Numbers that backward works in where gradients of parameters are wanted; size: M, or N."""
    lanes = MIX_LANES if region in ("mix", "mix6") else max(MIX_LANES, size // WIDTHS[dtype])
    count = size if region in ("mix", "mix6") else TRAINED[region]
    return _area(tokens, channels, dtype, lanes).token_blocks * count * channels


def bits(x: float) -> int:
    """Of a float32."""
    return struct.unpack("=I", struct.pack("=f", x))[0]


def _area(tokens: int, channels: int, dtype: str, lanes: int) -> Area:
    """By the sizes alone, never by the card: how a sum is divided must not depend on where it runs."""
    across = math.ceil(channels / (lanes * WIDTHS[dtype]))

    def shared_out(strip: int) -> Area:
        token_blocks = math.ceil(tokens / (THREADS // lanes * strip))
        return Area(tokens, channels, strip, _blocks(across * token_blocks), token_blocks)

    return next((area for area in map(shared_out, STRIPS) if area.blocks >= WANTED_BLOCKS), shared_out(1))


def _blocks(count: int) -> int:
    if not 1 <= count <= LARGEST:
        raise ValueError(f"blocks of threads must be 1 to 2^31 - 1, found {count}")
    return count


def _pack(words: Sequence[int | None]) -> bytes:
    return struct.pack(f"={len(words)}Q", *(word or 0 for word in words))
