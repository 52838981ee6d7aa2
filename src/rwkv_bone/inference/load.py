"""`load_model`: a checkpoint, with or without an adapter, as a module that gives logits."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterFile, apply_adapter, read_adapter
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import QUANTS
from rwkv_bone.devices import require_cuda
from rwkv_bone.errors import UserError
from rwkv_bone.models import RWKV, build, load_base_into

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

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

    path: base or merged checkpoint, in any form that --load_model takes. adapter: a file to apply to it, which stays an
    adapter. dtype: of weights and arithmetic (None = the file's own; for a float16 file, in which nothing is computed,
    bfloat16 on a GPU and float32 on the CPU). op: the WKV operator, as --op. quant: none, int8, nf4 or fp4, as --quant
    (None = what the adapter was trained on); quantised projections are not in the state dict. UserError for anything
    wrong with the files, and for a CUDA device that PyTorch cannot use.
    """
    if torch.device(device).type == "cuda":
        require_cuda(f"device={str(device)!r}: ", "use device='cpu'")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype}: expected {', '.join(map(str, DTYPES))}, or None")
    if quant not in (None, *QUANTS):
        raise UserError(f"quant={quant!r}: expected one of {', '.join(QUANTS)}, or None")
    base = checkpoints.load_base(path)
    arch, state = base.arch, base.state
    dtype = dtype or _dtype(state["emb.weight"].dtype, torch.device(device), path)
    trained = read_adapter(adapter, state, base_file=path) if adapter is not None else None
    metadata = trained.metadata if trained else None
    trained_on = metadata.get("quant", "none") if metadata else quant or "none"
    if quant not in (None, trained_on):
        log.warning("adapter %s was trained on a base in %s, and is put on one in %s", adapter, trained_on, quant)
    model = assemble(
        arch, state, op=op, dtype=dtype, source=str(path), quant=quant or trained_on, device=device, adapter=trained
    )
    # Not `model.to(device)`, after which the pages of the whole file would be resident.
    return model._apply(functools.partial(checkpoints.taken_over, device=device)).eval()


def _dtype(stored: torch.dtype, device: torch.device, path: str | Path) -> torch.dtype:
    """What a file of this dtype is computed in; a float16 file says so."""
    if stored != torch.float16:
        return stored
    # float32 holds every float16 number; bfloat16 needs no more memory, and its range has no overflow.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    log.warning("%s holds float16: it is computed in %s (dtype= chooses)", path, str(dtype).removeprefix("torch."))
    return dtype


def assemble(
    arch: Architecture,
    state: Mapping[str, Tensor],
    *,
    op: str = "auto",
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
    quant: str = "none",
    device: torch.device | str | None = None,
    adapter: AdapterFile | None = None,
) -> RWKV:
    """A model of these tensors, which may be mapped from a file, under an adapter.

    dtype: of weights and arithmetic; None leaves the weights as they are and computes in fp32. source: what messages
    call the tensors. quant, device: as `load_base_into` takes them.
    """
    with torch.device("meta"):
        model = build(arch, op=op, dtype=dtype or torch.float32)
    load_base_into(model, state, dtype, source, quant, device)
    if adapter is not None:
        apply_adapter(model, adapter)
    return model
