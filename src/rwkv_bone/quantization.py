"""Frozen projections in 8 or 4 bits: codes and scales are kept, and a weight exists only while it is used.

    int8       per row of the weight: w = code * scale, scale = max |row| / 127
    nf4, fp4   per block of 64 values of the flattened weight: w = table[code] * scale, scale = max |block|

A byte holds two 4-bit codes, the first in its high half. Codes, scales and dequantised values of nf4 and fp4 equal
those of bitsandbytes 0.50 bit for bit, and so do the codes of int8. They are the same on any device and whoever
computes them: PyTorch alone, on a CPU cuda/cpu/quantize.cpp if it can be compiled; on CUDA bitsandbytes' kernel
dequantises, if it is installed.

Codes and scales are buffers and not parameters, so that DeepSpeed neither partitions nor casts them: every device holds
all of them, at ZeRO stage 3 too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from rwkv_bone.checkpoints import param_part
from rwkv_bone.ops import native
from rwkv_bone.ops.build import BuildError

BLOCK = 64
# bitsandbytes' tables. nf4: quantiles of a normal distribution. fp4: a sign, two bits of exponent, one of mantissa.
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
SMALLEST = 1e-38  # lower bound of what is divided by
LIBRARY = "quantize"  # cuda/cpu/quantize.cpp
SOURCES = {**native.DTYPES, torch.float16: 2}  # the dtypes that it quantises
CHUNK_CPU, CHUNK_GPU = 2**18, 2**22  # values converted at once: in the cache, or enough to fill the device


class Quantized(NamedTuple):
    """A weight [out, in]. int8: codes [out, in], scales [out]; 4 bits: codes uint8 [n/2], scales [n/64], rounded up."""

    codes: Tensor
    scales: Tensor  # fp32
    kind: str
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def is_quantized(key: str) -> bool:
    """Whether --quant applies to this key of the base: it does to all projections of att and ffn, adapted or not."""
    return param_part(key) == "projection"


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> Quantized:
    """weight [out, in] of any floating dtype, as int8, nf4 or fp4; no temporary is as large as the weight."""
    out_features, in_features = weight.shape
    count = weight.numel()
    if weight.device.type == "cpu" and weight.dtype in SOURCES and count and compiled():
        return _quantize_compiled(weight.contiguous(), kind)
    if kind == "int8":
        codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        scales = weight.new_empty(out_features, dtype=torch.float32)
        for rows in _chunks(out_features, in_features, weight.device):
            part = weight[rows].float()
            largest = part.abs().amax(dim=1)
            # Not SMALLEST: 127 divided by that is infinite in fp32.
            codes[rows] = (part * (127.0 / largest.clamp(min=1e-30))[:, None]).round_().to(torch.int8)
            # The divisor is a tensor: by a number CUDA would multiply with 1/127, which rounds differently.
            scales[rows] = largest / torch.full_like(largest, 127.0)
        return Quantized(codes, scales, kind, (out_features, in_features))
    codes = weight.new_empty(-(-count // 2), dtype=torch.uint8)
    scales = weight.new_empty(-(-count // BLOCK), dtype=torch.float32)
    bounds, order = _bounds(kind, weight.device)
    flat = weight.reshape(-1)
    for chunk in _chunks(scales.numel(), BLOCK, weight.device):
        first, part = chunk.start * BLOCK, flat[chunk.start * BLOCK : chunk.stop * BLOCK].float()
        size = part.numel()
        blocks = F.pad(part, (0, -size % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        blocks_in_units = blocks * (1.0 / largest.clamp(min=SMALLEST))[:, None]
        if size % BLOCK:
            # bitsandbytes divides in a last, shorter block; a product rounds differently.
            largest[-1:].clamp_(min=SMALLEST)
            blocks_in_units[-1] = blocks[-1] / largest[-1]
        rank = torch.bucketize(blocks_in_units.clamp_(-1.0, 1.0), bounds, out_int32=True).view(-1)[: size + size % 2]
        nibbles = order.index_select(0, rank)
        codes[first // 2 : (first + size + 1) // 2] = nibbles[::2] << 4 | nibbles[1::2]
        scales[chunk] = largest
    return Quantized(codes, scales, kind, (out_features, in_features))


@torch.no_grad()
def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in]: products in fp32, rounded once to `dtype`; no temporary is as large as the result."""
    codes, scales, kind, shape = weight
    if codes.device.type == "cpu":
        run = torch.ops.rwkv_bone.dequantize if is_compiling() else _dequantize_cpu
        return run(codes, scales, kind, *shape, dtype)
    return _dequantize_plainly(weight, dtype)


def _dequantize_cpu(codes: Tensor, scales: Tensor, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype not in native.DTYPES or not compiled() or not rows * columns:
        return _dequantize_plainly(Quantized(codes, scales, kind, (rows, columns)), dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    table = None if kind == "int8" else _table(kind)
    _call("inverse", native.DTYPES[dtype], (rows, columns), codes.contiguous(), scales.contiguous(), table, out)
    return out


def _quantize_compiled(weight: Tensor, kind: str) -> Quantized:
    rows, columns = weight.shape
    bounds, order = (None, None) if kind == "int8" else _bounds(kind, weight.device)
    if bounds is None:
        codes = torch.empty(rows, columns, dtype=torch.int8)
        scales = torch.empty(rows)
    else:
        codes = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8)
        scales = torch.empty(-(-weight.numel() // BLOCK))
    _call("weight", SOURCES[weight.dtype], (rows, columns), weight, bounds, order, codes, scales)
    return Quantized(codes, scales, kind, (rows, columns))


def _call(function: str, dtype: int, sizes: tuple[int, int], *tensors: Tensor | None) -> None:
    """Runs quantize_<function> of the library with PyTorch's number of threads."""
    library = native.library(LIBRARY)
    code = getattr(library, f"{LIBRARY}_{function}")(
        ctypes.c_int(dtype),
        *map(ctypes.c_int64, sizes),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
        ctypes.c_int(torch.get_num_threads()),
    )
    if code:
        raise RuntimeError(f"{LIBRARY}_{function} failed: {getattr(library, f'{LIBRARY}_error')(code).decode()}")


@cache
def compiled() -> bool:
    """Whether cuda/cpu/quantize.cpp can be had; compiles it if need be."""
    try:
        native.library(LIBRARY)
    except (BuildError, OSError):
        return False
    return True


def _dequantize_plainly(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """`dequantize` with PyTorch alone, or on CUDA with bitsandbytes' kernel."""
    codes, scales, kind, shape = weight
    device = codes.device
    if kind == "int8":
        out = torch.empty(shape, dtype=dtype, device=device)
        for rows in _chunks(*shape, device):
            torch.mul(codes[rows], scales[rows, None], out=out[rows])
        return out
    if device.type == "cuda" and has_bitsandbytes():
        return torch.ops.bitsandbytes.dequantize_4bit(codes[:, None], scales, BLOCK, kind, shape, dtype)
    pairs = _pairs(kind, device)
    out = torch.empty(scales.numel(), BLOCK, dtype=dtype, device=device)
    for chunk in _chunks(scales.numel(), BLOCK, device):
        part = codes[chunk.start * BLOCK // 2 : chunk.stop * BLOCK // 2]
        part = F.pad(part, (0, -part.numel() % (BLOCK // 2)))
        values = pairs.index_select(0, part.int()).view(torch.float32).view(-1, BLOCK)
        torch.mul(values, scales[chunk, None], out=out[chunk])
    return out.view(-1)[: math.prod(shape)].view(shape)


def as_trained(weight: Tensor, kind: str) -> Tensor:
    """The fp32 values that a run with --quant `kind` has in place of this weight of the base."""
    return weight.float() if kind == "none" else dequantize(quantize(weight, kind))


@cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is there to dequantise 4 bits on CUDA; loads it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401  (registers its operators with torch)

    return True


def describe(model: nn.Module, dtype: torch.dtype, device: str) -> str:
    """A sentence for the user: what is quantised, and how much memory that saves against weights of this dtype.

    device: where the model will run, "cpu" or "cuda".
    """
    weights = [module.quantized for module in model.modules() if isinstance(module, QuantLinear)]
    kept = sum(weight.nbytes for weight in weights) / 1e6
    plain = sum(math.prod(weight.shape) for weight in weights) * dtype.itemsize / 1e6
    kernel = "the C++ kernel" if device == "cpu" and dtype in native.DTYPES and compiled() else "PyTorch"
    if device == "cuda" and weights[0].kind != "int8" and has_bitsandbytes():
        kernel = "bitsandbytes"
    return (
        f"{weights[0].kind}: {len(weights)} projections in {kept:,.2f} MB instead of {plain:,.2f} MB, whole on every "
        f"device; dequantised by {kernel}"
    )


class QuantFunction(torch.autograd.Function):
    """x [..., in], codes, scales -> x W^T [..., out]. Keeps only codes and scales: backward dequantises again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, kind: str, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind, ctx.shape = kind, shape
        return F.linear(x, dequantize(Quantized(codes, scales, kind, shape), x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = dequantize(Quantized(codes, scales, ctx.kind, ctx.shape), g.dtype)
        return g @ weight, None, None, None, None


class QuantLinear(nn.Module):
    """A frozen projection without bias, x [..., in] -> [..., out], that keeps its weight quantised.

    Arithmetic is in x's dtype. Codes and scales are not in the state dict: they are made anew from the base's file.
    """

    bias = None
    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Quantized):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = weight.kind
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.codes, self.scales, self.kind, (self.out_features, self.in_features))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in this dtype, a new tensor."""
        return dequantize(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return QuantFunction.apply(x, *self.quantized)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `module.to(dtype)` would round the scales too, and with them change every weight: they stay fp32.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False, {self.kind}"


def _chunks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Ranges that cover `count` rows of `width` values."""
    step = max((CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // width, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@cache
def _bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(fp32 [15]: the midpoints of the sorted table, uint8 [16]: the code of each of its values)."""
    values, order = torch.tensor(TABLES[kind]).sort(stable=True)
    return ((values[1:] + values[:-1]) / 2).to(device), order.to(device, torch.uint8)


@cache
def _table(kind: str) -> Tensor:
    return torch.tensor(TABLES[kind])


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """[256] int64: for each byte the two fp32 values that it stands for, joined, so that one look-up finds both."""
    values, byte = torch.tensor(TABLES[kind]), torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), dim=1).view(torch.int64).view(-1).to(device)


# An operator of PyTorch's, so that torch.compile takes it; it imports the compiler when it is first called.
torch.library.custom_op(
    "rwkv_bone::dequantize",
    _dequantize_cpu,
    mutates_args=(),
    schema="(Tensor codes, Tensor scales, str kind, int rows, int columns, ScalarType dtype) -> Tensor",
).register_fake(lambda codes, scales, kind, rows, columns, dtype: codes.new_empty(rows, columns, dtype=dtype))
