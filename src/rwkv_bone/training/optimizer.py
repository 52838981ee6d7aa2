"""AdamW and its parameter groups."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from rwkv_bone.adapters.registry import split_key
from rwkv_bone.checkpoints import param_part
from rwkv_bone.config import OptimConfig
from rwkv_bone.models import RWKV
from rwkv_bone.training.gather import full_shape


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: projections, embedding, head, initial states and adapters, nothing else.

    Upstream decays matrices called `.weight`, and states. The w1, a1, g1, r_k and x_* of RWKV-7 have two or more axes,
    but are not among them.
    """
    large = param_part(name) in ("projection", "emb", "head", "state") or split_key(name) is not None
    return large and len(full_shape(parameter)) >= 2


def parameter_groups(model: RWKV, weight_decay: float, lora_plus: float = 1.0) -> list[dict]:
    """Optimiser groups of every trainable parameter, each in exactly one.

    A group's `lr` is not a learning rate but a factor: the schedule supplies the rate itself. The factor is upstream's
    (`model.lr_scale`), and for LoRA's B also `lora_plus` (LoRA+).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        decay = weight_decay if decays(name, parameter) else 0.0
        scale = model.lr_scale(name) * (lora_plus if name.endswith(".lora_B") else 1.0)
        groups.setdefault((scale, decay), []).append(parameter)
    placed = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(placed) == sorted(id(parameter) for parameter in trained.values())
    return [{"params": group, "lr": scale, "weight_decay": decay} for (scale, decay), group in groups.items()]


class AdamW(torch.optim.AdamW):
    """PyTorch's, without the wrappers that keep torch.compile out: each imports the compiler when it is first called."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW in PyTorch's fused form, which runs on the GPU and, where ZeRO offloads its state, on the CPU."""
    return AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
