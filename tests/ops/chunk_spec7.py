"""Executable specification of the chunked RWKV-7 kernels, one function per kernel, with the kernels' roundings.

With G the sum of the log decay from the chunk's start up to and including a token, and g that of the token before, a
chunk's tiles [L, N] are

    r~ = r e^G    a~ = a e^g    k~ = k e^-G    b~ = b e^-G    whole = e^G of the last token

and the rows u_t = S_{t-1} a_t of U, which the recurrence feeds back, solve a triangular system:

    Aab, Aak = a~ b~^T, a~ k~^T  below the diagonal        Ark, Arb = r~ k~^T, r~ b~^T  on and below it
    U = (I - Aab)^-1 (Aak V + a~ S^T) = U0 + W S^T         Y = Ark V + Arb U + r~ S^T = Y0 + Q S^T

with S the state at the chunk's start, rows = value index, columns = key index. What each kernel reads and writes beside
the inputs, in a dict by these names:

    prepare        -> W, bt, Q, KV, Y0, whole                          every chunk by itself
    scan           W, bt, KV, whole -> states, state                   one chunk after another
    outputs        Q, Y0, states -> y                                  every chunk by itself
    scan_backward  W, bt, Q, whole -> dstates, dstate0                 one chunk after another, from the last
    gradients      states, dstates -> dr, dw, dk, dv, da, db           every chunk by itself

states are those at the start of each chunk, dstates the gradients of those at its end. W, bt, Q are [slots, H, L, N],
KV, states, dstates [slots, H, N, N], whole [slots, H, N], slots as chunk_model.Chunks numbers them; Y0 is like y. Every
product rounds its operands, and what goes through memory in between is rounded likewise: all but whole, which is not
rounded, and Y0, which has y's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_bone.ops.reference import DECAY_SCALE
from tests.ops.chunk_model import Chunks, Rounding

BLOCK = 16  # the inverses of diagonal blocks of this side are made by substitution, without rounding
RESULTS = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate0")


class Problem:
    """A case cut into chunks of L tokens, and what more than one kernel makes from the inputs.

    case: as wkv_inputs.make_case or packed_inputs.packed_case give it; with "w0" [H, N], the raw decay is w + w0.
    out: the dtype of y and the gradients; None for the kernels' own: that of r, for dw that of w.
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
        self.rounding = m = Rounding(operand, dtype)
        self.chunks = chunks = Chunks(B, T, L, given.get("cu_seqlens"))
        self.out = out or given["r"].dtype
        self.out_decay = out or given["w"].dtype
        zeros = torch.zeros(len(chunks.first), H, N, N)
        self.state, self.dstate = (given.get(name, zeros).to(dtype) for name in ("state", "dstate"))

        r, k, a, b = (chunks.gather(given[name].to(dtype)) for name in "rkab")
        self.v, self.dy = (chunks.gather(given[name].to(dtype)) for name in ("v", "dy"))
        raw = given["w"].to(dtype)
        if "w0" in given:
            raw = raw + given["w0"].to(dtype)
        # An empty place decays nothing: zero is put there after the activation.
        log = chunks.gather(-DECAY_SCALE * torch.sigmoid(raw))
        self.slope = chunks.gather(-DECAY_SCALE * torch.sigmoid(raw) * torch.sigmoid(-raw))
        G = log.cumsum(2)
        # g is G one place later, not G - log: what is subtracted after it was added leaves its rounding behind.
        g = torch.cat([torch.zeros_like(G[:, :, :1]), G[:, :, :-1]], 2)
        self.up, self.up_before, self.down = G.exp(), g.exp(), (-G).exp()
        self.whole = G[:, :, -1].exp()
        # Rounded here for good: as operands, as the start of a sum, and as factors of the decay's gradient.
        self.rt, self.at = m.round(r * self.up), m.round(a * self.up_before)
        self.kt, self.bt = m.round(k * self.down), m.round(b * self.down)

        self.Aab, self.Aak = m.product(self.at, self.bt.mT).tril(-1), m.product(self.at, self.kt.mT).tril(-1)
        self.Ark, self.Arb = m.product(self.rt, self.kt.mT).tril(), m.product(self.rt, self.bt.mT).tril()
        self.inverses = inverses_of_diagonal_blocks(self.Aab)

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """(I - Aab)^-1 right, or the transposed inverse's product, block of rows after block of rows.

        A block adds the products with the blocks already solved to its right side, then applies its own inverse D:
        x + (D - I) x. So x itself and the inverse's unit diagonal are never rounded.
        """
        m = self.rounding
        A, inverses = (self.Aab.mT, self.inverses.mT) if transposed else (self.Aab, self.inverses)
        blocks = range(A.shape[-1] // BLOCK)
        rows = [slice(i * BLOCK, (i + 1) * BLOCK) for i in blocks]
        solved: dict[int, Tensor] = {}
        for i in reversed(blocks) if transposed else blocks:
            x = right[..., rows[i], :]
            for j, solution in solved.items():
                x = x + m.product(A[..., rows[i], rows[j]], solution)
            rest = inverses[..., i, :, :] - torch.eye(BLOCK, dtype=x.dtype)
            solved[i] = x + m.product(rest, x)
        return torch.cat([solved[i] for i in blocks], -2)


def inverses_of_diagonal_blocks(A: Tensor) -> Tensor:
    """[.., L, L], strictly lower triangular -> (I - A_ii)^-1 of the blocks on the diagonal, [.., L / 16, 16, 16]."""
    blocks = A.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [.., row block, row, column block, column]
    A = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    inverse = torch.eye(BLOCK, dtype=A.dtype).repeat(*A.shape[:-2], 1, 1)
    for i in range(1, BLOCK):
        inverse[..., i, :] += (A[..., i, :i, None] * inverse[..., :i, :]).sum(-2)
    return inverse


def prepare(p: Problem) -> dict[str, Tensor]:
    m = p.rounding
    U0 = p.solve(m.product(p.Aak, p.v))
    W = m.round(p.solve(p.at))
    KV = (m.product(p.v.mT, p.kt) + m.product(U0.mT, p.bt)) * p.whole[:, :, None]
    Y0 = m.product(p.Ark, p.v) + m.product(p.Arb, U0)
    return {
        "W": W,
        "bt": p.bt,
        "Q": m.round(p.rt + m.product(p.Arb, W)),
        "KV": m.round(KV),
        "Y0": p.chunks.scatter(Y0).to(p.out),
        "whole": p.whole,
    }


def scan(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S <- (S + (S W^T) b~) diag(whole) + KV. The S that is carried is never rounded."""
    m, now = p.rounding, p.state.clone()
    states = torch.zeros_like(handed["KV"])
    for sequences, slots in p.chunks.steps():
        W, bt, KV, whole = (handed[name][slots] for name in ("W", "bt", "KV", "whole"))
        S = now[sequences]
        states[slots] = m.round(S)
        S = S + m.product(m.product(S, W.mT), bt)
        now[sequences] = S * whole[:, :, None] + KV
    return {"states": states, "state": now}


def outputs(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y = Y0 + Q S^T."""
    chunks = p.chunks
    Y0 = chunks.gather(handed["Y0"].to(p.rounding.dtype))
    return {"y": chunks.scatter(Y0 + p.rounding.product(handed["Q"], handed["states"].mT)).to(p.out)}


def scan_backward(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """D = dS diag(whole), dS <- D + (D b~^T) W + dY^T Q. The dS that is carried is never rounded."""
    m, now = p.rounding, p.dstate.clone()
    N = now.shape[-1]
    dstates = now.new_zeros(p.chunks.slots, now.shape[1], N, N)
    for sequences, slots in reversed(list(p.chunks.steps())):
        W, bt, Q, whole = (handed[name][slots] for name in ("W", "bt", "Q", "whole"))
        dS = now[sequences]
        dstates[slots] = m.round(dS)
        D = dS * whole[:, :, None]
        now[sequences] = D + m.product(m.product(D, bt.mT), W) + m.product(p.dy[slots].mT, Q)
    return {"dstates": dstates, "dstate0": now}


def gradients(p: Problem, handed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient of a chunk from its inputs and the two states, U and its gradient X made anew.

    The log decay of token j scales all that is written before j and read by r~ at j or later, or by a~ later than j.
    Per column that is the sum of r~ dr~ and a~ da~ from there to the end, less the same of k~ dk~ and b~ db~, plus what
    the chunk's end receives: the sum of S o D over rows, and all of k~ (V D) and b~ (U D). Pairs of a write and a read
    that are both late cancel, and do so exactly if each factor is the rounded number that stood in the product.
    """
    m, product = p.rounding, p.rounding.product
    S = handed["states"]
    D = m.round(handed["dstates"] * p.whole[:, :, None])
    U = p.solve(product(p.Aak, p.v) + product(p.at, S.mT))
    X = p.solve(product(p.Arb.mT, p.dy) + product(p.bt, D.mT), transposed=True)
    dAab, dAak = product(X, U.mT).tril(-1), product(X, p.v.mT).tril(-1)
    dArb, dArk = product(p.dy, U.mT).tril(), product(p.dy, p.v.mT).tril()
    dv = product(p.Ark.mT, p.dy) + product(p.Aak.mT, X) + product(p.kt, D.mT)
    # Gradients of the tiles, and which part of those of k~ and b~ comes from the chunk's end.
    drt = product(dArk, p.kt) + product(dArb, p.bt) + product(p.dy, S)
    dat = product(dAak, p.kt) + product(dAab, p.bt) + product(X, S)
    k_end, b_end = product(p.v, D), product(U, D)
    dkt = k_end + product(dArk.mT, p.rt) + product(dAak.mT, p.at)
    dbt = b_end + product(dArb.mT, p.rt) + product(dAab.mT, p.at)

    end = (m.round(S) * D).sum(2, keepdim=True) + (p.kt * k_end + p.bt * b_end).sum(2, keepdim=True)
    read_later = p.at * dat
    total = p.rt * drt - p.kt * dkt - p.bt * dbt + read_later
    dlog = total.flip(2).cumsum(2).flip(2) - read_later + end
    tiles = {
        "dr": drt * p.up,
        "dw": dlog * p.slope,
        "dk": dkt * p.down,
        "dv": dv,
        "da": dat * p.up_before,
        "db": dbt * p.down,
    }
    return {name: p.chunks.scatter(x).to(p.out_decay if name == "dw" else p.out) for name, x in tiles.items()}


def run(p: Problem) -> dict[str, Tensor]:
    """All five kernels: the results, and everything that was handed over."""
    found = prepare(p)
    for kernel in (scan, outputs, scan_backward, gradients):
        found |= kernel(p, found)
    return found


def wkv7_spec(
    case: Mapping[str, Tensor | None],
    L: int,
    *,
    operand: str = "bf16",
    dtype: torch.dtype = torch.float32,
    out: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward and backward with the names of wkv_inputs.reference_gradients; the arguments are those of Problem."""
    found = run(Problem(case, L, operand=operand, dtype=dtype, out=out))
    return {name: found[name] for name in RESULTS}
