"""What is computed again in backward: what --grad_cp says, or of that as little as the free memory asks for.

From cheap to dear, by bytes freed for an operation that is done twice: the WKV operator of every block (12 bytes for a
thousand operations), then whole blocks (1.3), of which the first ones, since backward comes to them last. Gradients are
the same numbers whatever is computed again, so the choice is a matter of time and memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from rwkv_bone.checkpoints import Architecture
from rwkv_bone.config import TrainConfig
from rwkv_bone.devices import free_memory
from rwkv_bone.models import Recompute
from rwkv_bone.training.memory import GAPS, GB, Counted, Run, needs
from rwkv_bone.training.module import TrainingModule

# What a process takes beside tensors once its memory is looked at: on a GPU libraries and their kernels, on a CPU also
# what the C library does not give back.
RESERVE = {"cuda": GB // 4, "cpu": GB}


class Choice(NamedTuple):
    """What is computed again, and a sentence for the header."""

    recompute: Recompute
    sentence: str
    fits: bool  # whether the run is expected to fit


def memory_there(device: str, processes: int) -> int | None:
    """Bytes that this process may take on `cuda` or `cpu`, before it has any tensor there; None if nothing tells.

    processes: of the run, on this machine. On a CPU they share what is there.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = free_memory()
    return None if free is None else free // processes


def run_of(config: TrainConfig, device: str) -> Run:
    """What memory depends on, of a training run's settings."""
    data, model = config.data, config.model
    return Run(data.ctx_len, data.micro_bsz, model.quant, Recompute(), model.chunk_ctx, config.run.precision, device)


def needed(arch: Architecture, count: Counted, run: Run) -> float:
    """Bytes that must be free at the start of this run."""
    return needs(arch, count, run).total * (1 + GAPS) + RESERVE[run.device]


def decide(choice: str, arch: Architecture, count: Counted, run: Run, there: float | None) -> Choice:
    """What --grad_cp `choice` computes again in this run, of which `there` bytes are free (None: unknown).

    auto is the first of `levels` that fits, and every block if none does. Less memory never computes less again.
    """
    layers = arch.n_layer
    fixed = {"0": Recompute(), "wkv": Recompute(0, True), "1": Recompute(layers)}

    def bytes_for(recompute: Recompute) -> float:
        return needed(arch, count, replace(run, recompute=recompute))

    chosen = fixed.get(choice) or next(
        (level for level in levels(layers) if there is None or bytes_for(level) <= there), Recompute(layers, True)
    )
    size = bytes_for(chosen)
    fits = there is None or size <= there
    free = "how much is free is unknown" if there is None else f"{_gb(there)} are free"
    sentence = f"{_gb(size)} needed, {free}: {_in_words(chosen, layers)} in backward (--grad_cp {choice}"
    if choice == "auto" and chosen.blocks + chosen.wkv:
        sentence += f"; without that {_gb(bytes_for(Recompute()))}"
    sentence += ")"
    if not fits:
        sentence += f". This may not fit: {_remedies(choice, arch, count, replace(run, recompute=chosen), there)}"
    return Choice(chosen, sentence, fits)


def levels(layers: int) -> Iterator[Recompute]:
    """What may be computed again, from little to much."""
    yield Recompute()
    for blocks in range(layers + 1):
        yield Recompute(blocks, True)


def _in_words(recompute: Recompute, layers: int) -> str:
    if recompute.blocks >= layers:
        return "every block is computed again"
    wkv = "the WKV operator runs again" if recompute.wkv else ""
    if not recompute.blocks:
        return wkv or "nothing is computed again"
    return f"the first {recompute.blocks} of {layers} blocks, and of the others the WKV operator, are computed again"


def _remedies(choice: str, arch: Architecture, count: Counted, run: Run, there: float) -> str:
    """What to type: each change that is enough alone; all of them where none is."""
    changes = {}
    if choice in ("0", "wkv"):
        changes["--grad_cp auto"] = replace(run, recompute=Recompute(arch.n_layer))
    if run.micro_bsz > 1:
        for rows in range(run.micro_bsz - 1, 0, -1):
            changes["--micro_bsz"] = replace(run, micro_bsz=rows)
