"""RWKV-7's recurrence as one differentiable PyTorch operator. The definition is ops.reference.wkv7_reference.

Sizes: B batch, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

from torch import Tensor

from rwkv_bone.ops import wkv
from rwkv_bone.ops.chunked import wkv7_chunked
from rwkv_bone.ops.reference import wkv7_reference

WKV7 = wkv.Operator("wkv7", per_head=(), reference=wkv7_reference, chunked=wkv7_chunked)


def wkv7(
    *,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w0: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
    op: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y [B, T, H, N] in r's dtype; with `output_state` a pair of y and the state after the last token.

    r, k, v, a, b   [B, T, H, N], all of one dtype: float32, bfloat16, or float64 (op "torch" and "reference" only)
    w               [B, T, H, N], the decay before its activation: a token keeps exp(-exp(-0.5) * sigmoid(w)) of the
                    state, between 0.545 and 1. Computed with in float32; give it as float32 where you can, since
                    bfloat16 moves slow decays by up to 3 %, or give its largest part apart, as w0
    w0              [H, N], added to w in float32. None means zeros. In bfloat16 a constant w0, one that requires no
                    gradient, saves reading and writing w in float32
    state           [B, H, N, N], the state before the first token; rows are value indices, columns key indices. None
                    means zeros. Computed with in float32
    cu_seqlens      int64 [D + 1], rising from 0 to T: B is 1, and document d is tokens cu_seqlens[d] up to
                    cu_seqlens[d + 1]. Each document has its own state, so states are [D, H, N, N]; results and
                    gradients are those of each document alone
    op              one of ops.CHOICES: see ops.select_op

    The returned state is float32, and so is the arithmetic; both are float64 for float64 inputs. Everything can be
    differentiated, once. Under autocast r, k, v, a and b are cast to autocast's dtype. Raises UserError if a shape,
    dtype, device or `op` is wrong. Offsets are checked only on the processor: on a GPU wrong ones read and write
    memory outside the tensors.
    """
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    return wkv.run(WKV7, inputs, w0=w0, state=state, cu_seqlens=cu_seqlens, output_state=output_state, op=op)
