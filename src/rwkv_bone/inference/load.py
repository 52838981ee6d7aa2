"""`load_model`: a checkpoint, with or without an adapter, as a module that gives logits."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import apply_adapter, read_adapter
from rwkv_bone.config import QUANTS
from rwkv_bone.devices import require_cuda
from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV, build, load_base_into

log = logging.getLogger("rwkv_bone")


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    op: str = "auto",
    quant: str | None = None,
) -> RWKV:
    """A model in eval mode: `model(ids [B, T])` gives logits [B, T, V]; parameter names are the checkpoint's keys.

    path: base or merged checkpoint. adapter: an adapter file to apply live. dtype: of weights and arithmetic (None =
    the file's own). op: the WKV operator, as --op. quant: none, int8, nf4 or fp4, as --quant (None = what the adapter
    was trained on); quantised projections are not in the state dict. UserError for anything wrong with the files, and
    for a CUDA device that PyTorch cannot use.
    """
    if torch.device(device).type == "cuda":
        require_cuda(f"device={str(device)!r}: ", "use device='cpu'")
    if quant not in (None, *QUANTS):
        raise UserError(f"quant={quant!r}: expected one of {', '.join(QUANTS)}, or None")
    arch, state = checkpoints.load_base(path)
    dtype = dtype or state["emb.weight"].dtype
    trained = read_adapter(adapter, state) if adapter is not None else None
    metadata = trained.metadata if trained else None
    trained_on = metadata.get("quant", "none") if metadata else quant or "none"
    if quant not in (None, trained_on):
        log.warning("adapter %s was trained on a base in %s, and is put on one in %s", adapter, trained_on, quant)
    with torch.device("meta"):
        model = build(arch, op=op, dtype=dtype)
    load_base_into(model, state, dtype, str(path), quant or trained_on, device)
    if trained is not None:
        apply_adapter(model, trained)
    return model.to(device).eval()
