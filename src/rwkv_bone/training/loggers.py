"""`--report_to`: every step and measurement, also for TensorBoard, Weights & Biases, SwanLab and a CSV file.

Lightning's loggers know how to speak to these programs. What is done here is that they cost a run nothing: each works
in a thread of its own, and what fails there, or is not installed, is one line. A run that is continued is continued
there, too: no step is there twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.cluster.signs import waiting_outside
from rwkv_bone.config import RunConfig, TrainConfig
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.training.log import StepLog, sealed_lines
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.project import LOG, MEASUREMENTS, RUN_IDS, spared

PROJECT = "rwkv-bone"  # in Weights & Biases and SwanLab, where --wandb names none
# Any one of these will do.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "swanlab": ("swanlab",), "csv": ()}
WAIT = 15.0  # seconds that the end of a run waits for what is still to be sent
MOST = 50_000  # calls that may wait to be sent: more means that nothing is taken any more


@dataclass(frozen=True)
class Sent:
    """The last step and the last measurement that earlier processes of this run have logged, and so sent."""

    step: int = 0
    measured: int = -1

    @classmethod
    def read(cls, folder: Path) -> Sent:
        """From the files there, before a continued run takes away what it repeats."""
        steps, measured = (
            [line.get("step", 0) for line in sealed_lines(folder / name)] for name in (LOG, MEASUREMENTS)
        )
        return cls(max(steps, default=0), max(measured, default=-1))


class Sender:
    """Calls one of Lightning's loggers, which `make()` makes, in a thread: nobody waits for a disk or a server.

    What fails there is reported once, and nothing more is sent. where(logger): where to look at what was sent. sent:
    what is there already, of the steps that a continued run repeats. again: nothing of the earlier steps is there.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Logger],
        report: Callable[[str], None],
        *,
        where: Callable[[Any], str] = lambda logger: "",
        finish: Callable[[Any], None] = lambda logger: None,
        sent: Sent = Sent(),  # noqa: B008 # it is frozen
        again: bool = False,
    ):
        self.name, self.sent, self.again = name, sent, again
        self._make, self._report, self._where, self._finish = make, report, where, finish
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._failed = False
        # A daemon, so that a server that does not answer keeps no process.
        self._thread = threading.Thread(target=self._work, name=f"report_to {name}", daemon=True)

    def begin(self, hyper_parameters: dict[str, Any]) -> None:
        self._thread.start()
        self._calls.put(lambda logger: logger.log_hyperparams(hyper_parameters))

    def send(self, numbers: dict[str, float], step: int) -> None:
        """What was measured after `step`, to be sent after everything before."""
        if self._calls.qsize() > MOST:
            self._fail(f"warning: it takes nothing: nothing more is sent to {self.name}; the run goes on")
        if not self._failed:
            self._calls.put(lambda logger: logger.log_metrics(numbers, step))

    def end(self) -> None:
        """Nothing more will come."""
        self._calls.put(None)

    def wait(self, until: float) -> None:
        """Until the rest is sent, or the time `until` of the monotonic clock has come."""
        with waiting_outside():
            self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            self._fail(f"warning: {self.name} was too slow to take everything; the run ends without waiting longer")

    def _work(self) -> None:
        with spared(f"nothing more is sent to {self.name}; the run goes on", self._fail):
            logger = self._make()
            self._calls.get()(logger)  # the hyper-parameters
            if place := self._where(logger):
                self._report(f"report_to {self.name}: {place}")
            while (function := self._calls.get()) is not None and not self._failed:
                function(logger)
            self._finish(logger)

    def _fail(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            self._report(problem)


class SendEverything(Callback):
    """Each line of the log and each measurement to all senders, which only the main process has.

    first_step, sent: as of `make_senders`; measurements: those of earlier processes of this run.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        step_log: StepLog,
        *,
        first_step: int,
        sent: Sent,
        measurements: Sequence[dict] = (),
        report: Callable[[str], None] = print,
    ):
        self.config, self.step_log, self.senders = config, step_log, list[Sender]()
        self._make = partial(make_senders, config.run, folder, first_step, sent, report)
        self._measurements = list(measurements)
        self._last: dict = {}  # the last measurement

    def setup(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        # Before on_fit_start, in which a run measures that has no step left.
        self.senders = list(self._make()) if trainer.is_global_zero else []
        for sender in self.senders:
            sender.begin(hyper_parameters(self.config))
            for record in [*self._measurements, *self.step_log.records] if sender.again else ():
                sender.send(numbers_of(record), record["step"])

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.senders and module.window_finished():
            record = self.step_log.records[-1]
            self._send(record, lambda sent: sent.step)

    def measured(self, record: dict) -> None:
        """Listens to the measurements of held-out data."""
        # The end of a run may measure once more, with more: what is there already is not sent again.
        known = numbers_of(self._last) if self._last.get("step") == record["step"] else {}
        self._last = record
        self._send(record, lambda sent: sent.measured, without=known)

    def _send(self, record: dict, last: Callable[[Sent], int], without: Collection[str] = ()) -> None:
        numbers = {name: number for name, number in numbers_of(record).items() if name not in without}
        for sender in self.senders:
            if numbers and record["step"] > last(sender.sent):
                sender.send(numbers, record["step"])

    def teardown(self, trainer: Trainer, module: TrainingModule, stage: str) -> None:
        self.close(WAIT)

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        # Whoever has pressed Ctrl-C twice does not wait.
        self.close(0 if isinstance(exception, KeyboardInterrupt) else WAIT)

    def close(self, seconds: float) -> None:
        """Send the rest, for so many seconds at most."""
        until, senders, self.senders = time.monotonic() + seconds, self.senders, []
        for sender in senders:
            sender.end()
        for sender in senders:
            sender.wait(until)


def numbers_of(record: dict) -> dict[str, float]:
    """The numbers of a line of the log (`train/loss`) or of a measurement (`eval/heldout/loss`)."""
    if "sets" in record:
        found: dict[str, float | None] = {}
        for name, one in record["sets"].items():
            numbers = {what: one[what] for what in ("loss", "exact_match")} | one.get("preference", {})
            found |= {f"eval/{name}/{what}": value for what, value in numbers.items()}
    else:
        found = {f"train/{what}": value for what, value in record.items() if what != "step"}
    return {name: value for name, value in found.items() if value is not None}


def hyper_parameters(config: TrainConfig) -> dict[str, Any]:
    """{setting: value} of all sections; lists as the words of the command line."""
    return {
        name: " ".join(value) if isinstance(value, (tuple, list)) else value
        for section in asdict(config).values()
        for name, value in section.items()
    }


def _ids(folder: Path, first_step: int) -> dict[str, str]:
    """{program: id of the run there} of a run that is continued; a file that cannot be read has none."""
    try:
        found = json.loads((folder / RUN_IDS).read_text(encoding="utf-8")) if first_step else {}
    except (OSError, UnicodeDecodeError, *JSON_ERRORS):
        return {}
    return (
        {name: found[name] for name in SERVERS if isinstance(found.get(name), str)} if isinstance(found, dict) else {}
    )


def _keep_ids(folder: Path, ids: dict[str, str], report: Callable[[str], None]) -> None:
    with (
        spared("where this run is continued, it will be another run there", report),
        atomic_path(folder / RUN_IDS, overwrite=True) as temporary,
    ):
        temporary.write_text(json.dumps(ids) + "\n", encoding="utf-8")


def wanted(run: RunConfig) -> tuple[str, ...]:
    """The programs that a run reports to. `--wandb PROJECT` is one of them."""
    return tuple(dict.fromkeys([*run.report_to, *(["wandb"] if run.wandb else [])]))


@dataclass(frozen=True)
class Place:
    """Where a run reports to. first_step: that after which a continued run goes on; 0 of a new one."""

    project: str
    folder: Path
    id: str
    first_step: int


def _tensorboard(place: Place) -> Logger:
    # What an earlier process wrote of the steps that are repeated, or another run in this folder, is no longer shown.
    purge = place.first_step + 1 if place.first_step else 0
    return TensorBoardLogger(place.folder, "tensorboard", "", default_hp_metric=False, purge_step=purge)


def _csv(place: Place) -> Logger:
    return CSVLogger(place.folder, "csv", "", flush_logs_every_n_steps=20)


def _wandb(place: Place) -> Logger:
    import wandb

    # It would ask on the terminal for a key.
    settings = wandb.Settings(console="off", silent=True)
    if wandb.setup(settings).settings.mode not in ("offline", "disabled", "dryrun") and not wandb.login(prompt=False):
        raise UserError("no API key: wandb login, or WANDB_MODE=offline and later wandb sync")
    name = place.folder.absolute().name
    return WandbLogger(
        name=name, project=place.project, save_dir=place.folder, id=place.id, resume="allow", settings=settings
    )


def _swanlab(place: Place) -> Logger:
    import swanlab
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    # It writes several lines on each thing that it does, and on each that a network refuses.
    with contextlib.suppress(ImportError, AttributeError):
        from swanlab.sdk.internal.pkg.console import c

        c.quiet = True
    return SwanLabLogger(
        project=place.project,
        experiment_name=place.folder.absolute().name,
        log_dir=str(place.folder / "swanlab"),
        save_dir=place.folder,
        id=place.id,
        resume="allow",
        settings=swanlab.Settings(interactive=False),
    )


def _where(name: str, folder: Path, logger: Any) -> str:
    """Where to look at what is sent."""
    if name == "csv":
        return str(folder / "csv" / "metrics.csv")
    if name == "tensorboard":
        return f"look at it with: tensorboard --logdir {folder}"
    online = not logger.experiment.offline if name == "wandb" else logger.experiment.mode == "online"
    return logger.experiment.url if online else f"offline, in {folder / name}: `{name} sync` sends it"


MAKE: dict[str, Callable[[Place], Logger]]
MAKE = {"tensorboard": _tensorboard, "csv": _csv, "wandb": _wandb, "swanlab": _swanlab}


def _finish(logger: Any) -> None:
    logger.experiment.finish()


def _finalize(logger: Logger) -> None:
    logger.finalize("success")


SERVERS = ("wandb", "swanlab")  # where a run has an id


def make_senders(
    run: RunConfig, folder: Path, first_step: int, sent: Sent, report: Callable[[str], None]
) -> Iterator[Sender]:
    """One for each program that is wanted and installed.

    first_step: as of Place; sent: what earlier processes of this run have logged.
    """
    ids = _ids(folder, first_step)
    for name in wanted(run):
        if PACKAGES[name] and not any(map(importlib.util.find_spec, PACKAGES[name])):
            missing = f"not installed, so nothing is sent (pip install {PACKAGES[name][0]})"
            report(f"report_to {name}: {missing}; {folder / LOG} has everything")
            continue
        there = first_step > 0 and (name in ids if name in SERVERS else name != "csv" and (folder / name).is_dir())
        if name in SERVERS:
            ids.setdefault(name, secrets.token_hex(8))
            _keep_ids(folder, ids, report)
        place = Place(run.wandb or PROJECT, folder, ids.get(name, ""), first_step)
        yield Sender(
            name,
            partial(MAKE[name], place),
            report,
            where=partial(_where, name, folder),
            finish=_finish if name in SERVERS else _finalize,
            sent=sent if there and name in SERVERS else Sent(),
            again=first_step > 0 and not there,
        )
