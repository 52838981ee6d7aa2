"""Executable specification of the chunked RWKV-6 and RWKV-5 kernels, one function per kernel, with their roundings.

The log decay has no lower bound, so no exponent may be positive, and no sum of logs may be made by subtraction. Let

    before(x)_t, after(x)_t    the sum of x over the tokens of the chunk before t, and after t
    r0 = r e^before(log)    kd = k e^after(log)    whole = e^(sum of log)

Then y = A V + r0 S^T and S' = S diag(whole) + V^T kd, with S the state at the chunk's start, rows = value index,
columns = key index. The triangle A is a sum over levels h = L/2, L/4, .. 1. Cut the chunk in pieces of h tokens. A
token t that reads and a token s that writes before it belong to the level on which they lie in neighbouring pieces, t
in an odd one and s in the even one before it. The decay between them is the product of that from s to the end of its
piece and that from the start of the piece to t, both sums of logs within h tokens. A level's reads and writes fit in
one tile z, and their gradients in another:

    z = r e^before_h(log) in odd pieces, k e^after_h(log) in even ones
    A = sum over h of (z z^T, t in an odd piece and s in the one before) + diagonal(r . (u o k))
    dz = (D + D^T) z,  D = (dY V^T, the same mask)

What each kernel reads and writes beside the inputs, in a dict by these names:

    prepare            -> KV, whole                                         every chunk by itself
    scan               KV, whole -> states, state                           one chunk after another
    outputs            states -> y                                          every chunk by itself
    prepare_backward   -> DR, whole                                         every chunk by itself
    scan_backward      DR, whole -> dstates, dstate0                        one chunk after another, from the last
    gradients          states, dstates -> dr, dk, dv, sums, RWKV-6: dw      every chunk by itself
    sums               sums -> du, RWKV-5: dw                               a row per sequence

states are those at the start of each chunk, dstates the gradients of those at its end. KV, DR, states, dstates are
[slots, H, N, N], whole [slots, H, N], slots as chunk_model.Chunks numbers them; sums [slots, H, 2, N] are a chunk's
part of du and, for RWKV-5, of dw. Every product rounds its operands; KV, DR, states and dstates are rounded likewise,
and so is what `gradients` adds up within 16 tokens for the decay, which it does as a product. Nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.chunk_model import Chunks, Rounding

# Above this raw decay nothing of a state is left, and exp(raw) may be infinite.
HIGHEST_RAW = 80.0
PATCH = 16  # tokens
RESULTS = ("y", "state", "dr", "dw", "dk", "dv", "du", "dstate0")


def before(x: Tensor, h: int) -> Tensor:
    """[.., L, N] -> sums over the tokens before each one in its piece of h tokens, without subtracting anything."""
    pieces = x.unflatten(-2, (-1, h))
    shifted = torch.cat([torch.zeros_like(pieces[..., :1, :]), pieces[..., :-1, :]], -2)
    return shifted.cumsum(-2).flatten(-3, -2)


def after(x: Tensor, h: int) -> Tensor:
    """[.., L, N] -> sums over the tokens after each one in its piece of h tokens."""
    return before(x.flip(-2), h).flip(-2)


def passing(m: Rounding, side: Callable[[Tensor, int], Tensor], x: Tensor, h: int) -> Tensor:
    """`before` or `after` of x, as a kernel makes them: within 16 tokens as a product of operands with 0 and 1."""
    near = side(m.round(x), min(h, PATCH))
    if h <= PATCH:
        return near
    others = side(x.unflatten(-2, (-1, PATCH)).sum(-2), h // PATCH)
    return near + others.repeat_interleave(PATCH, -2)


class Level(NamedTuple):
    """odd [L, 1]: whether a token's piece is odd. mask [L, L]: this level's pairs. z = scale (r or k) [.., L, N]."""

    h: int
    odd: Tensor
    mask: Tensor
    scale: Tensor
    z: Tensor


class Problem:
    """A case cut into chunks of L tokens, and what more than one kernel makes from the inputs.

    case: as wkv6_inputs.make_case or packed_inputs.packed_case give it; w is [B, T, H, N] (RWKV-6) or [H, N] (RWKV-5).
    out: the dtype of y and the gradients of r, k, v; None for the kernels' own, that of r.
    """

    def __init__(
        self,
        case: Mapping[str, Tensor | None],
        L: int,
        *,
        operand: str = "bf16",
        dtype: torch.dtype = torch.float32,
        out: torch.dtype | None = None,
    ) -> None:
        given = {name: x for name, x in case.items() if x is not None}
        B, T, H, N = given["r"].shape
        self.rounding = Rounding(operand, dtype)
        self.chunks = chunks = Chunks(B, T, L, given.get("cu_seqlens"))
        self.out = out or given["r"].dtype
        zeros = torch.zeros(len(chunks.first), H, N, N)
        self.state, self.dstate = (given.get(name, zeros).to(dtype) for name in ("state", "dstate"))
        self.u = given["u"].to(dtype)[:, None]  # [H, 1, N]
        self.per_token = given["w"].dim() == 4

        self.r, self.k, self.v, self.dy = (chunks.gather(given[name].to(dtype)) for name in ("r", "k", "v", "dy"))
        raw = given["w"].to(dtype).clamp(max=HIGHEST_RAW).expand(B, T, H, N)
        # An empty place decays nothing. The log decay is also its own slope, d log / d raw.
        self.log = chunks.gather(-raw.exp())
        self.up, self.down = before(self.log, L).exp(), after(self.log, L).exp()
        self.whole = self.log.sum(-2).exp()
        self.r0, self.kd = self.r * self.up, self.k * self.down

    def levels(self) -> Iterator[Level]:
        L = self.chunks.L
        token = torch.arange(L)
        h = L // 2
        while h:
            piece = token // h
            odd = (piece % 2 == 1)[:, None]
            mask = odd & (piece == piece[:, None] - 1)
            scale = torch.where(odd, before(self.log, h), after(self.log, h)).exp()
            yield Level(h, odd, mask, scale, torch.where(odd, self.r, self.k) * scale)
            h //= 2

    def triangle(self) -> Tensor:
        """A [slots, H, L, L], the diagonal included."""
        A = torch.diag_embed((self.r * self.u * self.k).sum(-1))
        for level in self.levels():
            A = A + self.rounding.product(level.z, level.z.mT) * level.mask
        return A


def prepare(p: Problem) -> dict[str, Tensor]:
    return {"KV": p.rounding.round(p.rounding.product(p.v.mT, p.kd)), "whole": p.whole}


def scan(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S <- S diag(whole) + KV. The S that is carried is never rounded."""
    now, states = p.state.clone(), torch.zeros_like(handed["KV"])
    for sequences, slots in p.chunks.steps():
        states[slots] = p.rounding.round(now[sequences])
        now[sequences] = now[sequences] * handed["whole"][slots][:, :, None] + handed["KV"][slots]
    return {"states": states, "state": now}


def outputs(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y = A V + r0 S^T, one sum."""
    product = p.rounding.product
    return {"y": p.chunks.scatter(product(p.triangle(), p.v) + product(p.r0, handed["states"].mT)).to(p.out)}


def prepare_backward(p: Problem) -> dict[str, Tensor]:
    return {"DR": p.rounding.round(p.rounding.product(p.dy.mT, p.r0)), "whole": p.whole}


def scan_backward(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dS <- dS diag(whole) + DR. The dS that is carried is never rounded."""
    now, dstates = p.dstate.clone(), torch.zeros_like(handed["DR"])
    for sequences, slots in reversed(list(p.chunks.steps())):
        dstates[slots] = p.rounding.round(now[sequences])
        now[sequences] = now[sequences] * handed["whole"][slots][:, :, None] + handed["DR"][slots]
    return {"dstates": dstates, "dstate0": now}


def gradients(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient of a chunk from its inputs and the two states.

    The gradient of a log decay is the sum of z dz over the tokens whose exponent holds it: in an odd piece those after
    it, in an even piece those before it, likewise for r0 and kd with the chunk as the piece; plus that of the state
    which passes through. Nothing is subtracted, so nothing cancels.
    """
    m, product, L = p.rounding, p.rounding.product, p.chunks.L
    S, dS = handed["states"], handed["dstates"]
    dA = product(p.dy, p.v.mT)
    own = dA.diagonal(dim1=-2, dim2=-1)[..., None]  # [slots, H, L, 1]
    dv = product(p.triangle().mT, p.dy) + product(p.kd, dS.mT)
    dr0, dkd = product(p.dy, S), product(p.v, dS)
    dr, dk = own * p.u * p.k + dr0 * p.up, own * p.u * p.r + dkd * p.down
    dlog = passing(m, after, p.r0 * dr0, L) + passing(m, before, p.kd * dkd, L)
    dlog = dlog + p.whole[:, :, None] * (m.round(S) * m.round(dS)).sum(2, keepdim=True)
    for h, odd, mask, scale, z in p.levels():
        D = dA * mask
        dz = product(D + D.mT, z)
        dr, dk = dr + torch.where(odd, dz * scale, 0.0), dk + torch.where(odd, 0.0, dz * scale)
        dlog = dlog + torch.where(odd, passing(m, after, z * dz, h), passing(m, before, z * dz, h))
    dw = dlog * p.log
    tiles = {"dr": dr, "dk": dk, "dv": dv}
    found = {name: p.chunks.scatter(x).to(p.out) for name, x in tiles.items()}
    if p.per_token:
        found["dw"] = p.chunks.scatter(dw)
    return {**found, "sums": torch.stack([(own * p.r * p.k).sum(2), dw.sum(2)], 2)}


def sums(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of what all tokens share, [B or D, H, N]."""
    chunks = p.chunks
    rows = torch.stack([handed["sums"][first:][:n].sum(0) for first, n in zip(chunks.first, chunks.count, strict=True)])
    found = {"du": rows[:, :, 0]}
    return found if p.per_token else {**found, "dw": rows[:, :, 1]}


def run(p: Problem) -> dict[str, Tensor]:
    """All seven kernels: the results, and everything that was handed over."""
    found = {**prepare(p), **prepare_backward(p)}
    for kernel in (scan, outputs, scan_backward, gradients, sums):
        found |= kernel(p, found)
    return found


def wkv6_spec(
    case: Mapping[str, Tensor | None],
    L: int,
    *,
    operand: str = "bf16",
    dtype: torch.dtype = torch.float32,
    out: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward and backward with the names of wkv6_inputs.reference_gradients; the arguments are those of Problem.

    du, and RWKV-5's dw, are summed over the sequences.
    """
    p = Problem(case, L, operand=operand, dtype=dtype, out=out)
    found = run(p)
    for name in ("du",) if p.per_token else ("du", "dw"):
        found[name] = found[name].sum(0)
    return {name: found[name] for name in RESULTS}
