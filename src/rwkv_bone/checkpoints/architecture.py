"""Recognising the model of a base checkpoint.

Generation, depth, width and every low-rank size come from its keys and shapes, never from flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from rwkv_bone.checkpoints.keys import split_key
from rwkv_bone.config import ModelConfig
from rwkv_bone.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Generation and sizes of a model, as a base checkpoint's keys and shapes give them."""

    version: int
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    dim_ffn: int
    vocab_size: int
    low_rank: Mapping[str, int]  # the rank of each low-rank network, such as {"w": 64, "a": 64, "v": 32, "g": 128}
    v_in_layer0: bool = False  # RWKV-7: layer 0 also stores v0 v1 v2, which its forward does not use

    def describe(self) -> str:
        """One line for the user."""
        ranks = " ".join(f"{name}={rank}" for name, rank in self.low_rank.items())
        ranks = f", low-rank {ranks}" if ranks else ""
        extra = ", v0 v1 v2 in layer 0" if self.v_in_layer0 else ""
        return (
            f"RWKV-{self.version}, {self.n_layer} layers, width {self.n_embd}, {self.n_head} heads of "
            f"{self.head_size}, channel mix {self.dim_ffn}, vocabulary {self.vocab_size}{ranks}{extra}"
        )

    def to_dict(self) -> dict:
        return {**asdict(self), "low_rank": dict(self.low_rank)}

    def check(self, config: ModelConfig, source: str) -> None:
        """UserError if a size that the user typed is not the checkpoint's."""
        for name in ("n_layer", "n_embd", "dim_ffn", "vocab_size", "head_size"):
            typed, found = getattr(config, name), getattr(self, name)
            if typed and typed != found:
                raise UserError(
                    f"--{name} {typed}, but {source} has {name} {found}: leave the flag out, it is read from the file"
                )
        tested = re.search(r"[4-8]", config.my_testing)
        if tested and int(tested.group()) != self.version:
            raise UserError(
                f"--my_testing {config.my_testing}, but {source} is RWKV-{self.version}: leave the flag out"
            )


def architecture_of(state: Mapping[str, Tensor], source: str | Path = "checkpoint") -> Architecture:
    """Recognise a base checkpoint from its keys and shapes; UserError says what it is when it is not one of ours."""
    version = _generation(state, source)
    try:
        vocab_size, n_embd = state["emb.weight"].shape
        n_layer = _layers(state, source)
        n_head, head_size = state["blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"].shape
        v_in_layer0 = version == 7 and "blocks.0.att.v1" in state
        return Architecture(
            version=version,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            head_size=head_size,
            dim_ffn=state["blocks.0.ffn.key.weight"].shape[0],
            vocab_size=vocab_size,
            low_rank=_low_rank(state, version, 0 if v_in_layer0 else min(1, n_layer - 1)),
            v_in_layer0=v_in_layer0,
        )
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{source} looks like RWKV-{version}, but {error.args[0]} is missing: it is incomplete"
        ) from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{source} looks like RWKV-{version}, but a tensor has an odd shape: {error}") from error


def _layers(state: Mapping[str, Tensor], source: str | Path) -> int:
    """The number of layers; UserError if one is missing below the last: sizes must not come from a stray key."""
    layers = {layer for layer, _ in map(split_key, state) if layer is not None}
    missing = next(layer for layer in range(len(layers) + 1) if layer not in layers)
    if missing < len(layers):
        raise UserError(
            f"{source} holds blocks.{max(layers)} and no blocks.{missing}: it is incomplete, or not one model"
        )
    return missing


def _low_rank(state: Mapping[str, Tensor], version: int, v_layer: int) -> dict[str, int]:
    """The ranks of a generation's low-rank networks; `v_layer` is a layer that has RWKV-7's v1, if any has."""
    if version == 5:
        return {}
    if version == 6:
        mixed = state["blocks.0.att.time_maa_w2"].shape[1]
        return {"mix": mixed, "decay": state["blocks.0.att.time_decay_w1"].shape[1]}
    ranks = {name: state[f"blocks.0.att.{name}1"].shape[1] for name in ("w", "a", "g")}
    v1 = state.get(f"blocks.{v_layer}.att.v1")
    return {**ranks, "v": 0 if v1 is None else v1.shape[1]}


# What we do not train: how its keys look, in any layout -> what it is.
UNSUPPORTED = (
    (r"\.ffn\.s_emb", "RWKV-7a (DeepEmbed) is not supported"),
    (r"\.qkv\.", "RWKV-7b is not supported"),
    (r"rosa", "RWKV-8 is not supported"),
    (r"^rwkv\.blocks\.", "the layout of transformers' RWKV-4 to 6 is not supported"),
    (r"^model\.layers\.\d+\.attn\.(x_proj|bonus)", "RWKV-6 in fla's layout is not supported; give its .pth file"),
)


def refuse_unsupported(keys: Iterable[str], source: str | Path) -> None:
    """UserError naming the model of these keys, in any layout, if it is one that we do not train."""
    for key in keys:
        for pattern, verdict in UNSUPPORTED:
            if re.search(pattern, key):
                raise _unsupported(source, verdict)


def _generation(state: Mapping[str, Tensor], source: str | Path) -> int:
    """5, 6 or 7; UserError naming what the file is instead."""
    keys = list(state)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if has(r"\.(bone|disha|(init_)?lora_[AB])$") and not has(r"^emb\.weight$"):
        raise UserError(
            f"{source} is an adapter, not a base checkpoint: give it as --peft_load, --peft_checkpoint or --adapter, "
            "whichever this program has"
        )
    refuse_unsupported(keys, source)
    if not has(r"^emb\.weight$") or not has(r"^blocks\.0\."):
        raise UserError(
            f"{source} is not an RWKV checkpoint: no emb.weight and blocks.0.*, but has keys such as {keys[0]}"
        )
    decay = next((tensor for key, tensor in state.items() if key.endswith(".att.time_decay")), None)
    if has(r"\.att\.r_k$"):
        return 7
    if has(r"\.att\.time_maa_w1$"):
        return 6
    # x051 has one decay for each head, x052 one for each channel.
    if has(r"\.att\.time_mix_g$") and not has(r"\.att\.time_first$") and (decay is None or _is_matrix(decay)):
        return 5
    kind = "an unknown RWKV generation"
    if has(r"\.att\.(ln_x\.|time_faaaa$)"):
        kind = "RWKV-5.1 (x051)" if has(r"\.att\.(gate\.|time_mix_g$)") else "RWKV-5.0 (older than x051)"
    elif has(r"\.att\.time_(first|decay)$"):
        kind = "RWKV-4"
    raise _unsupported(source, f"{kind} is not supported")


def _unsupported(source: str | Path, verdict: str) -> UserError:
    return UserError(f"{source}: {verdict}; expected an RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070) checkpoint")


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.shape[1] > 1
