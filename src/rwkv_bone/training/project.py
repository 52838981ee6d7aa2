"""The results folder: refused while it holds results, checked to be writable before anything is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError

CONFIG, LOG, PLOT, EVALUATION = "config.json", "train_log.jsonl", "loss.png", "evaluation.json"
MADE_HERE = (CONFIG, LOG, PLOT, EVALUATION, "rwkv-*.pth", "rwkv-*.json")
RESULTS = (LOG, "rwkv-*.pth")


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def check_folder(config: TrainConfig) -> Path:
    """`proj_dir`, existing and writable; UserError if it cannot be, or holds results that must be kept."""
    folder = Path(config.run.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--proj_dir {folder} is not a writable folder: {error.strerror or error}") from error
    results = _matching(folder, RESULTS)
    if results and not config.run.overwrite:
        raise UserError(
            f"--proj_dir {folder} holds the results of an earlier run ({results[0].name}): they are kept; "
            "choose another folder, or --overwrite"
        )
    needed = {Path(path).resolve() for path in (config.model.load_model, config.adapter.bone_load) if path}
    for path in _matching(folder, MADE_HERE):
        if path.resolve() in needed:
            raise UserError(f"--overwrite would remove {path}, which this run starts from: choose another --proj_dir")
    return folder


def clear_folder(folder: Path) -> None:
    """Remove what earlier runs of this program left, and nothing else."""
    for path in _matching(folder, MADE_HERE):
        path.unlink()
