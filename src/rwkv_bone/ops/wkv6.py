"""RWKV-6's and RWKV-5's recurrence as differentiable PyTorch operators. They differ only in whether the decay changes
from token to token. The definition is ops.reference.wkv6_reference.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from torch import Tensor

from rwkv_bone.ops import wkv
from rwkv_bone.ops.chunked6 import wkv6_chunked
from rwkv_bone.ops.reference import wkv6_reference

WKV6 = wkv.Operator("wkv6", per_head=("u",), reference=wkv6_reference, chunked=wkv6_chunked)
WKV5 = wkv.Operator("wkv5", per_head=("u", "w"), reference=wkv6_reference, chunked=wkv6_chunked)


def wkv6(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, T, H, N] in r's dtype; with `output_state` a pair of y and the state after the last token.

    r, k, v      [B, T, H, N], all of one dtype: float32, bfloat16, or float64 (op "torch" and "reference" only)
    w            [B, T, H, N], the decay before its activation: a token keeps exp(-exp(w)) of the state. Any number.
                 Computed with in float32; give it as float32 where you can, since bfloat16 moves slow decays by up
                 to 3 %
    u            [H, N], the bonus: how strongly a token reads what it writes itself. Computed with in float32
    state        [B, H, N, N], the state before the first token; rows are value indices, columns key indices. None
                 means zeros. Computed with in float32
    cu_seqlens   int64 [D + 1], rising from 0 to T: B is 1, and document d is tokens cu_seqlens[d] up to
                 cu_seqlens[d + 1]. Each document has its own state, so states are [D, H, N, N]; results and gradients
                 are those of each document alone
    op           one of ops.CHOICES: see ops.select_op

    The returned state is float32, and so is the arithmetic; both are float64 for float64 inputs. Everything can be
    differentiated, once. Under autocast r, k and v are cast to autocast's dtype. Raises UserError if a shape, dtype,
    device or `op` is wrong. Offsets are checked only on the processor: on a GPU wrong ones read and write memory
    outside the tensors.
    """
    inputs = {"r": r, "w": w, "k": k, "v": v, "u": u}
    return wkv.run(WKV6, inputs, state=state, cu_seqlens=cu_seqlens, output_state=output_state, op=op)


def wkv5(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RWKV-5's: as wkv6, but w is [H, N], one decay for all sequences and tokens."""
    inputs = {"r": r, "w": w, "k": k, "v": v, "u": u}
    return wkv.run(WKV5, inputs, state=state, cu_seqlens=cu_seqlens, output_state=output_state, op=op)
