"""What a run saves and when: adapters (or whole models), and the state to continue from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from rwkv_bone import checkpoints
from rwkv_bone.checkpoints.numbers import is_finite
from rwkv_bone.config import RunConfig
from rwkv_bone.data import Dataset
from rwkv_bone.data.fingerprint import data_fingerprint
from rwkv_bone.training import project, resume_file
from rwkv_bone.training.gather import gather
from rwkv_bone.training.log import StepLog
from rwkv_bone.training.module import RunStopped, TrainingModule
from rwkv_bone.training.resume import Saved

MOST_OF_THE_TIME = 0.02  # that saving states alone may take


@dataclass(frozen=True)
class Output:
    """Which parameters a file holds, under which keys and dtypes, and its metadata."""

    keys: tuple[str, ...]  # of the tensors, in the order of the file
    metadata: dict
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # key -> dtype in the file; missing: fp32, as trained

    def with_data(self, dataset: Dataset) -> Output:
        """The same, with the fingerprint of the training data in the metadata."""
        return replace(self, metadata=self.metadata | {"data": data_fingerprint(dataset)})


class SaveTrained(Callback):
    """Write adapters (or models): `rwkv-N.pth` every `epoch_save` epochs and at the end, and `rwkv-N-sS.pth` every
    `save_steps` steps. And the state of the run: with each of them, and alone every `save_minutes` minutes.

    N is `epoch_begin` plus the number of the epoch (0 is the first), S the optimiser step (1 is the first). A write
    that fails, or a value that is no finite number, stops the run on every rank, and replaces nothing.
    earlier: what this run continues; log: what has to be on the disk before a state says that its steps were taken;
    go_on: what to type to continue this run; clock: seconds, which only grow.
    """

    def __init__(
        self,
        output: Output,
        folder: Path,
        config: RunConfig,
        *,
        earlier: Saved | None,
        log: StepLog,
        go_on: str,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.output, self.folder, self.config, self.report = output, folder, config, report
        metadata = earlier.metadata if earlier else {}
        self._named = metadata.get("trained", "")  # the adapter that was saved with the state
        self.last_path = folder / self._named if self._named else None
        # The adapters of this run that are still there, the newest last. Nothing but names of ours is ever removed.
        named = metadata.get("adapters", [])
        self._adapters = [name for name in named if fnmatch(name, project.SAVED) and Path(name).name == name]
        self._state_step = earlier.step if earlier else 0
        self._adapter_step = self._state_step if self._named else 0
        self._go_on, self._log, self._clock = go_on, log, clock
        # A state that is damaged never takes the place of the one before it.
        self._rotate = earlier is not None and earlier.path.name == project.RESUME_FILE
        # A run that was killed may take a step again after which it had already saved.
        self._overwrite = earlier is not None
        self._last_time, self._seconds = clock(), 0.0  # when a state was last saved, and how long that took

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._last_time = self._clock()
        if trainer.is_global_zero:
            self._remove_older()  # what a kill has prevented

    def on_before_optimizer_step(
        self, trainer: Trainer, module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # The main process decides, since clocks differ.
        module.asks["save"] = int(trainer.is_global_zero and self._is_due())

    def _is_due(self) -> bool:
        minutes = self.config.save_minutes
        if not self.config.save_state or not minutes:
            return False
        return self._clock() - self._last_time >= max(60 * minutes, self._seconds / MOST_OF_THE_TIME)

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not module.window_finished():
            return
        assert module.window
        step, epoch, config = module.window.step, module.window.epoch, self.config
        ends = module.plan.ends_epoch(step - 1) and (epoch + 1) % config.epoch_save == 0
        if step == module.total_steps or ends:
            self._save(trainer, module, f"rwkv-{config.epoch_begin + epoch}.pth")
        elif config.save_steps and step % config.save_steps == 0:
            self.save_step(trainer, module)
        elif module.asked["save"]:
            self._save(trainer, module, None)

    def save_step(self, trainer: Trainer, module: TrainingModule) -> None:
        """Save adapter and state after the last finished step, unless that is done. Every rank must call it."""
        if module.window:
            name = f"rwkv-{self.config.epoch_begin + module.window.epoch}-s{module.window.step}.pth"
            self._save(trainer, module, name)

    def save_best(self, trainer: Trainer, module: TrainingModule, step: int, about: dict[str, Any]) -> None:
        """Save the parameters as `rwkv-best.pth`, which no --keep removes. Every rank must call it.

        step: the last that was taken; about: what the metadata says of the measurement.
        """
        metadata = {**self.output.metadata, "step": step, "threads": torch.get_num_threads(), **about}
        path = self.folder / project.BEST
        self._write_parameters(trainer, self._parameters(module), metadata, path, overwrite=True)

    def state_of_things(self) -> str:
        """What is saved and how to go on: for the user of a run that ends early."""
        step = max(self._adapter_step, self._state_step)
        if not step:
            return "nothing was saved yet (see --save_minutes and --save_steps)"
        newest = self.last_path if self.last_path and self._adapter_step == step else None
        said = f"the last step saved is {step}, in {newest or self.folder / project.RESUME_FILE}"
        if self._state_step and self.config.save_state:
            return f"{said}\ngo on with: {self._go_on}"
        return f"{said}; without a state (--save_state 0) only a new run can begin with it"

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.report(f"stopped at once; {self.state_of_things()}")
        # Gathering needs every rank, and RunStopped is the only exception that every rank raises.
        if isinstance(exception, SaveFailed) or not isinstance(exception, RunStopped) or module.window is None:
            return
        try:
            self.save_step(trainer, module)
        except SaveFailed as error:
            self.report(f"not saved {error}")
            return
        where = f"the parameters before the failed step, of step {self._adapter_step}, are in {self.last_path}"
        self.report(where if self.last_path else self.state_of_things())

    def _save(self, trainer: Trainer, module: TrainingModule, adapter: str | None) -> None:
        """Save an adapter of this name (None: no adapter), and then the state, each unless it is of this step already.

        Adapter and log are on the disk before the state that tells of them: wherever a run is cut off, and whatever a
        power cut takes of what was not synced, it goes on from this state or from the one before.
        """
        assert module.window
        step = module.window.step
        with_adapter = adapter is not None and step > self._adapter_step
        with_state = self.config.save_state and step > self._state_step
        if not with_adapter and not with_state:
            return
        parameters = self._parameters(module)
        metadata = {**self.output.metadata, "step": step, "threads": torch.get_num_threads()}
        if with_adapter:
            assert adapter
            self._write_adapter(trainer, parameters, metadata, self.folder / adapter)
        if with_state:
            self._write_state(trainer, module, parameters, metadata)
        if with_adapter and trainer.is_global_zero:
            self._remove_older()

    def _parameters(self, module: TrainingModule) -> dict[str, nn.Parameter]:
        parameters = dict(module.model.named_parameters())
        return {key: parameters[key] for key in self.output.keys}

    def _write_adapter(self, trainer: Trainer, parameters: dict[str, nn.Parameter], metadata: dict, path: Path) -> None:
        self._write_parameters(trainer, parameters, metadata, path, self._overwrite)
        self.last_path, self._adapter_step = path, metadata["step"]
        self._adapters = [name for name in self._adapters if name != path.name] + [path.name]

    def _write_parameters(
        self, trainer: Trainer, parameters: dict[str, nn.Parameter], metadata: dict, path: Path, overwrite: bool
    ) -> None:
        state, problem = gather(parameters.items(), keep=trainer.is_global_zero), None
        if trainer.is_global_zero:
            state = {key: tensor.to(self.output.dtypes.get(key, tensor.dtype)) for key, tensor in state.items()}
            if bad := [key for key, tensor in state.items() if not is_finite(tensor)]:
                problem = resume_file.diverged(bad)
            else:
                try:
                    checkpoints.write_state(path, state, metadata, overwrite=overwrite)
                except (OSError, ValueError, RuntimeError) as error:
                    problem = str(error) or type(error).__name__
        self._raise_if(trainer.strategy.broadcast(problem), metadata["step"])

    def _write_state(
        self, trainer: Trainer, module: TrainingModule, parameters: dict[str, nn.Parameter], metadata: dict
    ) -> None:
        main, begin = trainer.is_global_zero, self._clock()
        trained = self.last_path.name if self.last_path and self._adapter_step == metadata["step"] else ""
        metadata = metadata | {"trained": trained, "bad_steps": module.bad_steps}
        if self.config.keep:
            metadata["adapters"] = self._adapters
        problem = None
        if main:
            self._log.sync()
            try:
                checkpoints.sync_folder(self.folder)
            except OSError as error:
                problem = f"{self.folder} could not be synced: {error.strerror or error}"
        self._raise_if(trainer.strategy.broadcast(problem), metadata["step"])
        zero = trainer.model.optimizer
        problem = resume_file.write(self.folder, zero, parameters, metadata, keep=main, rotate=self._rotate)
        self._raise_if(trainer.strategy.broadcast(problem), metadata["step"])
        self._state_step, self._named, self._rotate = metadata["step"], metadata["trained"], True
        if main:
            with contextlib.suppress(OSError):  # beside a state it means nothing
                (self.folder / project.BEGUN).unlink(missing_ok=True)
        self._last_time = self._clock()
        self._seconds = self._last_time - begin

    def _raise_if(self, problem: str | None, step: int) -> None:
        if problem:
            raise SaveFailed(f"after step {step}: {problem}; {self.state_of_things()}")

    def _remove_older(self) -> None:
        """Remove adapters of this run but the newest --keep, and the one that was saved with the state."""
        older = self._adapters[: -self.config.keep] if self.config.keep else []
        for name in older:
            if name == self._named:
                continue
            self._adapters.remove(name)
            path = self.folder / name
            with project.spared(f"{path} stays, although --keep is {self.config.keep}", self.report):
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)


class SaveFailed(RunStopped):
    """The disk refused a file; nothing more can be saved there."""
