"""The results folder: its files, what may be overwritten, and the config.json of the run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rwkv_bone.checkpoints import atomic_path
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.saved import to_json
from rwkv_bone.errors import UserError

CONFIG, LOG, PLOT, EVALUATION = "config.json", "train_log.jsonl", "loss.png", "evaluation.json"
RESUME_FILE, PREVIOUS_FILE = "resume.pth", "resume.previous.pth"
OUTPUT = "output.txt"  # what a run said that its terminal, pipe or disk could not take
# With a number: rwkv-init.pth is what a run begins with, in RWKV-LM's way.
SAVED = "rwkv-[0-9]*.pth"
MADE_HERE = (CONFIG, LOG, PLOT, EVALUATION, OUTPUT, RESUME_FILE, PREVIOUS_FILE, SAVED, "rwkv-[0-9]*.json")
RESULTS = (LOG, RESUME_FILE, PREVIOUS_FILE, SAVED)
UNFINISHED = tuple(f".{name}.*.partial*" for name in MADE_HERE)  # what a killed run was writing


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def check_folder(config: TrainConfig) -> Path:
    """`proj_dir`, which can be made or written to; UserError if not, or if it holds results that must be kept.

    With --resume it may hold results: those are continued. Nothing is made: a run that is refused leaves no folder.
    """
    folder = Path(config.run.proj_dir)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--proj_dir {folder} is not a writable folder: {error.strerror or error}") from error
    if config.run.resume:
        return folder
    results = _matching(folder, RESULTS)
    if results and not config.run.overwrite:
        raise UserError(
            f"--proj_dir {folder} holds the results of an earlier run ({results[0].name}): they are kept; "
            "continue it with --resume 1, choose another folder, or --overwrite"
        )
    needed = {Path(path).resolve() for path in (config.model.load_model, config.adapter.peft_load) if path}
    for path in _matching(folder, MADE_HERE):
        if path.resolve() in needed:
            raise UserError(f"--overwrite would remove {path}, which this run starts from: choose another --proj_dir")
    return folder


def begin(folder: Path, config: TrainConfig) -> None:
    """Make the folder ready for the first step: make it, clear it, or for --resume tidy it, and write config.json.

    Only files with names of ours are removed.
    """
    left_over = UNFINISHED if config.run.resume else MADE_HERE + UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _matching(folder, left_over):
            path.unlink()
    except OSError as error:
        raise UserError(f"--proj_dir {folder} is not a writable folder: {error.strerror or error}") from error
    # These two flags say how this start treats the folder; a later start from config.json must not repeat that.
    saved = replace(config, run=replace(config.run, resume=False, overwrite=False))
    with atomic_path(folder / CONFIG, overwrite=True) as temporary:
        temporary.write_text(to_json(saved), encoding="utf-8")


@contextlib.contextmanager
def spared(consequence: str, report: Callable[[str], None]) -> Iterator[None]:
    """Spare the run a failure of what only helps to read it: it is reported as a warning, with its consequence."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, (UserError, ImportError)) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        report(f"warning: {' '.join(reason.split())[:300]}: {consequence}")
