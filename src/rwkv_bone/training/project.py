"""The results folder: its files, what may be overwritten, and the config.json of the run."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rwkv_bone.checkpoints import atomic_path, sync_folder
from rwkv_bone.config import RunConfig, TrainConfig
from rwkv_bone.config.saved import to_json
from rwkv_bone.errors import UserError

CONFIG, LOG, PLOT, EVALUATION = "config.json", "train_log.jsonl", "loss.png", "evaluation.json"
PAGE, PREVIEW = "report.html", "preview.json"
MEASUREMENTS, SAMPLES, WARNINGS = "measurements.jsonl", "samples.jsonl", "warnings.jsonl"
BEST = "rwkv-best.pth"  # the trained parameters with the lowest held-out loss
REFERENCE = "reference.safetensors"  # log-probabilities by the model that dpo and kto compare with
RUN_IDS = "report_to.json"  # of this run in the programs of --report_to
RESUME_FILE, PREVIOUS_FILE = STATES = "resume.pth", "resume.previous.pth"
NEVER = ("never", "0")  # values of --resume with which a folder of results is refused
OUTPUT = "output.txt"  # what a run said that its terminal, pipe or disk could not take
# Lies there from the beginning of a run until it has saved a state: what adapters there are, the run makes again.
BEGUN = ".begun"
# With a number: rwkv-init.pth is what a run begins with, in RWKV-LM's way.
SAVED = "rwkv-[0-9]*.pth"
MADE_HERE = (
    *(CONFIG, LOG, PLOT, PAGE, PREVIEW, EVALUATION, MEASUREMENTS, SAMPLES, OUTPUT, RESUME_FILE, PREVIOUS_FILE, SAVED),
    *("rwkv-[0-9]*.json", BEST, "rwkv-best.json", WARNINGS, RUN_IDS, REFERENCE),
)
RESULTS = (LOG, RESUME_FILE, PREVIOUS_FILE, SAVED, BEST)
UNFINISHED = tuple(f".{name}.*.partial*" for name in MADE_HERE)  # what a killed run was writing


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def check_folder(config: TrainConfig) -> Path:
    """`proj_dir`; UserError if it can neither be made nor written to. Nothing is made."""
    folder = Path(config.run.proj_dir)
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise not_writable(folder, error) from error
    return folder


def not_writable(folder: Path, error: OSError) -> UserError:
    """What to raise where the machine refuses `proj_dir`."""
    return UserError(f"--proj_dir {folder} is not a writable folder: {error.strerror or error}")


def check_results(folder: Path, config: TrainConfig) -> None:
    """UserError if a run that begins in `folder` would replace what must be kept."""
    results = _matching(folder, RESULTS)
    if results and config.run.resume in NEVER and not config.run.overwrite:
        last = (kept(folder) or results)[-1].name
        raise UserError(
            f"--proj_dir {folder} holds the results of an earlier run ({last}), and --resume {config.run.resume} keeps "
            "them: leave that out to continue it, choose another folder, or --overwrite 1"
        )
    needed = {Path(path).resolve() for path in (config.model.load_model, config.adapter.peft_load) if path}
    for path in _matching(folder, MADE_HERE):
        if path.resolve() in needed:
            raise UserError(f"--overwrite would remove {path}, which this run starts from: choose another --proj_dir")


def kept(folder: Path) -> list[Path]:
    """The files of trained parameters in `folder`, the last one last. A power cut leaves empty ones, which are none."""
    files = [path for path in _matching(folder, (SAVED,)) if path.is_file() and path.stat().st_size]

    def place(path: Path) -> tuple[int, int]:
        epoch, step = re.match(r"rwkv-(\d+)(?:-s(\d+))?", path.name).groups()  # type: ignore[union-attr]
        return int(epoch), int(step or 10**9)

    return sorted(files, key=place)


def has_remains(folder: Path) -> bool:
    """Whether a run has begun in `folder`."""
    return bool(_matching(folder, MADE_HERE + UNFINISHED))


def tidy(folder: Path) -> None:
    """Remove what a run that was killed was writing."""
    for path in _matching(folder, UNFINISHED):
        path.unlink(missing_ok=True)


def begin(folder: Path, config: TrainConfig, continued: bool) -> None:
    """Make the folder ready for the first step: clear it, or tidy it for a run that is `continued`; write config.json.

    Only files with names of ours are removed. A reference that a run computed which saved nothing else may serve again:
    it says what it was made from.
    """
    unfinished = UNFINISHED if continued else MADE_HERE + UNFINISHED
    spared_files = set() if config.run.overwrite else {folder / REFERENCE}
    try:
        if not continued:
            (folder / BEGUN).touch() if config.run.save_state else (folder / BEGUN).unlink(missing_ok=True)
            sync_folder(folder)
        for path in _matching(folder, unfinished):
            if path not in spared_files:
                path.unlink()
    except OSError as error:
        raise not_writable(folder, error) from error
    # How this start treats the folder is nothing that a later start from config.json should repeat.
    run = RunConfig()
    saved = replace(config, run=replace(config.run, resume=run.resume, resume_with=(), overwrite=False))
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
