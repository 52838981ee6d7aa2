"""Models in which every tensor is random and matters, with adapters, as files to convert."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone import checkpoints, load_model
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models import build, load_base_into
from tests.conftest import adapter_state

IDS = [number * 7919 % 256 for number in range(1, 40)]
RANKS = {5: {}, 6: {"mix": 8, "decay": 12}, 7: {"w": 12, "a": 20, "v": 8, "g": 24}}


def random_state(version: int = 7, v_in_layer0: bool = False, dtype=torch.float32, **sizes) -> dict[str, Tensor]:
    """A checkpoint whose sizes are all different, so that a transpose that is left out shows."""
    sizes = {"n_layer": 3, "n_embd": 128, "head_size": 64, "dim_ffn": 96, "vocab_size": 256, **sizes}
    arch = Architecture(version, n_head=sizes["n_embd"] // sizes["head_size"], low_rank=RANKS[version], **sizes)
    model = build(replace(arch, v_in_layer0=v_in_layer0), op="torch")
    generator, state = torch.Generator().manual_seed(version), {}
    for key, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if ".ln" in f".{key}":
            noise = key.endswith("weight") + 0.2 * noise
        elif key.endswith("_w2") or key[-2:] in ("w2", "a2", "g2", "v2"):
            noise *= tensor.shape[-2] ** -0.5
        elif tensor.dim() == 2 and not key.endswith(("time_faaaa", "time_decay", "r_k")):
            noise *= tensor.shape[1 if key.endswith("weight") else 0] ** -0.5
        else:
            noise *= 0.5
        state[key] = noise.to(dtype)
    return state


def write_base(path: Path, **options) -> Path:
    checkpoints.write_state(path, random_state(**options), overwrite=True)
    return path


def write_adapter(path: Path, base: Path, kind: str = "bone", r: int = 8, train_parts=("ln", "time"), std=0.05) -> Path:
    """A trained adapter of a base, none of whose tensors is zero."""
    found = checkpoints.load_base(base)
    model = build(found.arch, op="torch")
    load_base_into(model, {key: tensor.clone() for key, tensor in found.state.items()}, torch.float32)
    settings = AdapterSettings(kind, 0 if kind == "state" else r, alpha=12.0 if kind in ("lora", "pissa") else 0.0)
    injection = inject(model, settings=settings, train_parts=() if kind == "state" else train_parts)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    about = {"base": checkpoints.fingerprint(found.state), "architecture": found.arch.to_dict(), "step": 7}
    metadata = {"format": 1, **about, "quant": "none", **injection.metadata()}
    checkpoints.write_state(path, adapter_state(model), metadata, overwrite=True)
    return path


@torch.no_grad()
def logits(base: Path, adapter: Path | None = None, ids=IDS) -> Tensor:
    """[T, V] in fp32, by ourselves."""
    return load_model(base, adapter=adapter, dtype=torch.float32, op="torch")(torch.tensor([ids]))[0]
