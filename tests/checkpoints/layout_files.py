"""Models in the layouts of other programs, written by tables that were typed by hand: they ask none of ours."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import random_model

# No rank is the width or another rank, and 16 channels a head are not 2 heads: nothing square hides a transpose.
SIZES = {
    5: {"dim_ffn": 112},
    6: {"dim_ffn": 112, "low_rank": {"mix": 6, "decay": 10}},
    7: {"dim_ffn": 144, "low_rank": {"w": 6, "a": 10, "v": 4, "g": 12}},
}
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 144,
    "decay_low_rank_dim": 6,
    "a_low_rank_dim": 10,
    "v_low_rank_dim": 4,
    "gate_low_rank_dim": 12,
    "tie_word_embeddings": False,
    "model_type": "rwkv7",
}
OFFICIAL_CONFIG = CONFIG | {
    "architectures": ["Rwkv7ForCausalLM"],
    "head_size": 16,
    "num_attention_heads": 2,
    "context_length": 4096,
    "layer_norm_epsilon": 1e-5,
    "group_norm_epsilon": 64e-5,
    "embedding_layer_norm_fused": False,
    "rescale_every": 0,
    "deep_embedding_size": 0,
}
FLA_CONFIG = CONFIG | {
    "architectures": ["RWKV7ForCausalLM"],
    "head_dim": 16,
    "num_heads": 2,
    "hidden_ratio": 4.5,
    "norm_eps": 1e-5,
    "norm_first": True,
    "norm_bias": True,
    "hidden_act": "sqrelu",
    "attn": None,
    "value_dim": [32, 32],
}
# fla's name of a tensor in a layer, upstream's, and what is done to it: = nothing, T transposed, 1 made one axis.
FLA = """
attn_norm.weight          ln1.weight             =
attn_norm.bias            ln1.bias               =
ffn_norm.weight           ln2.weight             =
ffn_norm.bias             ln2.bias               =
pre_norm.weight           ln0.weight             =
pre_norm.bias             ln0.bias               =
attn.x_r                  att.x_r                =
attn.x_w                  att.x_w                =
attn.x_k                  att.x_k                =
attn.x_v                  att.x_v                =
attn.x_a                  att.x_a                =
attn.x_g                  att.x_g                =
attn.w_lora.lora.0.weight att.w1                 T
attn.w_lora.lora.2.weight att.w2                 T
attn.w_lora.lora.2.bias   att.w0                 1
attn.a_lora.lora.0.weight att.a1                 T
attn.a_lora.lora.2.weight att.a2                 T
attn.a_lora.lora.2.bias   att.a0                 1
attn.v_lora.lora.0.weight att.v1                 T
attn.v_lora.lora.2.weight att.v2                 T
attn.v_lora.lora.2.bias   att.v0                 1
attn.g_lora.lora.0.weight att.g1                 T
attn.g_lora.lora.2.weight att.g2                 T
attn.k_k                  att.k_k                1
attn.k_a                  att.k_a                1
attn.r_k                  att.r_k                =
attn.r_proj.weight        att.receptance.weight  =
attn.k_proj.weight        att.key.weight         =
attn.v_proj.weight        att.value.weight       =
attn.o_proj.weight        att.output.weight      =
attn.g_norm.weight        att.ln_x.weight        =
attn.g_norm.bias          att.ln_x.bias          =
ffn.x_k                   ffn.x_k                1
ffn.key.weight            ffn.key.weight         =
ffn.value.weight          ffn.value.weight       =
"""
FLA_OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
# What web-rwkv's converter swaps the last two axes of: keys that contain one of these.
WEB_RWKV_TRANSPOSED = ("time_mix_w1", "time_mix_w2", "time_decay_w1", "time_decay_w2", "time_state")
WEB_RWKV_TRANSPOSED_V7 = tuple(f"att.{name}{part}" for name in "wavg" for part in "12")


def state_of(version: int, dtype=torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Upstream's tensors of a tiny random model with odd sizes."""
    return random_model(seed, dtype, version=version, vocab_size=256, **SIZES[version]).state_dict()


def official_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official layout of RWKV-7."""
    return {key if key == "head.weight" else f"model.{key}": tensor.clone() for key, tensor in state.items()}


def fla_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """fla's layout of RWKV-7."""
    tensors = {theirs: state[ours].clone() for ours, theirs in FLA_OUTSIDE.items()}
    for line in FLA.strip().splitlines():
        theirs, ours, change = line.split()
        for layer in (0, 1):
            tensor = state.get(f"blocks.{layer}.{ours}")
            if tensor is not None:
                changed = tensor.t() if change == "T" else tensor.flatten() if change == "1" else tensor
                tensors[f"model.layers.{layer}.{theirs}"] = changed.clone().contiguous()
    return tensors


def web_rwkv_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """web-rwkv's layout of any generation, in float16."""
    swapped = WEB_RWKV_TRANSPOSED + (WEB_RWKV_TRANSPOSED_V7 if "blocks.0.att.r_k" in state else ())
    tensors = {}
    for key, tensor in state.items():
        name = key.replace("time_faaaa", "time_first").replace("time_maa", "time_mix").lower()
        tensors[name] = (tensor.transpose(-1, -2) if name.endswith(swapped) else tensor).half().contiguous()
    return tensors


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict | None, shards: int = 1) -> Path:
    """A Hugging Face folder; with several shards their index too."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensor for at, (key, tensor) in enumerate(sorted(tensors.items())) if at % shards == number}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_st(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path
