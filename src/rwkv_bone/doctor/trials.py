"""What can only be tried: kernels, two steps of training, a merge, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rwkv_bone.doctor.finding import FINE, PROBLEM, Finding

PACKAGE = Path(__file__).resolve().parents[1]
TINY = PACKAGE.parents[1] / "assets" / "rwkv7-tiny.pth"
SIZES = {"n_layer": 2, "n_embd": 64, "vocab_size": 256, "my_testing": "x070", "tokenizer": "bytes"}
LIMIT = 300  # seconds, also for kernels that are compiled first
REPORT = "the message says what to do; if it does not, report it with the block below"
ROWS = 16
OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "NODE_RANK", "GROUP_RANK")


def run(command: list[str], folder: Path | None = None) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of Python with these arguments; it finds this package."""
    # Not RANK and the like: what is tried here is a run of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}  # RANK
    paths = [str(PACKAGE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no end after {LIMIT} seconds"
    return done.returncode, done.stdout, done.stderr


def last_words(errors: str, status: int) -> str:
    """What a program said before it failed: from its error on, or the last lines."""
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    at = next((number for number, line in enumerate(lines) if line.startswith("error: ")), max(len(lines) - 3, 0))
    return "\n".join(lines[at : at + 12]) or f"exit status {status}, without a word"


def kernels(accelerator: str) -> Iterator[Finding]:
    """What kernels.py tells."""
    status, output, errors = run(["-m", "rwkv_bone.doctor.kernels", accelerator])
    for line in output.splitlines():
        if line.startswith("{"):
            yield Finding(**json.loads(line))
    if status:
        yield Finding(PROBLEM, "kernels", f"PyTorch or the kernels fail: {last_words(errors, status)}", REPORT)


def program(name: str, flags: dict[str, object], folder: Path) -> tuple[str, float]:
    """Run a console command with these flags; (what it said if it failed, else nothing, seconds)."""
    begin = time.monotonic()
    code = f"import sys; from rwkv_bone.commands import {name}; sys.exit({name}())"
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    status, _, errors = run(["-c", code, *words], folder)
    return last_words(errors, status) if status else "", time.monotonic() - begin


def training(accelerator: str) -> Iterator[Finding]:
    """Two steps and a merge of a tiny model, in a temporary folder, by the programs that a user calls."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="rwkv-bone-doctor-")
    except OSError as problem:
        yield Finding(PROBLEM, "training", f"no temporary folder ({problem.strerror})", "set TMPDIR to one of your own")
        return
    with folder as name:
        yield from _training(accelerator, Path(name))


def _training(accelerator: str, folder: Path) -> Iterator[Finding]:
    rows = [json.dumps({"prompt": f"{n} + 1 = ", "response": str(n + 1)}) for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags: dict[str, object] = {"data_file": "rows.jsonl", "cache_dir": "cache", "accelerator": accelerator}
    flags |= {"ctx_len": 16, "micro_bsz": 2, "epoch_count": 1, "epoch_steps": 2, "save_minutes": 0}
    base = TINY
    if not base.is_file():  # an installed package has no assets: a model from scratch is trained first
        base = folder / "base" / "rwkv-0.pth"
        wrong, _ = program("train", flags | SIZES | {"peft": "none", "proj_dir": "base"}, folder)
        if wrong:
            yield Finding(PROBLEM, "training", f"a tiny model could not be trained: {wrong}", REPORT)
            return
        flags["tokenizer"] = "bytes"
    wrong, seconds = program("train", flags | {"load_model": base, "bone_r": 8, "proj_dir": "run"}, folder)
    adapter = folder / "run" / "rwkv-0.pth"
    if wrong or not adapter.is_file():
        yield Finding(
            PROBLEM, "training", f"two steps of a tiny model failed: {wrong or 'no adapter came out'}", REPORT
        )
        return
    yield Finding(FINE, "training", f"two steps of a tiny model, Bone ({seconds:.1f} s)")
    merged = {"base_model": base, "peft_checkpoint": adapter, "output": "merged.pth"}
    wrong, seconds = program("merge", merged, folder)
    if wrong or not (folder / "merged.pth").is_file():
        yield Finding(PROBLEM, "merging", f"the tiny model's merge failed: {wrong or 'no model came out'}", REPORT)
        return
    yield Finding(FINE, "merging", f"its merge, verified ({seconds:.1f} s)")
