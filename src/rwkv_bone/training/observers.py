"""What shows a run to its user while it goes on, and in files: log, warnings, other programs, the bar, the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lightning.pytorch import Callback

from rwkv_bone.config import DataConfig, TrainConfig
from rwkv_bone.devices import describe_devices
from rwkv_bone.training import project
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.log import StepLog, read_log
from rwkv_bone.training.loggers import SendEverything, Sent
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.page import RenewPage, environment
from rwkv_bone.training.prepare import Prepared
from rwkv_bone.training.progress import ProgressLines
from rwkv_bone.training.summary import table
from rwkv_bone.training.warn import WarnOnce, kept_warnings


class Observers:
    """The callbacks that change nothing of a run, and hear of each step and measurement.

    data: settings with the model's tokenizer; device: `cuda` or `cpu`; continues: an earlier process has left files in
    `folder`, of which this one, the main process, reads those of the steps that it does not repeat; go_on: what to type
    to continue the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        data: DataConfig,
        module: TrainingModule,
        heldout: HeldOut | None,
        *,
        folder: Path,
        device: str,
        continues: bool,
        go_on: str,
        report: Callable[[str], None],
    ):
        first, arch = module.first_step, prepared.arch
        self.heldout, self.total_steps = heldout, module.total_steps
        sent = Sent.read(folder) if continues else Sent()
        steps, missing = read_log(folder / project.LOG, first) if continues else ([], "")
        if missing:
            report(f"resume    {missing}")
        self.log = StepLog(folder / project.LOG, steps, report)
        measured = heldout.records if heldout else []
        self.warn = WarnOnce(
            folder / project.WARNINGS,
            self.log,
            config,
            width=arch.n_embd,
            vocab_size=arch.vocab_size,
            kept=kept_warnings(folder / project.WARNINGS, first) if continues else (),
            measurements=measured,
            report=report,
        )
        send = SendEverything(
            config, folder, self.log, first_step=first, sent=sent, measurements=measured, report=report
        )
        bar = ProgressLines(self.log, measurements=measured)
        about = environment(device=describe_devices(device, module.plan.world_size), kernel=prepared.kernel)
        self.page = RenewPage(folder, data, arch.vocab_size, environment=about, go_on=go_on, report=report)
        # What watches comes after the log, whose last line it reads.
        self.callbacks: list[Callback] = [self.log, self.warn, send, bar]
        if heldout:
            heldout.listeners += [one.measured for one in (self.log, bar, self.warn, send, self.page)]

    def table(self) -> Iterator[str]:
        """The lines at the end of a run; none if no step was taken."""
        if self.log.records:
            measured = self.heldout.records if self.heldout else []
            yield from table(self.log.records, measured, self.warn.given, self.total_steps)
