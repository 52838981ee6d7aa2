"""A results folder as it was found: what its files hold, and what of them is missing or damaged."""

from __future__ import annotations

import contextlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_bone.config.checksum import KEY, is_intact
from rwkv_bone.config.fields import is_number
from rwkv_bone.console import counted
from rwkv_bone.errors import JSON_ERRORS

CONFIG, LOG, MEASUREMENTS, SAMPLES = "config.json", "train_log.jsonl", "measurements.jsonl", "samples.jsonl"
WARNINGS, EVALUATION, PREVIEW = "warnings.jsonl", "evaluation.json", "preview.json"
NEEDED = ("step", "loss", "lr", "tokens", "trained_tokens", "grad_norm", "seconds")  # in every line of the log
OPTIONAL = ("tokens_per_s", "peak_memory_mb", "peak_reserved_mb")
# What a run with --task dpo, orpo, simpo or kto logs of its answers, and measures of held-out ones.
REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
FIGURES = (*REWARDS, "logp_chosen", "logp_rejected", "nll", "kl")
DIVERGENCE = "divergence"  # measured alone
GAP = "gap"  # logp_chosen - logp_rejected, which means the same in every task
UNITS = "units"  # logged alone: pairs, or answers of kto, of a step
RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"  # states of a run, in preview.json


@dataclass(frozen=True)
class Measured:
    """The loss of one set at one step, and the share of exact answers if it was counted.

    The loss is in nats per trained token; of answers that are compared it is the mean loss of the task, and `figures`
    has what of FIGURES and DIVERGENCE is a number.
    """

    loss: float
    tokens: int
    exact: float | None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    step: int
    sets: dict[str, Measured]  # the main set first


@dataclass(frozen=True)
class Answer:
    step: int
    of: str  # the name of the set
    prompt: str
    expected: str | None
    text: str

    @property
    def right(self) -> bool:
        return self.text == self.expected


@dataclass
class Run:
    """What the files of a results folder hold. problems: a line for each file that lacks something."""

    folder: Path
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # of the log, float64 [steps]; nan for null
    measurements: list[Measurement] = field(default_factory=list)
    main: str = ""  # the set that says what was learnt; empty: none was measured
    general: str = ""  # the set that says what was forgotten; empty: none was measured
    # Of the whole main set, with its step; while training a part of it may be measured. Keys: before, after.
    whole: dict[str, tuple[int, Measured]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    data: str = ""  # fingerprint of the held-out data
    preview: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def setting(self, name: str, otherwise: Any = "") -> Any:
        """A setting of config.json; `otherwise` if it is not there, or of another type."""
        found = next((values[name] for values in self.config.values() if name in values), otherwise)
        return found if type(found) is type(otherwise) else otherwise

    @property
    def task(self) -> str:
        """What rows taught: sft, dpo, orpo, simpo or kto."""
        return self.setting("task", "sft")

    @property
    def compares(self) -> bool:
        """Whether answers were compared, so that there may be FIGURES."""
        return self.task != "sft" or UNITS in self.columns

    @property
    def unit(self) -> str:
        """What the loss is a mean of."""
        return "answer" if self.task == "kto" else "pair"

    @property
    def sets(self) -> list[str]:
        """Names of everything that was measured."""
        return list(dict.fromkeys(name for one in self.measurements for name in one.sets))

    def figures(self, name: str) -> list[tuple[int, float]]:
        """(step, number) of one of FIGURES, DIVERGENCE or GAP in the main set's measurements that have it."""
        found = [(one.step, one.sets[self.main].figures) for one in self.measurements if self.main in one.sets]
        return [(step, figures[name]) for step, figures in found if name in figures]

    def ends(self, name: str) -> list[tuple[int, float]]:
        """The first and the newest of `figures`, of the whole main set where that was measured; one alone, or none."""
        measured = self.figures(name)
        whole = {when: (step, one.figures[name]) for when, (step, one) in self.whole.items() if name in one.figures}
        first = whole.get("before") or (measured[0] if measured else None)
        last = whole.get("after")
        if not last or (measured and measured[-1][0] > last[0]):
            last = measured[-1] if measured else None
        return [point for point in dict.fromkeys((first, last)) if point is not None]

    def column(self, name: str) -> np.ndarray:
        """A column of the log, or GAP, float64 [steps] with nan for null; of no length where the log has none."""
        if name == GAP and "logp_chosen" in self.columns:
            return self.columns["logp_chosen"] - self.columns["logp_rejected"]
        return self.columns.get(name, np.zeros(0))

    @property
    def steps(self) -> np.ndarray:
        return self.columns.get("step", np.zeros(0))

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def total_steps(self) -> int | None:
        total = self.preview.get("total_steps")
        return total if type(total) is int else None

    @property
    def state(self) -> str:
        return str(self.preview.get("state", ""))

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) of a set's measurements, in order of steps, but of those that are no finite number."""
        losses = [(one.step, one.sets[name].loss) for one in self.measurements if name in one.sets]
        return [(step, loss) for step, loss in losses if math.isfinite(loss)]

    def first(self) -> tuple[int, float] | None:
        """(step, loss) of the main set before training, of all of it if that was measured."""
        losses = self.losses(self.main)
        return self._whole("before") or (losses[0] if losses else None)

    def last(self) -> tuple[int, float] | None:
        """(step, loss) of the main set at its newest measurement after the first, of all of it if that was measured."""
        losses, whole = self.losses(self.main)[1:], self._whole("after")
        return whole if whole and not (losses and losses[-1][0] > whole[0]) else (losses[-1] if losses else None)

    def _whole(self, when: str) -> tuple[int, float] | None:
        step, measured = self.whole.get(when, (0, None))
        return (step, measured.loss) if measured and math.isfinite(measured.loss) else None

    def share_measured(self) -> float:
        """The share of the main set's tokens that is measured while training."""
        tokens = [one.sets[self.main].tokens for one in self.measurements if self.main in one.sets]
        whole = [measured.tokens for _, measured in self.whole.values()]
        return min(tokens[-1] / whole[-1], 1.0) if tokens and whole and whole[-1] else 1.0

    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest held-out loss after training began."""
        after = [(loss, step) for step, loss in self.losses(self.main) if step > 0]
        return (min(after)[1], min(after)[0]) if after else None

    def forgotten(self) -> float | None:
        """How much the loss of general text has risen from the first measurement to the last."""
        losses = self.losses(self.general)
        return losses[-1][1] - losses[0][1] if len(losses) > 1 else None


def holds_run(folder: Path) -> bool:
    """Whether a folder looks like a results folder."""
    return (folder / LOG).is_file() or (folder / CONFIG).is_file()


def changed(folder: Path) -> float:
    """When a line was last added to the log, in seconds since 1970; now, if there is none."""
    try:
        return (folder / LOG).stat().st_mtime
    except OSError:
        return time.time()


def read(folder: Path) -> Run:
    """What is in a results folder. Nothing there is trusted, and nothing that is wrong with it raises an error."""
    run = Run(folder)
    config = _document(run, CONFIG, "the settings are not known")
    run.config = {name: values for name, values in config.items() if isinstance(values, dict)}
    unknown = "a sample of the data, the environment and the run's state are not known"
    run.preview = _document(run, PREVIEW, unknown, by_hand=False)
    _read_log(run)
    asked = [values.get(name) for values in run.config.values() for name in ("eval_data", "eval_split")]
    measures = not run.config or any(asked)
    evaluation = _document(run, EVALUATION, "" if run.state != DONE or not measures else "its answers are not known")
    run.data = str(evaluation.get("data", ""))
    _read_measurements(run, measures)
    _take_evaluation(run, evaluation)
    run.warnings = list(_lines(run, WARNINGS, _warning, ""))
    return run


def _read_log(run: Run) -> None:
    rows: dict[int, tuple[float, ...]] = {}
    for row in _lines(run, LOG, _step, "there are no curves"):
        rows[int(row[0])] = row
    if rows:
        widest = max(map(len, rows.values()))
        names = (*NEEDED, *OPTIONAL, UNITS, *FIGURES)[:widest]
        padded = [row + (math.nan,) * (widest - len(row)) for _, row in sorted(rows.items())]
        run.columns = dict(zip(names, np.array(padded, dtype=np.float64).T, strict=True))
        missing = run.last_step - len(rows)
        if missing > 0:
            run.problems.append(f"{LOG} lacks {counted(missing, 'step')} of {run.last_step:,}: so do the curves")


def _step(record: dict) -> tuple[float, ...]:
    found = [record[name] for name in NEEDED] + [record.get(name) for name in OPTIONAL]
    if UNITS in record:
        found += [record[UNITS], *(record.get(name) for name in FIGURES)]
    numbers = [math.nan if value is None else value for value in found]
    # Of a hundred thousand steps every microsecond counts here.
    if not {*map(type, numbers)} <= {int, float} or type(record["step"]) is not int or record["step"] < 1:
        raise TypeError("no step")
    return tuple(map(float, numbers))


def _float(value: Any) -> float:
    if value is None:
        return math.nan
    if not is_number(value):
        raise TypeError("no number")
    return float(value)


def _read_measurements(run: Run, measures: bool) -> None:
    found: dict[int, Measurement] = {}
    roles: list[tuple[str, str]] = []
    expected = "there is no held-out loss while training" if measures else ""
    for one, main, general in _lines(run, MEASUREMENTS, _measurement, expected):
        found[one.step] = one
        roles.append((main, general))
    run.measurements = [found[step] for step in sorted(found)]
    if roles:
        run.main, run.general = roles[-1]
        answers = {(one.of, one.prompt, one.step): one for one in _lines(run, SAMPLES, _answer, "")}
        run.answers = list(answers.values())


def _measurement(record: dict) -> tuple[Measurement, str, str]:
    sets = {str(name): _measured(values) for name, values in record["sets"].items()}
    main, general = record["main"], record.get("general") or ""
    if main not in sets or (general and general not in sets) or type(record["step"]) is not int:
        raise ValueError("a set without its numbers")
    return Measurement(record["step"], sets), main, general


def _measured(values: dict) -> Measured:
    # A loss that is no finite number is written as null.
    exact = values.get("exact_match")
    figures = values.get("preference") or {}
    known = {name: _float(figures[name]) for name in (*FIGURES, DIVERGENCE) if figures.get(name) is not None}
    if {"logp_chosen", "logp_rejected"} <= known.keys():
        known[GAP] = known["logp_chosen"] - known["logp_rejected"]
    tokens = int(_float(values["tokens"]))
    return Measured(_float(values["loss"]), tokens, None if exact is None else _float(exact), known)


def _answer(record: dict) -> Answer:
    expected = record.get("expected")
    texts = [record["set"], record["prompt"], record["text"], *([] if expected is None else [expected])]
    if type(record["step"]) is not int or not all(isinstance(words, str) for words in texts):
        raise TypeError("no answer")
    return Answer(record["step"], record["set"], record["prompt"], expected, record["text"])


def _warning(record: dict) -> dict[str, Any]:
    return {name: str(record[name]) for name in ("warning", "remedy")} | {"step": int(_float(record["step"]))}


def _take_evaluation(run: Run, evaluation: dict) -> None:
    """The measurements before and after training, with their answers where there are no others."""
    alone, answered = not run.measurements, bool(run.answers)
    for when in ("before", "after"):
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            one = evaluation[when]
            step, measured = int(one["step"]), _measured(one)
            answers = [
                Answer(step, "heldout", str(a["prompt"]), str(a["expected"]), str(a["got"])) for a in one["answers"]
            ]
            run.whole[when] = step, measured
            run.answers += [] if answered else answers
            if alone:
                run.measurements.append(Measurement(step, {"heldout": measured}))
                run.main = "heldout"


def _document(run: Run, name: str, without: str, by_hand: bool = True) -> dict[str, Any]:
    """The object in a JSON file. without: what its lack means; empty: it may be missing. by_hand: may be changed so."""
    try:
        content = json.loads((run.folder / name).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        if without:
            run.problems.append(f"{name} is missing: {without}")
        return {}
    except (OSError, *JSON_ERRORS):
        run.problems.append(f"{name} cannot be read" + (f": {without}" if without else ""))
        return {}
    if not is_intact(content, content if by_hand else ()):
        shown = "it is shown as it is" if by_hand else without
        run.problems.append(f"{name} was changed after the run wrote it, or is damaged: {shown}")
        content = content if by_hand else {}
    content.pop(KEY, None)
    return content


def _lines(run: Run, name: str, make: Callable[[dict], Any], without: str) -> Iterator[Any]:
    """What `make` makes of each line of a JSON lines file; damaged lines are counted, and left out."""
    try:
        content = (run.folder / name).read_bytes()
    except FileNotFoundError:
        if without:
            run.problems.append(f"{name} is missing: {without}")
        return
    except OSError as error:
        run.problems.append(f"{name} cannot be read ({error.strerror})" + (f": {without}" if without else ""))
        return
    damaged, lines = 0, content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield make(_record(line))
        except (LookupError, TypeError, AttributeError, OverflowError, *JSON_ERRORS):
            # The last line of a file that is being written may not be whole yet.
            damaged += number < len(lines)
    if damaged:
        whole = sum(bool(line.strip()) for line in lines)
        run.problems.append(f"{name}: {damaged:,} of {counted(whole, 'line')} damaged, and left out here")


def _record(line: bytes) -> dict[str, Any]:
    """The object of a line; ValueError if its checksum is not that of its content."""
    record = json.loads(line.decode())
    if not isinstance(record, dict):
        raise ValueError("no object")
    if KEY in record:
        # The checksum is of the text without it. Only where somebody has written it anew, that text is made again.
        begin, _, _ = line.rpartition(b', "' + KEY.encode() + b'"')
        if f"{zlib.crc32(begin + b'}'):08x}" != record[KEY] and not is_intact(record, ()):
            raise ValueError("another checksum")
        del record[KEY]
    return record
