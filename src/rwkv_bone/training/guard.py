"""Before the first step: a run that can never fit is refused, and one that may not fit now is told what to change.

Refused is only what is certain. The estimate is taken to be a tenth too large, memory is all that the device has (on a
CPU with swap), and weights that stay mapped on a CPU count as nothing, since the system may drop their pages. Where
the system does not tell how much there is, nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rwkv_bone.config import TrainConfig
from rwkv_bone.devices import total_memory
from rwkv_bone.errors import UserError
from rwkv_bone.models import EVERY_BLOCK, NOTHING
from rwkv_bone.training.memory import Run, count
from rwkv_bone.training.out_of_memory import Plan, advice, size_text
from rwkv_bone.training.prepare import Prepared
from rwkv_bone.training.strategy import offloads, zero_stage

ERROR = 0.1  # of the estimate


def memory_in_all(device: str, processes: int) -> int | None:
    """Bytes that this process could have of `cuda` or `cpu` with nothing else there; None if nothing tells.

    processes: of the run, on this machine. On a CPU they share what is there.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    total = total_memory()
    return None if total is None else total // processes


def check(plan: Plan, total: float | None) -> None:
    """UserError if the run needs more than the `total` memory of its device (None: unknown)."""
    run = plan.run
    mapped = run.device == "cpu" and run.quant == "none" and run.stage < 3 and plan.config.model.load_model
    certain = plan.parts.total * (1 - ERROR) - (plan.parts.weights if mapped else 0)
    if total is None or certain <= total:
        return
    device = "the GPU has" if run.device == "cuda" else "this machine has, swap included,"
    each = f" for each of {run.ranks} processes" if run.ranks > 1 and run.device == "cpu" else ""
    first = f"this run cannot fit: it needs {size_text(plan.parts.total)}, and {device} {size_text(total)}{each}"
    raise UserError("\n  ".join([first, *advice(plan)]))


def warnings(plan: Plan) -> Iterator[str]:
    """Of a run that needs more than is free: what to lower, with figures, a line each."""
    if plan.there is not None and plan.size > plan.there:
        yield from advice(plan)


def check_new_model(config: TrainConfig, outline: Prepared, device: str, total: float | None) -> None:
    """`check` before a model from scratch gets its memory, and before there is data: as if a step had one token.

    outline: of `prepare_model` with `empty`.
    """
    run = Run(
        1,
        recompute=EVERY_BLOCK if config.model.grad_cp in ("auto", "1") else NOTHING,
        precision=config.run.precision,
        device=device,
        stage=zero_stage(config.run.strategy),
        ranks=config.run.devices * config.run.num_nodes,
        offload=offloads(config.run.strategy),
    )
    check(Plan(config, outline.arch, count(outline.model), run, total), total)
