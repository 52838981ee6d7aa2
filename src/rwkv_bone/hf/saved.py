"""What a run of `train_hf.py` keeps in its output folder to go on from, so that no kill and no power cut spoils it.

`transformers.Trainer` writes a checkpoint file by file into `checkpoint-N`. The last file is ours: `complete.json`
lists the others with their checksums, once they are on the disk. So a checkpoint that was cut short has no list, and
one that was damaged later does not agree with its own. From the first step on, `run.json` says which run the folder
holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_bone.checkpoints.atomic import atomic_path, sync_folder
from rwkv_bone.errors import JSON_ERRORS, UserError
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.run_lock import NAME as LOCK

LIST, RUN, MERGED = "complete.json", "run.json", "merged"
# What a run leaves beside its checkpoints; `--overwrite` removes these. The record goes first, so that what is left by
# a removal that was cut short is taken for no run.
RESULTS = (RUN, "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", MERGED)
NEVER = ("never", "0")  # values of --resume with which a folder of results is refused
# Settings that a continued run may change: they say how it starts, what it writes, and how long it is.
FREE = {"output_dir", "overwrite", "resume", "merge", "save_steps", "save_total_limit", "logging_steps", "max_lost"}
FREE |= {"eval_path", "eval_field", "gradient_checkpointing", "num_train_epochs"}
# Settings that are compared by what comes of them: weights, samples, processes.
COMPARED = {"model_name_or_path", "data_path", "dataset_field", "columns", "dataset_split", "model_max_length"}
COMPARED |= {"devices", "cards"}
BLOCK = 1 << 20  # bytes read at a time


class Run(NamedTuple):
    """Which run a folder holds."""

    settings: dict[str, Any]  # those that a run keeps
    facts: dict[str, str]  # {what, in words: a fingerprint or a number}, which a run keeps too
    epochs: float  # how long it is
    finished: bool = False  # its adapter is written

    @classmethod
    def of(cls, config: HfConfig, facts: Mapping[str, str]) -> Run:
        kept = {name: value for name, value in asdict(config).items() if name not in FREE | COMPARED}
        return cls(json.loads(json.dumps(kept)), dict(facts), config.num_train_epochs)

    @classmethod
    def read(cls, folder: Path) -> Run | None:
        """The run in a folder; None if there is none. UserError for a file that is no record of one."""
        path = folder / RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(found["settings"]), dict(found["facts"]), float(found["epochs"]), bool(found["finished"]))
        except FileNotFoundError:
            return None
        except (LookupError, TypeError, *JSON_ERRORS) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}), so that nothing tells which run {folder} holds: "
                "--overwrite 1 begins anew"
            ) from None

    def write(self, folder: Path) -> None:
        """Write the record of this run. UserError where the disk refuses it."""
        with atomic_path(folder / RUN, overwrite=True) as temporary:
            temporary.write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")

    def check(self, now: Run, folder: Path) -> None:
        """UserError if `now` differs from this run in what both know."""
        changed = []
        for flag, (old, new) in _differences(self.settings, now.settings):
            changed.append(f"--{flag} was {json.dumps(old)} and is now {json.dumps(new)}")
        for what, (old, new) in _differences(self.facts, now.facts):
            changed.append(f"{what} ({old} then, {new} now)")
        if changed:
            raise UserError(
                f"--output_dir {folder} holds another run: {'; '.join(changed)}. Nothing there was changed. Give the "
                "same as then to continue it, another --output_dir to begin a new run, or --overwrite 1 to replace it"
            )


class Found(NamedTuple):
    """What an output folder holds for a run to go on from."""

    run: Run | None = None  # the run that is continued; None: a new one begins
    checkpoint: Path | None = None  # from where; None: from the start
    broken: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that are not whole, and why
    complete: bool = False  # nothing is left to do


def look(config: HfConfig) -> Found:
    """What the run of these settings finds in its output folder. Nothing is changed there.

    UserError if it holds something else, or nothing that is whole to go on from.
    """
    output = Path(config.output_dir)
    if config.overwrite:
        return Found()
    there = [path for path in output.iterdir() if not path.name.startswith(LOCK)] if output.is_dir() else []
    run = Run.read(output)
    if there and (run is None or config.resume in NEVER):
        go_on = "" if run is None else ", --resume 1"
        raise UserError(f"{output} is not empty and is kept: give another --output_dir{go_on} or --overwrite 1")
    if run is None:
        if config.resume == "1":
            raise UserError(f"--resume 1: {output} holds no run to continue; start without it")
        return Found()
    run.check(Run.of(config, {}), output)
    merged = not config.merge or (output / MERGED / "config.json").is_file()
    if run.finished and merged and config.num_train_epochs <= run.epochs:
        return Found(run, complete=True)
    broken: list[tuple[Path, str]] = []
    for _, path in sorted(_checkpoints(output), reverse=True):
        if problem := damage(path):
            broken.append((path, problem))
        else:
            return Found(run, path, tuple(broken))
    if run.finished or any((path / LIST).exists() for path, _ in broken):
        reasons = "; ".join(f"{path.name}: {problem}" for path, problem in broken) or "there is none"
        raise UserError(f"no checkpoint in {output} is whole ({reasons}): --overwrite 1 begins the run anew")
    return Found(run, None, tuple(broken))


def complete(checkpoint: Path) -> None:
    """Put all files of a checkpoint on the disk for good, and list them: from now on it is whole.

    OSError, with the name of the file, and UserError where the disk refuses.
    """
    listed = {}
    for path in _files(checkpoint):
        with open(path, "rb") as file:
            # Before it is read: what is listed is what the disk has taken.
            os.fsync(file.fileno())
            listed[path.relative_to(checkpoint).as_posix()] = _checksum(path)
    for folder in {path.parent for path in _files(checkpoint)}:
        sync_folder(folder)
    with atomic_path(checkpoint / LIST, overwrite=True) as temporary:
        temporary.write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    sync_folder(checkpoint.parent)


def damage(checkpoint: Path) -> str:
    """Why a checkpoint is not whole, in words; nothing if it is. Every file is read."""
    try:
        listed = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
        for name, checksum in listed.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _checksum(checkpoint / name) != checksum:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, AttributeError, TypeError, *JSON_ERRORS) as error:
        return f"{LIST} cannot be read ({type(error).__name__})"
    return ""


def keep_newest(output: Path, count: int) -> None:
    """Remove all checkpoints but the newest."""
    for _, path in sorted(_checkpoints(output), reverse=True)[count:]:
        remove(path)


def clear(output: Path) -> None:
    """Remove what an earlier run has left in its output folder."""
    for path in (*(output / name for name in RESULTS), *(path for _, path in _checkpoints(output))):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there. Of a checkpoint the list goes first: what then stays is not whole."""
    if path.is_dir() and not path.is_symlink():
        (path / LIST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _checkpoints(output: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of each checkpoint, whole or not."""
    for path in output.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and path.is_dir():
            yield int(step), path


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != LIST)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in then.keys() & now.keys():
        if then[name] != now[name]:
            yield name, (then[name], now[name])
