"""The learning rate as a pure function of the optimiser step.

Steps are optimiser steps, 0 the first: neither the number of devices nor gradient accumulation changes the shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rwkv_bone.config import OptimConfig
from rwkv_bone.config.sections import AUTO
from rwkv_bone.errors import UserError

# Each goes from `start` at progress 0 to `end` at progress 1.
SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "cos": lambda start, end, progress: end + (start - end) * (1 + math.cos(math.pi * progress)) / 2,
    "exp": lambda start, end, progress: start * (end / start) ** progress,
    "linear": lambda start, end, progress: start + (end - start) * progress,
    "constant": lambda start, end, progress: start,
}


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimiser step `step` (0-based) in a run of `total_steps`.

    In warm-up the rate rises linearly over `warmup_steps` steps, and the last of these has lr_init. The last step of
    the run has exactly lr_final. Two cases keep lr_init to the end: `constant`, and a run of one step.
    """
    assert AUTO not in (config.lr_init, config.lr_final)
    if step + 1 < config.warmup_steps:
        return config.lr_init * (step + 1) / config.warmup_steps
    peak = max(config.warmup_steps, 1) - 1
    if step >= total_steps - 1 > peak:
        return config.lr_init if config.lr_schedule == "constant" else config.lr_final
    progress = (step - peak) / max(total_steps - 1 - peak, 1)
    return SHAPES[config.lr_schedule](config.lr_init, config.lr_final, progress)


def check_schedule(total_steps: int, config: OptimConfig) -> None:
    """Raise UserError if the warm-up leaves no step for the rest of the schedule."""
    if config.warmup_steps and config.warmup_steps >= total_steps:
        raise UserError(
            f"--warmup_steps {config.warmup_steps}: the whole run has {_steps(total_steps)}; "
            "choose fewer warm-up steps or more epochs"
        )


def _steps(count: int) -> str:
    return f"{count} optimiser step" + ("" if count == 1 else "s")
