"""The config.json of a Hugging Face folder: what it says must agree with the tensors and with what we compute."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_bone.checkpoints.architecture import Architecture
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import JSON_ERRORS, UserError

log = logging.getLogger("rwkv_bone")

LAYER_NORM_EPS, GROUP_NORM_EPS = 1e-5, 64e-5
SQUARED_RELU = ("sqrelu", "relu2", "squared_relu", "relu_squared")
# What is not RWKV-7's mathematics: key -> (is this value another model?, what it means).
OTHER_MODELS = {
    "embedding_layer_norm_fused": (bool, "ln0 was folded into the embedding, which cannot be undone"),
    "rescale_every": (bool, "activations and weights are halved every so many layers"),
    "deep_embedding_size": (bool, "this is RWKV-7a (DeepEmbed), which is not supported"),
    "tie_word_embeddings": (bool, "the head is the embedding; RWKV's head has weights of its own"),
    "norm_first": (lambda value: not value, "the embedding is not normalised (ln0)"),
    "norm_bias": (lambda value: not value, "norms have no bias"),
    "attn": (bool, "some layers are attention layers"),
    "quantization_config": (bool, "its weights are quantised; give the model as it was before"),
    "hidden_act": (lambda value: value not in SQUARED_RELU, f"RWKV's channel mix is {SQUARED_RELU[0]}"),
}
EPSILONS = {
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "norm_eps": LAYER_NORM_EPS,
    "group_norm_epsilon": GROUP_NORM_EPS,
}
# A folder's names of a size -> what it is in our architecture.
SIZES = {
    "vocab_size": lambda arch: arch.vocab_size,
    "hidden_size": lambda arch: arch.n_embd,
    "attention_hidden_size": lambda arch: arch.n_embd,
    "num_hidden_layers": lambda arch: arch.n_layer,
    "intermediate_size": lambda arch: arch.dim_ffn,
    "head_size": lambda arch: arch.head_size,
    "head_dim": lambda arch: arch.head_size,
    "num_attention_heads": lambda arch: arch.n_head,
    "num_heads": lambda arch: arch.n_head,
    "decay_low_rank_dim": lambda arch: arch.low_rank.get("w"),
    "a_low_rank_dim": lambda arch: arch.low_rank.get("a"),
    "gate_low_rank_dim": lambda arch: arch.low_rank.get("g"),
    "v_low_rank_dim": lambda arch: arch.low_rank.get("v"),
    "value_low_rank_dim": lambda arch: arch.low_rank.get("v"),
}


def read_model_config(folder: Path | None) -> dict[str, Any] | None:
    """The config.json of a model's folder; None if there is none, or one that is not a model's, such as a run's."""
    path = folder / "config.json" if folder else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    known = isinstance(config, dict) and {"model_type", "architectures", "hidden_size"} & config.keys()
    return config if known else None


def check_mathematics(config: Mapping[str, Any], path: Path) -> None:
    """UserError naming the key of a config.json that makes the model another than RWKV-7 as we compute it."""
    kind = config.get("model_type", "rwkv7")
    version = config.get("architecture_version", kind if kind != "rwkv" else "rwkv4")
    if version != "rwkv7":
        raise UserError(
            f"{path}: model_type {kind!r}{f', {version}' if version != kind else ''}: expected rwkv7, the only "
            "generation that is read from a Hugging Face folder; give the .pth file of this model"
        )
    for key, (is_other, meaning) in OTHER_MODELS.items():
        value = config.get(key)
        if value is not None and is_other(value):
            raise UserError(f"{path}: {key} {value!r}: {meaning}; give the original .pth file of this model")
    for key, expected in EPSILONS.items():
        value = config.get(key)
        if value is not None and not _close(value, expected):
            raise UserError(f"{path}: {key} {value!r}: expected {expected:g}, with which RWKV-7 was made")


def check_sizes(config: Mapping[str, Any], arch: Architecture, path: Path) -> None:
    """UserError naming a size in a config.json that the tensors do not have."""
    for key in ("hidden_ratio", "norm_eps"):
        if config.get(key) is not None and not is_number(config[key]):
            raise UserError(f"{path}: {key} {config[key]!r}: expected a number")
    for key, size in SIZES.items():
        value, found = config.get(key), size(arch)
        # A model of one layer has no v1.
        if value is not None and found and value != found:
            raise UserError(f"{path}: {key} {value!r}, but the tensors say {found}: they are not of the same model")
    ratio = config.get("hidden_ratio")
    if (
        config.get("intermediate_size") is None
        and ratio is not None
        and not abs(ratio * arch.n_embd - arch.dim_ffn) <= 0.5
    ):
        raise UserError(
            f"{path}: hidden_ratio {ratio!r} and no intermediate_size, but the tensors say {arch.dim_ffn} channels of "
            f"{arch.n_embd}: they are not of the same model"
        )
    values = config.get("value_dim")
    if values is not None and any(value != arch.n_embd for value in (values if isinstance(values, list) else [values])):
        raise UserError(f"{path}: value_dim {values!r}, but the tensors say {arch.n_embd} in every layer")
    scaled = arch.head_size * config["norm_eps"] if config.get("norm_eps") is not None else GROUP_NORM_EPS
    if not _close(scaled, GROUP_NORM_EPS):
        log.warning(
            "%s: with heads of %d, fla's programs compute GroupNorm with eps %g; here it is %g, as upstream's",
            *(path, arch.head_size, scaled, GROUP_NORM_EPS),
        )


def head_size_of(config: Mapping[str, Any] | None) -> int | None:
    """Channels per head, as a config.json says; None where it does not."""
    config = config or {}

    def number(*names: str) -> int | None:
        found = next((config[name] for name in names if config.get(name)), None)
        return found if type(found) is int and found > 0 else None

    heads, width = number("num_attention_heads", "num_heads"), number("hidden_size")
    return number("head_size", "head_dim") or (width // heads if heads and width else None) or None


def _close(value: object, expected: float) -> bool:
    return is_number(value) and math.isclose(value, expected, rel_tol=1e-6)
