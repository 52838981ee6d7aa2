"""Filling a model with weights: those of a checkpoint, or upstream's initialisation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import ModelConfig
from rwkv_bone.console import with_bar
from rwkv_bone.errors import UserError
from rwkv_bone.models.layers import Head
from rwkv_bone.models.rwkv import GENERATIONS, RWKV
from rwkv_bone.quantization import QuantLinear, is_quantized, quantize


def load_base_into(
    model: RWKV,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
    quant: str = "none",
    device: torch.device | str | None = None,
) -> None:
    """Give the model the checkpoint's tensors, strictly: every key and shape must match (else UserError).

    dtype: what the tensors are converted to; None leaves them as they are, mapped and not copied, but for transposed
    views, which are copied. A trained initial state in the checkpoint is loaded too, always in fp32. quant: the
    projections are quantised one at a time, from the file's own values, and their layers become QuantLinear, so no more
    than one of them is in memory in full. Pages of a mapped file stay resident for no tensor that was copied or quantised. device: where they are quantised and where their codes stay (None = the
    tensors' own); all other tensors stay where they are. source: what messages call the checkpoint.
    """
    if any(checkpoints.param_part(key) == "state" for key in state):
        model.add_time_state()
    checkpoints.match_keys(model.state_dict(), state, source)
    tensors = {}
    items = state.items() if quant == "none" else with_bar(state.items(), len(state), f"quantising to {quant}")
    for key, tensor in items:
        if quant != "none" and is_quantized(key):
            model.set_submodule(key.removesuffix(".weight"), QuantLinear(quantize(tensor.to(device), quant)))
            checkpoints.give_back(tensor)
            continue
        wanted = torch.float32 if checkpoints.param_part(key) == "state" else dtype
        # A view of another layout may be transposed: then it is copied, so that all sums have one order in all layouts.
        tensors[key] = checkpoints.taken_over(tensor, dtype=wanted)
    model.load_state_dict(tensors, strict=True, assign=True)


def architecture_from_scratch(config: ModelConfig) -> Architecture:
    """The architecture of a new RWKV-7 of the sizes the user gave; ranks as in released models of that width."""
    head_size = config.head_size or 64
    if config.n_embd % head_size:
        raise UserError(f"--n_embd {config.n_embd} is not a multiple of --head_size {head_size}")
    if config.my_testing and "7" not in config.my_testing:
        raise UserError(f"--my_testing {config.my_testing}: only RWKV-7 (x070) is trained from scratch")
    return Architecture(
        version=7,
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_embd // head_size,
        head_size=head_size,
        dim_ffn=config.dim_ffn or 4 * config.n_embd,
        vocab_size=config.vocab_size,
        low_rank=GENERATIONS[7].low_rank_sizes(config.n_embd),
    )


@torch.no_grad()
def init_from_scratch(model: RWKV, seed: int) -> None:
    """Fill a model with upstream's initialisation; the same seed gives the same weights."""
    generation, arch = GENERATIONS[model.arch.version], model.arch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        model.emb.weight.uniform_(-1e-4, 1e-4)
        assert isinstance(model.head, Head)  # no adapter has taken its place yet
        nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(arch.vocab_size / arch.n_embd, 1)))
        for layer, block in enumerate(model.blocks):
            generation.initialise_block(block.att, block.ffn, layer, arch.n_layer)
