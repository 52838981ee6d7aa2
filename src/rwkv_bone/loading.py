"""`load_model`: a checkpoint, with or without an adapter, as a module that gives logits."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv_bone import checkpoint
from rwkv_bone.adapters import apply_adapter_file
from rwkv_bone.models import RWKV, build, load_base_into


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    op: str = "auto",
) -> RWKV:
    """A model in eval mode: `model(ids [B, T])` gives logits [B, T, V]; parameter names are the checkpoint's keys.

    path: base or merged checkpoint. adapter: an adapter file to apply live. dtype: of weights and arithmetic (None =
    the file's own). op: the WKV operator, as --op. Raises UserError for anything wrong with the files.
    """
    arch, state = checkpoint.load_base(path)
    dtype = dtype or state["emb.weight"].dtype
    with torch.device("meta"):
        model = build(arch, op=op, dtype=dtype)
    load_base_into(model, state, dtype, str(path))
    if adapter is not None:
        apply_adapter_file(model, adapter, base=state)
    return model.to(device).eval()
