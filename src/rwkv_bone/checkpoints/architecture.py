"""Recognising the model of a base checkpoint.

Generation, depth, width and every low-rank size come from its keys and shapes, never from flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from rwkv_bone.checkpoints.files import read_state
from rwkv_bone.checkpoints.layouts import Layout, to_upstream
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
        n_layer = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
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
    except KeyError as error:
        raise UserError(
            f"{source} looks like RWKV-{version}, but {error.args[0]} is missing: it is incomplete"
        ) from error
    except ValueError as error:
        raise UserError(f"{source} looks like RWKV-{version}, but a tensor has an odd shape: {error}") from error


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


def _generation(state: Mapping[str, Tensor], source: str | Path) -> int:
    """5, 6 or 7; UserError naming what the file is instead."""
    keys = list(state)

    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if has(r"\.(bone|disha|(init_)?lora_[AB])$") and not has(r"^emb\.weight$"):
        raise UserError(f"{source} is an adapter, not a base checkpoint: give it as --peft_load or --peft_checkpoint")
    if has(r"^(model|module|base_model)\."):
        raise UserError(f"{source} has keys such as {keys[0]}; expected upstream's names such as emb.weight")
    if not has(r"^emb\.weight$") or not has(r"^blocks\.0\."):
        raise UserError(
            f"{source} is not an RWKV checkpoint: no emb.weight and blocks.0.*, but has keys such as {keys[0]}"
        )
    refused = (
        (r"\.ffn\.s_emb", "RWKV-7a (DeepEmbed) is not supported"),
        (r"\.qkv\.", "RWKV-7b is not supported"),
        (r"rosa", "RWKV-8 is not supported"),
        (r"\.att\.time_first$", "RWKV-4 is not supported"),
    )
    for pattern, verdict in refused:
        if has(pattern):
            raise UserError(
                f"{source}: {verdict}; expected an RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070) checkpoint"
            )
    for pattern, version in ((r"\.att\.r_k$", 7), (r"\.att\.time_maa_w1$", 6), (r"\.att\.time_mix_g$", 5)):
        if has(pattern):
            return version
    kind = "RWKV-5 of version x051 or older" if has(r"\.att\.time_(faaaa|decay)$") else "an unknown RWKV generation"
    raise UserError(f"{source}: {kind}; expected an RWKV-5 (x052), RWKV-6 (x060) or RWKV-7 (x070) checkpoint")


@dataclass(frozen=True)
class Base:
    """A base model as it was read."""

    arch: Architecture
    state: dict[str, Tensor]  # under upstream's names, with upstream's shapes: mapped views, in the file's dtypes
    layout: Layout
    path: Path  # what was read: a file, an index or a folder
    folder: Path | None = None  # where config.json and the tokenizer of the model are

    def describe(self) -> str:
        """A few words on what was read, for headers; "" for a plain file with upstream's names."""
        return "" if self.layout.name == "upstream" else self.layout.title


def load_base(path: str | Path) -> Base:
    """The model at `path`, in any layout of `layouts.py`. UserError says what is wrong with it."""
    path = Path(path)
    state, layout = to_upstream(read_state(path), path)
    return Base(architecture_of(state, path), state, layout, path)
