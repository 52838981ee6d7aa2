"""What `train_hf.py` adds to `transformers.Trainer`: its lines, its checkpoints, and an end that saves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints.numbers import check_finite
from rwkv_bone.console import counted
from rwkv_bone.errors import Interrupted, UserError
from rwkv_bone.hf import saved
from rwkv_bone.hf.model import TRAINER_WEIGHTS
from rwkv_bone.signals import Listener

MAX_BAD_STEPS = 3


class Reporter(TrainerCallback):
    """Writes a line for each step that is logged, and keeps the frozen base out of DeepSpeed's checkpoints.

    measure(when) is called once before the first step.
    """

    trainer: Trainer | None = None  # set once it exists

    def __init__(self, report: Callable[[str], None], measure: Callable[[str], None]):
        self.report, self.measure = report, measure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.deepspeed:
            assert self.trainer is not None
            engine = self.trainer.model_wrapped
            engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if args.save_strategy == "steps" and args.save_steps > state.max_steps:
            self.report(f"warning: --save_steps {args.save_steps:g} saves the end alone: {_steps(state.max_steps)}")
        if args.logging_steps > state.max_steps:
            self.report(f"warning: --logging_steps {args.logging_steps:g} shows no step: {_steps(state.max_steps)}")
        # Not earlier: only now is the model on its device, and divided as ZeRO divides it.
        self.measure("before")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if "loss" in logs:
            loss, rate = float(logs["loss"]), float(logs["learning_rate"])
            self.report(f"step {state.global_step:>5} of {state.max_steps}  loss {loss:.4f}  lr {rate:.2e}")


class Checkpoints(TrainerCallback):
    """Completes each checkpoint that the trainer has written, and only then removes older ones: `limit` stay."""

    def __init__(self, limit: int):
        self.limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if args.world_size > 1:
            dist.barrier()  # every process has written its files
        if args.process_index == 0:
            output = Path(str(args.output_dir))
            path = output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            check_finite(checkpoints.read_state(path / TRAINER_WEIGHTS), path)
            saved.complete(path)
            saved.keep_newest(output, self.limit)


class SkipBadSteps(TrainerCallback):
    """A step whose gradient is not a finite number is not taken, and counted; more than MAX_BAD_STEPS end the run.

    DeepSpeed takes no such step by itself.
    """

    trainer: Trainer | None = None  # set once it exists

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self._bad, self._skipped = 0, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = kwargs["model"]
        assert isinstance(model, torch.nn.Module)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if args.deepspeed or not parameters:
            return
        norms = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None])
        if not norms.isfinite().all():
            self._skipped += 1
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.deepspeed:
            assert self.trainer is not None
            self._skipped = self.trainer.model_wrapped.skipped_steps
        if self._skipped == self._bad:
            return
        self._bad = self._skipped
        what = f"step {state.global_step}: the gradient is not a finite number; the step was not taken"
        if self._bad > MAX_BAD_STEPS:
            raise UserError(
                f"{what}. It is one more than the {MAX_BAD_STEPS} that a run may have. The newest checkpoint in "
                f"{args.output_dir} is of before. Look at the rows and at the base model; where training diverged, a "
                "lower --learning_rate in a new --output_dir helps, or --precision fp32"
            )
        self.report(f"warning: {what} ({self._bad} of {MAX_BAD_STEPS})")


class StopOnSignal(TrainerCallback):
    """After a signal the run finishes its step, saves a checkpoint and ends; `Listener` tells what a second one does.

    It must come after a callback that measures before the first step, during which a signal ends the run at once.
    """

    def __init__(self, output: Path) -> None:
        self._listener = Listener(lambda: f"the same command goes on from the newest checkpoint in {output}")
        self._received = 0  # by any process

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._listener.begin(args.process_index == 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._listener.stepping = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._received = self._listener.received
        if args.world_size > 1:
            # A checkpoint needs every process, so that all must end at the same step.
            asked = torch.tensor(self._received, device=args.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self._received = int(asked)
        if self._received:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._listener.end()
        if self._received:
            path = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            message = (
                f"stopped after step {state.global_step} of {state.max_steps}, which is saved in {path}\n"
                "the same command goes on"
            )
            raise Interrupted(message if args.process_index == 0 else "", self._received)


def _steps(count: int) -> str:
    return f"the whole run has {counted(count, 'optimiser step')}"
