"""A tiny training job, run in this process or as `python train.py` with as many processes as `devices` says."""

import json
import os
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.config.flags import parse_train
from tests import ranks
from tests.conftest import REPOSITORY, clean_environment, python_path, random_model

# Responses of unequal length, so that ranks and micro-batches have unequal numbers of trained tokens.
ROWS = [(f"{n} -> ", str(n)[::-1] * (1 + n % 4)) for n in range(37, 48)]


@dataclass
class Run:
    """A run for Job.batch, in `folder` (default: the name). dies_after: the step after which it is killed, or None."""

    name: str
    flags: dict
    folder: str = ""
    dies_after: int | None = None


@dataclass
class Job:
    """Runs of train.py with `flags`. A call adds flags of its own, which take precedence."""

    folder: Path
    flags: dict

    def argv(self, flags: dict) -> list[str]:
        own, more = ([w for name, value in d.items() for w in (f"--{name}", str(value))] for d in (self.flags, flags))
        return [*own, "--typed", *more]  # as a script passes its variables, and what its user types over them

    def run(self, name: str, draws: bool = False, **flags) -> Path:
        """Train in this process, on one device; returns proj_dir.

        draws: with a real loss curve, which takes as long as all else of such a run; otherwise one byte stands for it.
        """
        from rwkv_bone.training import curve
        from rwkv_bone.training.fit import fit

        picture = curve.draw_loss if draws else lambda path, *_: path.write_bytes(b"-")
        with mock.patch.object(curve, "draw_loss", picture):
            fit(parse_train(self.argv({**flags, "proj_dir": self.folder / name})))
        return self.folder / name

    def batch(self, device: str, runs: list[Run]) -> dict[str, str | None]:
        """Train one run after another on `cpu` or `cuda`, all in one new process: {name: what went wrong, or None}."""
        where = {"accelerator": "gpu" if device == "cuda" else "cpu", "op": "auto"}
        jobs = [
            {
                "name": run.name,
                "argv": self.argv({**where, **run.flags, "proj_dir": self.folder / (run.folder or run.name)}),
                "dies_after": run.dies_after,
            }
            for run in runs
        ]
        results = self.folder / f"results-{uuid.uuid4().hex}.json"
        command = [sys.executable, "-m", "tests.training.runs", str(results)]
        environment = clean_environment() | {"PYTHONPATH": python_path()}
        done = subprocess.run(
            command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(results.read_text())

    def ranks(self, name: str, devices: int, **flags) -> tuple[Path, subprocess.CompletedProcess]:
        """As `start`, on several devices whose processes need not be started anew; returns the same."""
        argv = self.argv({**flags, "devices": devices, "proj_dir": self.folder / name})
        with tempfile.TemporaryDirectory() as said:
            return self.folder / name, ranks.train(argv, devices, Path(said))

    def launch(self, name: str, environment: dict[str, str] | None = None, **flags) -> subprocess.Popen:
        """Start `python train.py` and do not wait for it. environment: variables beside those of a clean one."""
        argv = self.argv({**flags, "proj_dir": self.folder / name})
        command = [sys.executable, REPOSITORY / "train.py", *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=clean_environment() | (environment or {})
        )

    def start(self, name: str, **flags) -> tuple[Path, subprocess.CompletedProcess]:
        """Train with `python train.py`; returns proj_dir and what the program printed."""
        with self.launch(name, **flags) as process:
            try:
                output, errors = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return self.folder / name, subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def adapter_of(folder: Path, name: str = "rwkv-0.pth") -> dict[str, torch.Tensor]:
    return checkpoints.read_state(folder / name)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Use one thread a process, since small models are slower on several; restore the environment afterwards."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise Lightning sets its own number
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Bone on a random 2-layer model in fp32: 11 rows, 4 a step, one epoch of 3 steps. Each file has its own folder."""
    folder = tmp_path_factory.mktemp("training")
    base, data = folder / "base.pth", folder / "rows.jsonl"
    checkpoints.write_state(base, random_model(vocab_size=256, dtype=torch.bfloat16).state_dict())
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ROWS))
    flags = {
        "load_model": base,
        "data_file": data,
        "accelerator": "cpu",
        "precision": "fp32",
        "op": "torch",
        "peft": "bone",
        "bone_r": 8,
        "dataload": "pad",
        "micro_bsz": 4,
        "ctx_len": 64,
        "lr_init": 1e-2,
        "lr_final": 1e-3,
    }
    return Job(folder, flags)
