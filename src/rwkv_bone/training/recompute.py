"""What is computed again in backward: what --grad_cp says, or of that as little as the free memory asks for.

From cheap to dear, by bytes freed for an operation that is done twice: the WKV operator of every block (12 bytes for a
thousand operations), then whole blocks (1.3), of which the first ones, since backward comes to them last. Gradients are
the same numbers whatever is computed again, so the choice is a matter of time and memory alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from rwkv_bone import allocator
from rwkv_bone.checkpoints import Architecture, resident_bytes
from rwkv_bone.config import TrainConfig
from rwkv_bone.data import BatchPlan
from rwkv_bone.devices import free_memory
from rwkv_bone.models import EVERY_BLOCK, RWKV, Recompute
from rwkv_bone.training.memory import GB, RESIDENT, Counted, Run, needed
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.strategy import offloads, zero_stage

CHUNK = 512  # of --chunk_ctx, where memory is short


class Choice(NamedTuple):
    """What is computed again, and a sentence for the header."""

    recompute: Recompute
    sentence: str
    fits: bool  # whether the run is expected to fit


def memory_there(device: str, processes: int) -> int | None:
    """Bytes that this process may have on `cuda` or `cpu`, before it has any tensor there; None if nothing tells.

    processes: of the run, on this machine. On a CPU they share what is free, and each has its libraries already.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = free_memory()
    return None if free is None else free // processes + allocator.resident()


def run_of(config: TrainConfig, plan: BatchPlan, device: str, model: RWKV | None = None) -> Run:
    """What memory depends on, of a training run's settings and its data, and of this process: on a CPU it counts whole.

    model: what of it is in memory already, as adapters and quantised weights are, does not count as the process's.
    """
    settings, dataset = config.model, plan.dataset
    longest = config.data.ctx_len if plan.pack else min(config.data.ctx_len, int(dataset.widths.max()) + 1)
    tensors = [*model.parameters(), *model.buffers()] if model else []
    resident = allocator.resident() - sum(map(resident_bytes, tensors))
    return Run(
        longest,
        plan.micro_bsz,
        settings.quant,
        chunk_ctx=settings.chunk_ctx,
        precision=config.run.precision,
        device=device,
        accumulate=config.run.accumulate_grad_batches,
        document=max(int(dataset.lengths.mean() / dataset.members), 1) if plan.pack else 0,
        stage=zero_stage(config.run.strategy),
        ranks=plan.world_size,
        offload=offloads(config.run.strategy),
        resident=max(resident, 0) or RESIDENT,
        compiler="torch._dynamo" in sys.modules,
        keeps=allocator.heap() is not None,
        members=dataset.members,
    )


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
    free = "how much is free is unknown" if there is None else f"{_gb(there)} are free"
    sentence = f"{_gb(size)} needed, {free}: {_in_words(chosen, layers)} in backward (--grad_cp {choice}"
    if choice == "auto" and chosen != Recompute():
        sentence += f"; without that {_gb(bytes_for(Recompute()))}"
    sentence += ")"
    if there is None or size <= there:
        return Choice(chosen, sentence, True)
    if chosen.blocks < layers and bytes_for(EVERY_BLOCK) <= there:
        remedy = "--grad_cp auto would"
    else:
        remedy = _remedies(count, replace(run, recompute=EVERY_BLOCK), lambda run: needed(arch, count, run), there)
    return Choice(chosen, f"{sentence}. This may not fit: {remedy}", False)


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


def _remedies(count: Counted, run: Run, bytes_for: Callable[[Run], float], there: float) -> str:
    """What to type: each change that would be enough alone; where none is, all of them."""
    smaller = [replace(run, micro_bsz=rows) for rows in range(run.micro_bsz - 1, 0, -1)]
    smaller = [fitting for fitting in smaller if bytes_for(fitting) <= there] or smaller[-1:]
    changes = {f"--micro_bsz {changed.micro_bsz}": changed for changed in smaller[:1]}
    if run.length > CHUNK:
        changes[f"--chunk_ctx {CHUNK}"] = replace(run, chunk_ctx=CHUNK)
    if run.quant == "none" and count.projections:
        changes["--quant nf4"] = replace(run, quant="nf4")
    enough = [flag for flag, changed in changes.items() if bytes_for(changed) <= there]
    if enough:
        return f"{' or '.join(enough)} would"
    if count.adapter:
        less = "a smaller --bone_r or --lora_r"
    else:  # states have no size to choose
        less = "a smaller base model" if count.projections else "--peft bone instead of every weight"
    return f"try {', '.join([*changes, less])}"


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


class Agree(Callback):
    """Before the first step: all ranks compute again what the most cautious of them does.

    At ZeRO stage 3 their graphs must be equal, and on a CPU a rank that starts later finds less memory free.
    """

    def setup(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            most = torch.tensor([module.recompute.blocks, module.recompute.wkv], dtype=torch.int64, device=device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            blocks, wkv = most.tolist()
            module.recompute = Recompute(blocks, bool(wkv))
