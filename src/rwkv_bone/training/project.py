"""The results folder: refused while it holds results, checked to be writable before anything is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError

CONFIG, LOG, PLOT, EVALUATION = "config.json", "train_log.jsonl", "loss.png", "evaluation.json"
STATE = "resume.pth"
MADE_HERE = (CONFIG, LOG, PLOT, EVALUATION, STATE, "rwkv-*.pth", "rwkv-*.json")
RESULTS = (LOG, STATE, "rwkv-*.pth")
UNFINISHED = tuple(f".{name}.*.partial*" for name in MADE_HERE)  # what a killed run was writing


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def check_folder(config: TrainConfig) -> Path:
    """`proj_dir`, existing and writable; UserError if it cannot be, or holds results that must be kept.

    With --resume the results are what is continued.
    """
    folder = Path(config.run.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
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


def clear_folder(folder: Path) -> None:
    """Remove what earlier runs of this program left, and nothing else."""
    for path in _matching(folder, MADE_HERE + UNFINISHED):
        path.unlink()


def clear_unfinished(folder: Path) -> None:
    """Remove files that a killed run had not finished writing."""
    for path in _matching(folder, UNFINISHED):
        path.unlink()
