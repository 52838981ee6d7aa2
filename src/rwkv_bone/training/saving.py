"""What a run saves: adapters (or whole models), and the file to continue from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rwkv_bone import checkpoints
from rwkv_bone.config import RunConfig
from rwkv_bone.console import counted
from rwkv_bone.data import Dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.training import project, resume_file
from rwkv_bone.training.gather import gather
from rwkv_bone.training.module import RunStopped, TrainingModule
from rwkv_bone.training.resume import Saved


@dataclass(frozen=True)
class Output:
    """Which parameters a file holds, under which keys and dtypes, and its metadata."""

    keys: tuple[str, ...]  # of the tensors, in the order of the file
    metadata: dict
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # key -> dtype in the file; missing: fp32, as trained

    def with_data(self, dataset: Dataset) -> Output:
        """The same, with the fingerprint of the training data in the metadata."""
        return replace(self, metadata=self.metadata | {"data": data_fingerprint(dataset)})


def unused_saves(run: RunConfig, total_steps: int) -> Iterator[str]:
    """A sentence on each setting that asks for saves which a run of so many steps never reaches."""
    if run.save_steps >= total_steps:
        yield f"--save_steps {run.save_steps} saves nothing: the whole run has {counted(total_steps, 'optimiser step')}"
    if run.epoch_save > run.epoch_count:
        yield f"--epoch_save {run.epoch_save} saves the end alone: the run has {counted(run.epoch_count, 'epoch')}"


class SaveTrained(Callback):
    """Write `rwkv-N.pth` every `epoch_save` epochs and at the end, and `rwkv-N-sS.pth` every `save_steps` steps.

    N is `epoch_begin` plus the number of the epoch (0 is the first), S the optimiser step (1 is the first). Each save
    also replaces the file to continue from. A write that fails stops the run on every rank.
    earlier: what this run continues; go_on: what to type to continue this run.
    """

    def __init__(
        self,
        output: Output,
        folder: Path,
        config: RunConfig,
        *,
        earlier: Saved | None,
        go_on: str,
        report: Callable[[str], None],
    ):
        self.output, self.folder, self.report = output, folder, report
        self.epoch_begin, self.epoch_save, self.save_steps = config.epoch_begin, config.epoch_save, config.save_steps
        self.last_path = earlier.trained if earlier else None
        self._saved_step = earlier.step if earlier else 0
        # A run that was killed may take a step again after which it had already saved.
        self._overwrite = earlier is not None
        self._go_on = go_on

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not module.window_finished():
            return
        assert module.window
        step, epoch = module.window.step, module.window.epoch
        if step == module.total_steps or (module.plan.ends_epoch(step - 1) and (epoch + 1) % self.epoch_save == 0):
            self._save(trainer, module, f"rwkv-{self.epoch_begin + epoch}.pth")
        elif self.save_steps and step % self.save_steps == 0:
            self.save_step(trainer, module)

    def save_step(self, trainer: Trainer, module: TrainingModule) -> None:
        """Save the parameters after the last finished step, unless that is done. Every rank must call it."""
        if module.window and module.window.step > self._saved_step:
            self._save(trainer, module, f"rwkv-{self.epoch_begin + module.window.epoch}-s{module.window.step}.pth")

    def state_of_things(self) -> str:
        """What is saved and how to go on: for the user of a run that ends early."""
        if self.last_path is None:
            return "nothing was saved yet (see --save_steps)"
        return f"the last step saved is {self._saved_step}, in {self.last_path}\ngo on with: {self._go_on}"

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.report(f"stopped at once; {self.state_of_things()}")
        # Gathering needs every rank, and RunStopped is the only exception that every rank raises.
        if isinstance(exception, SaveFailed) or not isinstance(exception, RunStopped) or module.window is None:
            return
        self.save_step(trainer, module)
        self.report(f"the parameters before the failed step, of step {self._saved_step}, are in {self.last_path}")

    def _save(self, trainer: Trainer, module: TrainingModule, name: str) -> None:
        """Save as `name`, and only then replace the resume file.

        A run that is killed between the two goes on from the resume file of the save before.
        """
        assert module.window
        parameters = dict(module.model.named_parameters())
        parameters = {key: parameters[key] for key in self.output.keys}
        state = gather(parameters.items(), keep=trainer.is_global_zero)
        metadata = {**self.output.metadata, "step": module.window.step, "threads": torch.get_num_threads()}
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
            metadata |= {"trained": name, "bad_steps": module.bad_steps}
            resume_path, zero = self.folder / project.RESUME_FILE, trainer.model.optimizer
            problem = resume_file.write(resume_path, zero, parameters, metadata, keep=trainer.is_global_zero)
            problem = trainer.strategy.broadcast(problem)
        if problem:
            raise SaveFailed(f"after step {module.window.step}: {problem}")
        self.last_path, self._saved_step = path, module.window.step


class SaveFailed(RunStopped):
    """The disk refused a file; nothing more can be saved there."""
