"""Benchmarks that no other test calls need nothing but the repository: each runs at toy size from a copy of it."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

TOY = {
    "packing.py": "--ctx_len 64 --micro_bsz 2 --steps 1 --rounds 1",
    "side_by_side.py": "CLONE --size tiny --bsz 1 --ctx 16 --r 8 --steps 1 --precision fp32",
    "adapters.py": "--quick",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "repository"
    for name in ("assets", "benchmarks", "cuda", "src"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("program", TOY)
def test_a_benchmark_runs_from_a_plain_clone(clone, program, tmp_path):
    words = TOY[program].replace("CLONE", str(clone)).split()
    command = [sys.executable, str(clone / "benchmarks" / program), *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
