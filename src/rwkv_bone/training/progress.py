"""How far a run has come, for the person who watches it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch import Callback, Trainer

from rwkv_bone.console import UNKNOWN_WIDTH, columns, progress_bar
from rwkv_bone.training.diagnosis import general_losses, main_losses
from rwkv_bone.training.log import StepLog
from rwkv_bone.training.measurements import added
from rwkv_bone.training.module import TrainingModule
from rwkv_bone.training.preference_diagnosis import held_out

if TYPE_CHECKING:
    from tqdm import tqdm

# From the most important to the least: a terminal shows as many as fit.
IMPORTANT = ("step", "loss", "left", "held-out", "accuracy", "best", "margin", "speed", "general", "epoch", "lr")
# From left to right.
SHOWN = ("step", "loss", "accuracy", "margin", "held-out", "best", "general", "left", "speed", "epoch", "lr")
BAR = 12  # columns of the shortest bar, with what is around it
SAME = 0.001  # relative change of a loss that is no trend


class ProgressLines(Callback):
    """A progress bar on a terminal, of what fits its width; elsewhere about twenty plain lines.

    measurements: those of earlier processes of this run, to which `measured` adds.
    """

    def __init__(self, step_log: StepLog, stream: TextIO | None = None, measurements: Sequence[dict] = ()):
        self.step_log, self.stream = step_log, stream or sys.stdout
        self._measurements = list(measurements)
        self._held_out = heldout_words(self._measurements)
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, module: TrainingModule) -> None:
        self._begin = time.perf_counter()
        if trainer.is_global_zero and self.stream.isatty():
            steps = {"total": module.total_steps, "initial": module.first_step}
            self._bar = progress_bar(layout="{desc}", stream=self.stream, delay=0, leave=True, **steps)

    def measured(self, record: dict) -> None:
        """Listens to the measurements of held-out data."""
        self._measurements = added(self._measurements, record)
        self._held_out = heldout_words(self._measurements)

    def on_train_batch_end(
        self, trainer: Trainer, module: TrainingModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if not (module.window_finished() and trainer.is_global_zero):
            return
        window = module.window
        assert window
        done, total, elapsed = window.step, module.total_steps, time.perf_counter() - self._begin
        ours = done - module.first_step
        if self._bar is None and not (done == total or ours == 1 or done % -(-total // 20) == 0):
            return
        # Averages over the last steps: the numbers of a single small batch jump too much to read.
        recent = self.step_log.records[-20:]
        losses = [r["loss"] for r in recent if r["loss"] is not None]
        answers = answer_words(recent)
        recent = recent[-ours:]
        speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
        words = {
            "step": f"step {done}/{total}",
            "epoch": f"epoch {window.epoch + 1}/{module.epochs}",
            "loss": f"loss {sum(losses) / len(losses):.4f}" if losses else "loss not finite",
            **answers,
            **self._held_out,
            "lr": f"lr {window.lr:.2e}",
            "speed": f"{speed:,.0f} tokens/s",
            "left": f"{clock(elapsed / ours * (total - done))} left",
        }
        if self._bar is not None and not self.stream.isatty():
            # The terminal is gone: what is said from now on goes to a file.
            self._bar.disable, self._bar = True, None
        if self._bar is None:
            order = ["step", "epoch", *(name for name in SHOWN[1:] if name not in ("left", "speed", "epoch", "lr"))]
            order += ["lr", "speed", "left"]
            print("  ".join(words[name] for name in order if name in words), file=self.stream, flush=True)
            return
        line, free = fitted(words, (columns(self.stream) or UNKNOWN_WIDTH) - 1)
        self._bar.bar_format = "{desc} [{bar}]" if free >= BAR else "{desc}"
        self._bar.set_description_str(line, refresh=False)
        self._bar.update()
        if done == total:
            self._close()

    def on_exception(self, trainer: Trainer, module: TrainingModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def fitted(words: dict[str, str], width: int) -> tuple[str, int]:
    """(the most important of the words that fit into `width` columns, in their order; the columns that stay free)."""
    chosen, free = set(), width + 2
    for name in IMPORTANT:
        if name in words and len(words[name]) + 2 <= free:
            chosen.add(name)
            free -= len(words[name]) + 2
        elif name in words:
            break  # a less important one in its place would come and go
    return "  ".join(words[name] for name in SHOWN if name in chosen), free


def answer_words(records: Sequence[dict]) -> dict[str, str]:
    """What a line shows of the answers in these steps of preference tuning: `accuracy 71%`, `margin 0.52`."""
    how = {"accuracy": ("reward_accuracy", "accuracy {:.0%}"), "margin": ("reward_margin", "margin {:.2f}")}
    words = {}
    for name, (figure, text) in how.items():
        values = [record[figure] for record in records if record.get(figure) is not None]
        if values:
            words[name] = text.format(sum(values) / len(values))
    return words


def heldout_words(measurements: Sequence[dict]) -> dict[str, str]:
    """What a line shows of them: `held-out 0.0123 v`, `best 0.0119 at 300`, `general 1.2404 ^`.

    v is lower than the measurement before, ^ higher, = within a thousandth. The best is named while it is an older one.
    Of pairs the share of them that are right follows: `held-out 0.5123 v, 71%`.
    """
    losses = main_losses(measurements)
    if not losses:
        return {}
    words = {"held-out": f"held-out {_with_trend([loss for _, loss in losses])}"}
    shares = held_out(measurements, "reward_accuracy")
    if shares:
        words["held-out"] += f", {shares[-1][1]:.0%}"
    after = [(loss, step) for step, loss in losses if step]
    if after and min(after)[1] != losses[-1][0]:
        words["best"] = "best {:.4f} at {}".format(*min(after))
    if general := general_losses(measurements):
        words["general"] = f"general {_with_trend([loss for _, loss in general])}"
    return words


def _with_trend(losses: Sequence[float]) -> str:
    *_, before, now = [losses[0], *losses]
    if len(losses) == 1:
        return f"{now:.4f}"
    same = abs(now - before) <= SAME * before
    return f"{now:.4f} {'=' if same else 'v' if now < before else '^'}"


def clock(seconds: float) -> str:
    """3725 -> `1:02:05`, 65 -> `1:05`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_text(seconds: float) -> str:
    """`0.084 s`, `2.1 s`, `12 s`, and from two minutes on as a clock."""
    if seconds >= 120:
        return clock(seconds)
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.3g} s"
