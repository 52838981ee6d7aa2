"""Keys of a checkpoint: the part of the model that a key belongs to, whether all are there, and a hash of the file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints.pages import give_back
from rwkv_bone.errors import UserError


def param_part(key: str) -> str:
    """The part of a model that a key is of: emb, head, ln, projection, state, or time (the rest of att and ffn)."""
    segments = key.split(".")
    if segments[0] in ("emb", "head"):
        return segments[0]
    if any(segment.startswith("ln") for segment in segments[:-1]):
        return "ln"
    return {"weight": "projection", "time_state": "state"}.get(segments[-1], "time")


def split_key(key: str) -> tuple[int | None, str]:
    """(layer, name in the block) of upstream's key; (None, key) outside of blocks."""
    # A layer as programs write it: no sign, no zero in front, no digits of other scripts.
    found = re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,5})\.(.+)", key)
    return (int(found[1]), found[2]) if found else (None, key)


def match_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError naming every key that is missing, unexpected, or of another shape in `found`."""
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{source} does not fit the model: " + "; ".join(problems[:8]) + more)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A short hash of a base checkpoint: keys, shapes, dtypes, and 256 values spread over each tensor.

    Cheap on a mapped 14 GB file, yet different after any training step.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(state):
        tensor = state[key].detach()
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].contiguous().cpu()
        digest.update(f"{key} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
        give_back(tensor)
    return digest.hexdigest()
