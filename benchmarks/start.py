"""What a run costs outside forward and backward: its start, the rest of a step, resident memory.

    OMP_NUM_THREADS=1 python benchmarks/start.py [--rounds 3] [--steps 60] [train.py flags ...]

Trains the bundled model as scripts/run_bone.sh does, on the CPU, each round in a process of its own; further flags
override. Times are processor time, so a busy machine does not count: of all threads up to the first step, of the main
thread in a step. "outside" is a step without the forward pass and without backward: batch, gradient norm, clipping,
AdamW, log, Lightning and DeepSpeed. Values are medians of the rounds, those of a step medians of its steps but the
first ten. Kernels and tokens must be cached: round 0 sees to that and is not counted. Memory is VmRSS (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

FLAGS = {
    "load_model": REPOSITORY / "assets" / "rwkv7-tiny.pth",
    "data_file": REPOSITORY / "assets" / "numbers_train.jsonl",
    "bone_r": 32,
    "ctx_len": 128,
    "micro_bsz": 6,
    "lr_init": 3e-3,
    "accelerator": "cpu",
    "eval_samples": 0,
    "overwrite": 1,
}
WARM = 10  # steps that are not counted


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Clock:
    """Adds up the processor time that this thread spends in some functions."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: object, name: str, label: str) -> None:
        original: Callable = getattr(owner, name)
        self.spent[label] = 0.0

        def timed(*args, **kwargs):
            begin = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[label] += time.thread_time() - begin

        setattr(owner, name, timed)


def run(argv: list[str]) -> dict[str, float]:
    """One training run in this process: {what: value}."""
    found = {}
    # As rwkv_bone.commands does it.
    from rwkv_bone.imports import uncollected

    with uncollected():
        import torch

        found["start: PyTorch, s"] = time.process_time()
        from rwkv_bone.training.fit import fit

    found["start: Lightning and this package, s"] = time.process_time() - found["start: PyTorch, s"]
    from rwkv_bone.config.flags import parse_train
    from rwkv_bone.training.module import TrainingModule
    from rwkv_bone.training.signals import StopOnSignal

    clock = Clock()
    clock.watch(TrainingModule, "_loss", "forward")
    clock.watch(torch.Tensor, "backward", "backward")
    marks: list[tuple[float, dict[str, float]]] = []
    start = StopOnSignal.on_train_batch_start

    def begin(self, trainer, module, batch, index):
        if not marks:
            found["start: until the first step, s"] = time.process_time()
            found["resident at the first step, MB"] = resident_mb()
        marks.append((time.thread_time(), dict(clock.spent)))
        start(self, trainer, module, batch, index)

    StopOnSignal.on_train_batch_start = begin
    with contextlib.redirect_stdout(io.StringIO()):
        fit(parse_train(argv))
    gc.collect()
    steps = list(zip(marks, marks[1:], strict=False))[WARM:]
    for label in clock.spent:
        found[f"step: {label}, ms"] = 1000 * statistics.median(b[1][label] - a[1][label] for a, b in steps)
    outside = [b[0] - a[0] - sum(b[1].values()) + sum(a[1].values()) for a, b in steps]
    found["step: outside, ms"] = 1000 * statistics.median(outside)
    found["step: outside, share"] = statistics.median(
        part / (b[0] - a[0]) for part, (a, b) in zip(outside, steps, strict=True)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, given = parser.parse_known_args()
    if options.child:
        print(json.dumps(run(given)))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        flags = FLAGS | {"epoch_count": 1, "epoch_steps": options.steps, "proj_dir": Path(folder) / "run"}
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--child", *argv, "--typed", *given]
        for number in range(options.rounds + 1):
            done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            if number:
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
    for what in rounds[0]:
        values = sorted(one[what] for one in rounds)
        print(f"{what:40} {statistics.median(values):9.3f}   ({values[0]:.3f} to {values[-1]:.3f})")


if __name__ == "__main__":
    main()
