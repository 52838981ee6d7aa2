"""GGUF's tensors of RWKV-6 and RWKV-7: one row for each, with what is done to upstream's tensors to get it.

GGUF prints shapes in reverse; here they are numpy's. A row is applied forwards (`to_gguf`) and backwards
(`from_gguf`). The standard for every name and order is llama.cpp, which computes with these tensors.

Sizes: C channels, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rwkv_bone.checkpoints.shapes import UNUSED_IN_LAYER_0

VERSIONS = (6, 7)


@dataclass(frozen=True)
class Row:
    """One GGUF tensor."""

    name: str
    keys: tuple[str, ...]  # the tensors of upstream that it is made of
    form: str = "same"  # see `to_gguf`
    unused: bool = False  # llama.cpp wants it and does not compute with it: written, never read back


def _rows(form: str, names: str) -> tuple[Row, ...]:
    """Rows of one form from lines `upstream's key, GGUF's name`."""
    pairs = (line.split() for line in names.strip().splitlines())
    return tuple(Row(name, (key,), form) for key, name in pairs)


# Names in a layer are without upstream's `blocks.N.` and GGUF's `blk.N.`.
MODEL = _rows(
    "same",
    """
    emb.weight           token_embd.weight
    blocks.0.ln0.weight  token_embd_norm.weight
    blocks.0.ln0.bias    token_embd_norm.bias
    ln_out.weight        output_norm.weight
    ln_out.bias          output_norm.bias
    head.weight          output.weight
    """,
)
EVERY_LAYER = _rows(
    "same",
    """
    ln1.weight             attn_norm.weight
    ln1.bias               attn_norm.bias
    ln2.weight             attn_norm_2.weight
    ln2.bias               attn_norm_2.bias
    att.ln_x.weight        time_mix_ln.weight
    att.ln_x.bias          time_mix_ln.bias
    att.receptance.weight  time_mix_receptance.weight
    att.key.weight         time_mix_key.weight
    att.value.weight       time_mix_value.weight
    att.output.weight      time_mix_output.weight
    ffn.key.weight         channel_mix_key.weight
    ffn.value.weight       channel_mix_value.weight
    """,
)
LAYER = {
    6: (
        Row("time_mix_lerp_fused.weight", tuple(f"att.time_maa_{name}" for name in "wkvrg"), "stacked"),
        *_rows(
            "same",
            """
            att.time_faaaa         time_mix_first.weight
            att.gate.weight        time_mix_gate.weight
            ffn.receptance.weight  channel_mix_receptance.weight
            """,
        ),
        *_rows(
            "row",
            """
            att.time_maa_x  time_mix_lerp_x.weight
            att.time_decay  time_mix_decay.weight
            ffn.time_maa_k  channel_mix_lerp_k.weight
            ffn.time_maa_r  channel_mix_lerp_r.weight
            """,
        ),
        *_rows(
            "transposed",
            """
            att.time_maa_w1    time_mix_w1.weight
            att.time_maa_w2    time_mix_w2.weight
            att.time_decay_w1  time_mix_decay_w1.weight
            att.time_decay_w2  time_mix_decay_w2.weight
            """,
        ),
    ),
    7: (
        Row("time_mix_lerp_fused.weight", tuple(f"att.x_{name}" for name in "rwkvag"), "stacked"),
        Row("time_mix_r_k.weight", ("att.r_k",), "heads"),
        *_rows(
            "row",
            """
            ffn.x_k  channel_mix_lerp_k.weight
            att.k_k  time_mix_k_k.weight
            att.k_a  time_mix_k_a.weight
            att.w0   time_mix_w0.weight
            att.a0   time_mix_a0.weight
            """,
        ),
        *_rows(
            "transposed",
            """
            att.w1  time_mix_w1.weight
            att.w2  time_mix_w2.weight
            att.a1  time_mix_a1.weight
            att.a2  time_mix_a2.weight
            att.g1  time_mix_g1.weight
            att.g2  time_mix_g2.weight
            """,
        ),
    ),
}
# RWKV-7 mixes its values with those of layer 0, which therefore computes with no v0 v1 v2. llama.cpp loads some there
# all the same, and expects the rank of a: it gets a's.
V_IN_LAYER_0 = (
    Row("time_mix_v0.weight", ("att.a0",), "row", unused=True),
    *(Row(f"time_mix_v{i}.weight", (f"att.a{i}",), "transposed", unused=True) for i in (1, 2)),
)
V = (
    Row("time_mix_v0.weight", ("att.v0",), "row"),
    *(Row(f"time_mix_v{i}.weight", (f"att.v{i}",), "transposed") for i in (1, 2)),
)


def rows(version: int, n_layer: int) -> list[Row]:
    """Every GGUF tensor of a model of this generation (6 or 7) and depth, with full names."""
    found = list(MODEL)
    for layer in range(n_layer):
        v = () if version != 7 else V if layer else V_IN_LAYER_0
        found += [
            replace(row, name=f"blk.{layer}.{row.name}", keys=tuple(f"blocks.{layer}.{key}" for key in row.keys))
            for row in (*EVERY_LAYER, *LAYER[version], *v)
        ]
    return found


def left_out(version: int) -> set[str]:
    """Keys of upstream that a model may have and GGUF never has: no forward computes with them."""
    return {f"blocks.0.{key}" for key in UNUSED_IN_LAYER_0} if version == 7 else set()


def to_gguf(form: str, tensors: Sequence[Tensor]) -> Tensor:
    """GGUF's tensor of a row from upstream's."""
    if form == "stacked":  # several [1, 1, C] -> [n, 1, 1, C]
        return torch.stack(list(tensors))
    (tensor,) = tensors
    if form == "transposed":  # the last two axes
        return tensor.transpose(-1, -2)
    if form in ("row", "heads"):  # [1, 1, C] or [H, N] -> [C]
        return tensor.reshape(-1)
    assert form == "same"
    return tensor


def from_gguf(form: str, tensor: Tensor, head_size: int) -> list[Tensor]:
    """Upstream's tensors of a row, as views of GGUF's."""
    if form == "stacked":
        return list(tensor.unbind())
    if form == "transposed":
        return [tensor.transpose(-1, -2)]
    if form == "row":
        return [tensor.view(1, 1, -1)]
    if form == "heads":
        return [tensor.view(-1, head_size)]
    assert form == "same"
    return [tensor]
