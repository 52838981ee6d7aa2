"""Lightning's part of a run: which device this is, the trainer, and how processes end together."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from rwkv_bone.cluster.world import World
from rwkv_bone.config import TrainConfig
from rwkv_bone.devices import select_device
from rwkv_bone.errors import UserError
from rwkv_bone.training.launchers import card_of, read_no_checkpoints
from rwkv_bone.training.loop import use_step_loop
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.strategy import leave_process_group, make_strategy


def choose_device(accelerator: str, world: World) -> str:
    """`cuda` or `cpu`, as `--accelerator` says; UserError if that is not there."""
    device = select_device(accelerator)
    if device == "cuda":
        # Lightning chooses the same GPU, but later: weights are quantised before there is a trainer.
        torch.cuda.set_device(card_of(world))
    return device


def settle_threads(devices: int) -> int:
    """Threads of this process for work on the CPU, which from now on do not change: OMP_NUM_THREADS, or all cores
    divided among the processes.

    Lightning sets the same number, but later: what is computed before would depend on another.
    """
    _set_num_threads_if_needed(devices)
    return torch.get_num_threads()


class NoProfiler(PassThroughProfiler):
    """Lightning asks its profiler a hundred times in each step, before and after everything; this one does nothing."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> nullcontext[None]:
        return self._nothing


def make_trainer(
    config: TrainConfig,
    device: str,
    trainable: int,
    callbacks: Sequence[Callback],
    world: World,
) -> Trainer:
    """Lightning's trainer on `cuda` or `cpu`, for this many trained parameters."""
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        # Of this process: srun may show it a single card.
        devices=min(config.run.devices, torch.cuda.device_count()) if device == "cuda" else config.run.devices,
        num_nodes=config.run.num_nodes,
        strategy=make_strategy(config.run, device, trainable, world),
        max_epochs=1,  # TrainingModule's loader holds the batches of all our epochs
        accumulate_grad_batches=config.run.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip or None,  # passed on to DeepSpeed, which does the clipping
        logger=False,
        profiler=NoProfiler(),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    use_step_loop(trainer)
    leave_signals_alone(trainer)
    read_no_checkpoints(trainer)
    return trainer


def leave_signals_alone(trainer: Trainer) -> None:
    """Have Lightning hear no signal. It goes on giving back the handlers of before, at the end."""
    connector = trainer._signal_connector

    def remember() -> None:
        connector._original_handlers = connector._get_current_signal_handlers()

    connector.register_signal_handlers = remember


def run_steps(
    trainer: Trainer, module: TrainingModule, explain: Callable[[Exception], UserError | None] = lambda error: None
) -> None:
    """Take all optimiser steps.

    explain: what is to be raised instead of an error, if it knows better; see out_of_memory.py.
    """
    try:
        trainer.fit(module)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None  # in whose place Lightning ends the process with status 1
        raise
    except Exception as error:
        if better := explain(error):
            raise better from error
        raise
    finally:
        module.close()
    if trainer.strategy.root_device.type == "cuda":
        # Otherwise NCCL warns in the last line of a run that went well. After a failure the other ranks may be gone.
        atexit.register(leave_process_group)
