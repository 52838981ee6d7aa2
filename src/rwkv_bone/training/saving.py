"""What a run leaves on disk: adapters (or whole models), gathered from all ranks and written by one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from rwkv_bone import checkpoint
from rwkv_bone.training.module import RunStopped


def gather(parameters: Iterable[tuple[str, nn.Parameter]], keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU of named parameters, whatever the ZeRO stage. Every rank must call it, in the same order.

    One parameter at a time, so that stage 3 never holds more than one whole; `keep` = this rank wants the result.
    """
    state = {}
    for name, parameter in parameters:
        with _whole(parameter):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def _whole(parameter: nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


@dataclass(frozen=True)
class Output:
    """How trained parameters become a file.

    keys: what the file holds, in its order; dtypes: what a key is cast to (missing = as trained, fp32).
    """

    keys: tuple[str, ...]
    metadata: dict
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


class SaveTrained(Callback):
    """Write `proj_dir/rwkv-N.pth` every so many epochs and at the end, `rwkv-N-sS.pth` every so many steps.

    N is `epoch_begin` plus the number of the epoch (0 is the first), S the optimiser step (1 is the first). A write
    that fails stops the run on every rank.
    """

    def __init__(self, output: Output, folder: Path, *, epoch_begin: int, epoch_save: int, save_steps: int, say):
        self.output, self.folder, self.say = output, folder, say
        self.epoch_begin, self.epoch_save, self.save_steps = epoch_begin, epoch_save, save_steps
        self.last_path: Path | None = None
        self._saved_step = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not module.window_finished():
            return
        step, epoch = module.window.step, module.window.epoch
        ends_epoch = step % module.plan.steps_per_epoch == 0
        if step == module.total_steps or (ends_epoch and (epoch + 1) % self.epoch_save == 0):
            self._save(trainer, module, f"rwkv-{self.epoch_begin + epoch}.pth")
        elif self.save_steps and step % self.save_steps == 0:
            self._save(trainer, module, f"rwkv-{self.epoch_begin + epoch}-s{step}.pth")

    def on_exception(self, trainer, module, exception) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.say(f"stopped by the keyboard; last saved: {self.last_path or 'nothing yet (see --save_steps)'}")
        # Only this exception is raised on every rank, so only then can all take part in gathering.
        if isinstance(exception, SaveFailed) or not isinstance(exception, RunStopped) or module.window is None:
            return
        if module.window.step > self._saved_step:
            epoch, step = module.window.epoch, module.window.step
            self._save(trainer, module, f"rwkv-{self.epoch_begin + epoch}-s{step}.pth")
        self.say(f"the parameters before the failed step, of step {self._saved_step}, are in {self.last_path}")

    def _save(self, trainer, module, name: str) -> None:
        parameters = dict(module.model.named_parameters())
        state = gather(((key, parameters[key]) for key in self.output.keys), keep=trainer.is_global_zero)
        path, problem = self.folder / name, None
        if trainer.is_global_zero:
            state = {key: tensor.to(self.output.dtypes.get(key, tensor.dtype)) for key, tensor in state.items()}
            metadata = {**self.output.metadata, "step": module.window.step}
            try:
                checkpoint.write_state(path, state, metadata, overwrite=False)
            except (OSError, ValueError, RuntimeError) as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise SaveFailed(f"after step {module.window.step}: {problem}")
        self.last_path, self._saved_step = path, module.window.step


class SaveFailed(RunStopped):
    """The disk refused a file; nothing more can be saved there."""
