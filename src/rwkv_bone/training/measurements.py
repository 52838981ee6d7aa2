"""What is measured in a run, in `measurements.jsonl`, and the answers to the sample prompts, in `samples.jsonl`.

One JSON object a line, with a checksum as in `train_log.jsonl`. A line that is damaged is as good as missing.

| field of a measurement | |
|---|---|
| step | optimiser steps taken before it; 0: the base model |
| seconds | that it took, on the main process |
| sets | {name: set}, the main one first, the general text last |
| main, general | the names of these two; general is null if there is none |
| best | whether the main set's loss is the lowest so far of a trained model, so that `rwkv-best.pth` is of this step |
| every | optimiser steps between measurements, once that is decided; 0: none while training |
| data | {name: hash of the set's data}, by which a continued run knows what it may compare |
| costs | {"loss", "exact_match", "samples"}: seconds of each |

| field of a set | |
|---|---|
| loss | nats per trained token, of preference data the task's loss of a pair or answer; null if not finite |
| tokens, samples | the trained tokens and samples that were measured |
| exact_match, prompts | the share of answers that are right, and their number; null and 0 where it was not measured |
| preference | only of preference data: {figure: number, or null where there is none}; see below |

The figures are FIGURES of preferences/objective.py and `divergence`, KL(the model, what it was when the run began) in
nats per token of the chosen answers. A sample has step, set, prompt, expected (null if nothing is) and text, the
model's greedy answer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config.checksum import KEY, is_intact, sealed
from rwkv_bone.config.fields import is_number
from rwkv_bone.errors import JSON_ERRORS
from rwkv_bone.preferences.objective import FIGURES
from rwkv_bone.training import project

RECORD = {
    "step": int, "seconds": float, "sets": dict, "main": str, "general": str | None, "best": bool,
    "every": int | None, "data": dict, "costs": dict,
}  # fmt: skip
SAMPLE = {"step": int, "set": str, "prompt": str, "expected": str | None, "text": str}


class Lines:
    """A file of records, one a line, that grows as the run goes on. A failure to write it is told, and spares the run.

    kept: what the file begins with, of an earlier process. Only the main process may write.
    """

    def __init__(self, path: Path, kept: Sequence[dict], report: Callable[[str], None]):
        self.path, self.records, self._report = path, list(kept), report
        self._whole = False  # whether the file holds all but what is added next
        self._told = False  # that it could not be written

    def begin(self) -> None:
        """Write what is kept, and nothing else."""
        if self.records or self.path.exists():
            self._write()

    def add(self, records: Sequence[dict]) -> None:
        """Add records, all of one step. Those of that step that are there, measured before, are replaced."""
        if not records:
            return
        before = [record for record in self.records if record["step"] != records[0]["step"]]
        replaces = len(before) < len(self.records)
        self.records = [*before, *records]
        self._write(() if replaces else records)

    def _write(self, new: Sequence[dict] = ()) -> None:
        """Append the `new` ones if the file holds all others; else write it whole."""
        whole, self._whole = self._whole, False
        with project.spared(f"the run goes on, and {self.path} lacks lines", self._report_once):
            if new and whole:
                with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write("".join(map(_line, new)))
                    file.flush()
                    os.fsync(file.fileno())
            else:
                with atomic_path(self.path, overwrite=True) as temporary:
                    text = "".join(map(_line, self.records))
                    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            self._whole = True

    def _report_once(self, problem: str) -> None:
        if not self._told:
            self._report(problem)
        self._told = True


def added(records: Sequence[dict], record: dict) -> list[dict]:
    """The records with one more, which replaces one of the same step: the end of a run may measure once more."""
    return [*(one for one in records if one["step"] != record["step"]), record]


def _line(record: dict) -> str:
    return json.dumps(sealed(record), ensure_ascii=False) + "\n"


def read_lines(path: Path, fields: dict[str, Any], last_step: int) -> list[dict]:
    """The records of a file whose step is at most `last_step`, without their checksums; none if there is no file.

    fields: {name: type}, RECORD or SAMPLE. A line without one of them, or that is damaged, is left out.
    """
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line, fields)
            if record is not None and 0 <= record["step"] <= last_step:
                found.append(record)
    return found


def read_kept(folder: Path, last_step: int) -> tuple[list[dict], list[dict]]:
    """(measurements, answers to sample prompts) in a results folder whose step is at most `last_step`."""
    files = ((project.MEASUREMENTS, RECORD), (project.SAMPLES, SAMPLE))
    measurements, samples = (read_lines(folder / name, fields, last_step) for name, fields in files)
    return measurements, samples


def _record(line: str, fields: dict[str, Any]) -> dict | None:
    try:
        record = json.loads(line)
        if not is_intact(record, ()) or not all(_is(record[name], kind) for name, kind in fields.items()):
            return None
        if not all(_is_set(one) for one in record.get("sets", {}).values()):
            return None
        del record[KEY]
    except (LookupError, TypeError, AttributeError, *JSON_ERRORS):
        return None
    return record


def _is(value: Any, kind: Any) -> bool:
    return is_number(value) if kind is float else isinstance(value, kind)


def _is_set(one: Any) -> bool:
    numbers = (one[name] is None or is_number(one[name]) for name in ("loss", "exact_match"))
    counts: Collection[Any] = [one[name] for name in ("tokens", "samples", "prompts")]
    return all(numbers) and all(type(count) is int for count in counts) and is_preference(one.get("preference"))


def is_preference(value: Any) -> bool:
    """Whether it is what a set has as `preference`: None, or every figure as a number or None."""
    if value is None:
        return True
    return all(value[name] is None or is_number(value[name]) for name in (*FIGURES, "divergence"))
