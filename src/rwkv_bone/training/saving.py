"""What a run leaves on disk: adapters (or whole models), and the state to continue from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Callback

from rwkv_bone import checkpoints
from rwkv_bone.training import project, resume
from rwkv_bone.training.gather import gather
from rwkv_bone.training.module import RunStopped


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

    N is `epoch_begin` plus the number of the epoch (0 is the first), S the optimiser step (1 is the first). With each
    goes the state to continue from, of which only the newest is kept. A write that fails stops the run on every rank.
    `earlier` is the state that this run continues; `go_on` is what to type to continue this one.
    """

    def __init__(
        self,
        output: Output,
        folder: Path,
        *,
        epoch_begin: int,
        epoch_save: int,
        save_steps: int,
        earlier: resume.Saved | None,
        go_on: str,
        say,
    ):
        self.output, self.folder, self.say = output, folder, say
        self.epoch_begin, self.epoch_save, self.save_steps = epoch_begin, epoch_save, save_steps
        self.last_path = earlier and earlier.trained
        self._saved_step = earlier.step if earlier else 0
        # A run that was killed comes once more to a step after which it may have saved.
        self._overwrite = earlier is not None
        self._go_on = go_on

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if not module.window_finished():
            return
        step, epoch = module.window.step, module.window.epoch
        if step == module.total_steps or (module.plan.ends_epoch(step - 1) and (epoch + 1) % self.epoch_save == 0):
            self._save(trainer, module, f"rwkv-{self.epoch_begin + epoch}.pth")
        elif self.save_steps and step % self.save_steps == 0:
            self.save_step(trainer, module)

    def save_step(self, trainer, module) -> None:
        """Save what the last finished step left, unless it is saved. Every rank must call it."""
        if module.window and module.window.step > self._saved_step:
            self._save(trainer, module, f"rwkv-{self.epoch_begin + module.window.epoch}-s{module.window.step}.pth")

    def state_of_things(self) -> str:
        """What is saved and how to go on, for the user of a run that ends early."""
        if self.last_path is None:
            return "nothing was saved yet (see --save_steps)"
        return f"the last step saved is {self._saved_step}, in {self.last_path}\ngo on with: {self._go_on}"

    def on_exception(self, trainer, module, exception) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.say(f"stopped at once; {self.state_of_things()}")
        # Only this exception is raised on every rank, so only then can all take part in gathering.
        if isinstance(exception, SaveFailed) or not isinstance(exception, RunStopped) or module.window is None:
            return
        self.save_step(trainer, module)
        self.say(f"the parameters before the failed step, of step {self._saved_step}, are in {self.last_path}")

    def _save(self, trainer, module, name: str) -> None:
        """The adapter, then the state: a run that is killed between the two is continued from the state before."""
        parameters = dict(module.model.named_parameters())
        parameters = {key: parameters[key] for key in self.output.keys}
        state = gather(parameters.items(), keep=trainer.is_global_zero)
        metadata = {**self.output.metadata, "step": module.window.step}
        path, problem = self.folder / name, None
        if trainer.is_global_zero:
            state = {key: tensor.to(self.output.dtypes.get(key, tensor.dtype)) for key, tensor in state.items()}
            try:
                checkpoints.write_state(path, state, metadata, overwrite=self._overwrite)
            except (OSError, ValueError, RuntimeError) as error:
                problem = str(error)
            del state
        problem = trainer.strategy.broadcast(problem)
        if not problem:
            metadata["trained"] = name
            state_path, zero = self.folder / project.STATE, trainer.model.optimizer
            problem = resume.write(state_path, zero, parameters, metadata, keep=trainer.is_global_zero)
            problem = trainer.strategy.broadcast(problem)
        if problem:
            raise SaveFailed(f"after step {module.window.step}: {problem}")
        self.last_path, self._saved_step = path, module.window.step


class SaveFailed(RunStopped):
    """The disk refused a file; nothing more can be saved there."""
