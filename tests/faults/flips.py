"""Single flipped bits in every file of ours that is read again: what a reader makes of each.

A flip is harmless when it is refused with a sentence, when something is said and the reader does without what it hit,
or when nothing that is read is different. `silent` is a defect, as is any exception that is no sentence (`crash`).
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rwkv_bone import checkpoints
from rwkv_bone.config import flags
from rwkv_bone.config.flags import parse_train
from rwkv_bone.data.cache import Cache
from rwkv_bone.errors import UserError
from rwkv_bone.training import project
from rwkv_bone.training.evaluation import read_measured, text_of
from rwkv_bone.training.log import read_log
from rwkv_bone.training.resume import Saved

OUTCOMES = ("refused", "said", "same", "silent", "crash")
_moments = count(1)


@dataclass
class Reader:
    """A file of ours, and how it is read. read: (what is compared, whether anything was said that a user reads)."""

    name: str
    victim: Path
    read: Callable[[], tuple[Any, bool]]


class _Heard(logging.Handler):
    """Counts warnings, which users read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings += 1


def outcome(reader: Reader, content: bytes, good: Any) -> tuple[str, str]:
    """(what became of a file with this content, the words of it)."""
    reader.victim.write_bytes(content)
    # Flips follow one another faster than a file system's clock ticks.
    moment = next(_moments)
    os.utime(reader.victim, (moment, moment))
    heard = _Heard()
    log = logging.getLogger("rwkv_bone")
    log.addHandler(heard)
    propagates, log.propagate = log.propagate, False
    try:
        found, said = reader.read()
    except UserError as error:
        return ("refused" if str(error).strip() else "crash"), str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    finally:
        log.removeHandler(heard)
        log.propagate = propagates
    if _equal(found, good):
        return "same", ""
    return ("said" if said or heard.warnings else "silent"), repr(found)[:300]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def flip_bits(reader: Reader, many: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Flip `many` bits of the reader's file, one at a time: ({outcome: times}, the defects in words)."""
    whole = reader.victim.read_bytes()
    good, _ = reader.read()
    counts: Counter = Counter()
    defects = []
    draw = random.Random(f"{seed} {reader.name}")
    bits = draw.sample(range(8 * len(whole)), min(many, 8 * len(whole)))
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        result, words = outcome(reader, bytes(content), good)
        counts[result] += 1
        if result in ("silent", "crash"):
            near = bytes(content[max(0, bit // 8 - 20) : bit // 8 + 20])
            defects.append(f"{result}: bit {bit % 8} of byte {bit // 8} of {reader.name} ({near!r}): {words}")
    reader.victim.write_bytes(whole)
    return counts, defects


def readers(run: Path, base: Path, work: Path) -> list[Reader]:
    """A reader for each kind of our files, of copies of them in `work`. run: the folder of a run with held-out data."""
    folder = Path(shutil.copytree(run, work / "run"))
    adapter = folder / "rwkv-1.pth"
    state = checkpoints.read_state(adapter)
    steps = len((folder / project.LOG).read_text().splitlines())
    measured = json.loads((folder / project.EVALUATION).read_text())["data"]

    def with_metadata(path: Path) -> Callable[[], tuple[Any, bool]]:
        return lambda: ((dict(checkpoints.read_state(path)), checkpoints.read_metadata(path)), False)

    def settings() -> tuple[Any, bool]:
        with mock.patch.object(flags, "print_notes") as printed:
            config = parse_train(["--resume", "1", "--proj_dir", str(folder)])
        Saved.find(config)
        return config, any(map(list, printed.call_args.args))

    def log() -> tuple[Any, bool]:
        records, missing = read_log(folder / project.LOG, steps)
        return records, bool(missing)

    def evaluation() -> tuple[Any, bool]:
        # A measurement of other data is made again, and says so by being made.
        path = folder / project.EVALUATION
        text = text_of(path)
        if text is None:
            return None, True
        before, after = read_measured(text, path, measured)
        return (before, after), before is None or after is None

    found = [
        Reader("rwkv-N.pth", adapter, with_metadata(adapter)),
        Reader("rwkv-N.json", adapter.with_suffix(".json"), with_metadata(adapter)),
        Reader("resume.pth", folder / "resume.pth", _state_of(folder)),
        Reader("config.json", folder / project.CONFIG, settings),
        Reader("train_log.jsonl", folder / project.LOG, log),
        Reader("evaluation.json", folder / project.EVALUATION, evaluation),
    ]
    for name in ("adapter.safetensors", "merged.pth", "merged.safetensors"):
        path = work / name
        if "merged" in name:
            checkpoints.write_state(path, checkpoints.read_state(base))
            found.append(Reader(name, path, lambda path=path: (dict(checkpoints.load_base(path).state), False)))
        else:
            checkpoints.write_state(path, state, checkpoints.read_metadata(adapter))
            found.append(Reader(name, path, with_metadata(path)))
    alone = Path(shutil.copytree(folder, work / "previous"))
    (alone / project.RESUME_FILE).unlink()
    found.append(Reader("resume.previous.pth", alone / project.PREVIOUS_FILE, _state_of(alone)))
    return found + cache_readers(work / "cache")


def _state_of(folder: Path) -> Callable[[], tuple[Any, bool]]:
    """Reads what the run in a folder goes on from. Which file that is, is said where it is not the newest."""

    def read() -> tuple[Any, bool]:
        saved = Saved.find(parse_train(["--resume", "1", "--proj_dir", str(folder)]))
        assert saved
        return (saved.step, saved.metadata, dict(checkpoints.read_state(saved.path))), bool(saved.remarks)

    return read


def cache_readers(folder: Path) -> list[Reader]:
    """The files of an entry of tokenised data. Made again, the entry has other values: what was read is thus known."""
    import numpy as np

    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("rows")
    values = np.arange(997, dtype=np.int32) * 7919 % 251

    def read(built: np.ndarray = -values) -> tuple[Any, bool]:
        cache = Cache(data, str(folder))

        def build(arrays):
            arrays.append(ids=built, ends=built[:100].astype(np.int64))
            return {"rows": [1, 2.5, "three"]}

        arrays, record = cache.entry({"of": "this"}, build)
        content = {name: array.tobytes() for name, array in arrays.items()}, record
        if cache.notes:
            shutil.rmtree(entry)
            shutil.copytree(kept, entry)
        return content, bool(cache.notes)

    entry = kept = folder / Cache.key({"of": "this"})
    read(values)
    kept = Path(shutil.copytree(entry, folder / "kept"))
    return [Reader(f"cache: {path.name}", path, read) for path in sorted(entry.iterdir())]
