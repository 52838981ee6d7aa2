"""The folder of an evaluation: config.json, which says what was asked of whom, and answers.jsonl, a line an answer.

Lines are only ever added, a batch at a time. Whatever a kill has left of the last line is dropped by the next process,
which goes on after the last whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rwkv_bone.config.checksum import KEY, is_intact, sealed
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.evaluation.flags import EvaluateConfig

CONFIG, ANSWERS, RESULT = "config.json", "answers.jsonl", "result.json"
FORMAT = 1  # of the folder
# Settings that change no answer; and those that name what `sources` compares by its content.
FREE = ("output", "overwrite", "execute_code")
BY_CONTENT = {"model": ("load_model", "adapter"), "data": ("data_file",), "shots": ("shots_file",)}

# What config.json holds, besides its format and checksum.
MEANT = {"model": str, "template": str, "settings": dict, "content": dict, "versions": dict, "answers": int}
ANEW = "sh scripts/evaluate.sh with --overwrite 1 begins anew"

Record = dict[str, Any]


def settings_of(cfg: EvaluateConfig) -> dict[str, Any]:
    """The settings as config.json holds them."""
    return json.loads(json.dumps(asdict(cfg)))


def read_config(folder: Path) -> dict[str, Any] | None:
    """What config.json says; None where there is none. UserError for a damaged one, or one of something else.

    It has the keys of `MEANT`, and its settings those of this version.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"{path}: cannot be read ({error}): damaged; {ANEW}") from error
    if not isinstance(found, dict) or "evaluation" not in found:
        raise UserError(f"{folder} holds the config.json of something else, not of an evaluation: give another folder")
    if not is_intact(found, ()) or found["evaluation"] != FORMAT:
        raise UserError(f"{path}: damaged, or of another version; {ANEW}")
    for name, kind in MEANT.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path}: no {name!r} that can be read: damaged, or of another version; {ANEW}")
    lacks = [spec.name for spec in fields(EvaluateConfig) if spec.name not in found["settings"]]
    if lacks:
        raise UserError(f"{path}: its settings lack {', '.join(lacks)}: of another version; {ANEW}")
    return found


def check_same(saved: Mapping[str, Any], cfg: EvaluateConfig) -> None:
    """UserError, by name, for settings other than those that an evaluation began with."""
    then, now = saved["settings"], settings_of(cfg)
    named = {name for names in BY_CONTENT.values() for name in names}
    other = [name for name in now if name not in (*FREE, *named) and now[name] != then.get(name)]
    if other:
        words = ", ".join(f"--{name} {_shown(now[name])} (it began with {_shown(then.get(name))})" for name in other)
        raise _differs(cfg, words)


def check_content(saved: Mapping[str, Any], cfg: EvaluateConfig, content: Mapping[str, str]) -> None:
    """UserError where model, data or worked examples are others than those that an evaluation began with."""
    for name, digest in content.items():
        if saved["content"].get(name) != digest:
            flags = " or ".join(f"--{flag} {getattr(cfg, flag) or '(none)'}" for flag in BY_CONTENT[name])
            raise _differs(cfg, f"{flags}: other {'weights' if name == 'model' else 'rows'} than it began with")


def _differs(cfg: EvaluateConfig, words: str) -> UserError:
    return UserError(
        f"{words}: --output {cfg.output} holds an evaluation that differs. Give the settings that it began with to go "
        "on, another --output, or --overwrite 1 to begin anew"
    )


def _shown(value: Any) -> str:
    words = " ".join(value) if isinstance(value, list) else str(int(value) if isinstance(value, bool) else value)
    return words or "(empty)"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    from rwkv_bone.checkpoints.atomic import (
        atomic_path,
    )  # late: that package brings torch, which a comparison needs not

    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(sealed(dict(content)), indent=2) + "\n", encoding="utf-8")


def line_of(record: Record) -> bytes:
    return json.dumps(sealed(record)).encode() + b"\n"


def records_of(path: Path) -> tuple[list[Record], int]:
    """(the whole lines of an answers.jsonl, the bytes that they take). None of a file that is not there.

    What follows the last whole line was being written when a process died. UserError for damage before that.
    """
    records: list[Record] = []
    size = 0
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return records, size
    with file:
        torn = 0
        for number, line in enumerate(file, 1):
            record = _record(line)
            if record is None:
                torn = torn or number
            elif torn:
                raise UserError(f"{path}:{torn}: damaged: --overwrite 1 begins anew, or remove the lines from there on")
            else:
                records.append(record)
                size += len(line)
    return records, size


def _record(line: bytes) -> Record | None:
    """The record of a line; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except JSON_ERRORS:
        return None
    if not isinstance(record, dict) or KEY not in record or not is_intact(record, ()):
        return None
    del record[KEY]
    return record


@contextmanager
def appending(path: Path, size: int) -> Iterator[Callable[[Sequence[Record]], None]]:
    """Adds records to the file, of which the first `size` bytes are kept. They are on the disk when a call returns."""
    from rwkv_bone.checkpoints.atomic import sync_folder

    with open(path, "ab") as file:
        if file.tell() != size:
            file.truncate(size)
        sync_folder(path.parent)

        def add(records: Sequence[Record]) -> None:
            file.write(b"".join(map(line_of, records)))
            file.flush()
            os.fsync(file.fileno())

        yield add


def replace_records(path: Path, records: Sequence[Record]) -> int:
    """Write the file anew with these records; its size."""
    from rwkv_bone.checkpoints.atomic import atomic_path

    data = b"".join(map(line_of, records))
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_bytes(data)
    return len(data)
