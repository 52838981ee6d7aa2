"""Upstream's names and shapes: what a `.pth` file of each generation holds, in its order.

Everything after reading sees these names and shapes, whatever layout the file has.

Sizes: V vocabulary, C channels, H heads, N head size, F channel mix; the ranks of the low-rank networks have the names
of `Architecture.low_rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rwkv_bone.checkpoints.architecture import Architecture
from rwkv_bone.checkpoints.keys import split_key

OUTSIDE = {"emb.weight": "V C", "ln_out.weight": "C", "ln_out.bias": "C", "head.weight": "V C"}
NORMS = {f"ln{number}.{part}": "C" for number in (1, 2, 0) for part in ("weight", "bias")}
LN_X = {"att.ln_x.weight": "C", "att.ln_x.bias": "C"}


def _projections(*names: str) -> dict[str, str]:
    return {f"att.{name}.weight": "C C" for name in names}


def _rows(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "1 1 C")


CHANNEL_MIX = {"ffn.key.weight": "F C", "ffn.value.weight": "C F"}
GATED_CHANNEL_MIX = {"ffn.key.weight": "F C", "ffn.receptance.weight": "C C", "ffn.value.weight": "C F"}

# Generation -> the names in a block, without `blocks.N.`. Layer 0 alone has ln0; see `block_names` for what it lacks.
BLOCK: dict[int, dict[str, str]] = {
    5: {
        **NORMS,
        **_rows("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "att.time_mix_g"),
        "att.time_decay": "H N",
        "att.time_faaaa": "H N",
        **_projections("receptance", "key", "value", "output", "gate"),
        **LN_X,
        **_rows("ffn.time_mix_k", "ffn.time_mix_r"),
        **GATED_CHANNEL_MIX,
    },
    6: {
        **NORMS,
        **_rows(*(f"att.time_maa_{name}" for name in "xwkvrg")),
        "att.time_maa_w1": "C 5mix",
        "att.time_maa_w2": "5 mix C",
        "att.time_decay": "1 1 C",
        "att.time_decay_w1": "C decay",
        "att.time_decay_w2": "decay C",
        "att.time_faaaa": "H N",
        **_projections("receptance", "key", "value", "output", "gate"),
        **LN_X,
        **_rows("ffn.time_maa_k", "ffn.time_maa_r"),
        **GATED_CHANNEL_MIX,
    },
    7: {
        **NORMS,
        **_rows(*(f"att.x_{name}" for name in "rwkvag")),
        **{
            f"att.{network}{part}": shape
            for network in "wav"
            for part, shape in (("1", f"C {network}"), ("2", f"{network} C"), ("0", "1 1 C"))
        },
        "att.g1": "C g",
        "att.g2": "g C",
        **_rows("att.k_k", "att.k_a"),
        "att.r_k": "H N",
        **_projections("receptance", "key", "value", "output"),
        **LN_X,
        **_rows("ffn.x_k"),
        **CHANNEL_MIX,
    },
}
# A trained initial state, which a merged file may hold.
STATE = {"att.time_state": "H N N"}
UNUSED_IN_LAYER_0 = ("att.v0", "att.v1", "att.v2")


def symbols(key: str, version: int) -> str | None:
    """The shape of upstream's key in words, such as "1 1 C"; None for a key that the generation does not have."""
    layer, name = split_key(key)
    if layer is None:
        return OUTSIDE.get(name)
    return None if layer and name.startswith("ln0.") else (BLOCK[version] | STATE).get(name)


def expected_shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, shape) of every tensor of a model, in the order of a `.pth` file; an initial state is not among them."""
    sizes = model_sizes(arch)
    ends = list(OUTSIDE.items())
    for key, shape in ends[:1]:
        yield key, _numbers(shape, sizes)
    for layer in range(arch.n_layer):
        for name, shape in BLOCK[arch.version].items():
            if name.startswith("ln0.") and layer or name in UNUSED_IN_LAYER_0 and not (layer or arch.v_in_layer0):
                continue
            yield f"blocks.{layer}.{name}", _numbers(shape, sizes)
    for key, shape in ends[1:]:
        yield key, _numbers(shape, sizes)


def state_shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(key, shape) of a trained initial state."""
    sizes = model_sizes(arch)
    for layer in range(arch.n_layer):
        for name, shape in STATE.items():
            yield f"blocks.{layer}.{name}", _numbers(shape, sizes)


def model_sizes(arch: Architecture) -> Mapping[str, int]:
    """The number behind each word of a shape."""
    return {
        "V": arch.vocab_size,
        "C": arch.n_embd,
        "H": arch.n_head,
        "N": arch.head_size,
        "F": arch.dim_ffn,
        "5mix": 5 * arch.low_rank.get("mix", 0),
        **arch.low_rank,
    }


def _numbers(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[word] if word in sizes else int(word) for word in shape.split())
