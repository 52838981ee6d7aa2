"""Tests of a copy of the repository, run in a process that has the libraries loaded already.

Starting Python and importing torch anew would take longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.planted.bug import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch", "lightning.pytorch", "deepspeed", "transformers"])
LIMIT = 900  # seconds; a bug that makes a test hang is found, too


def run_tests(root: Path, tests: str) -> str:
    """`passed`, `failed`, `hangs`, or what pytest said where it ran no test."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        child = CONTEXT.Process(target=_pytest, args=(root, shlex.split(tests), output))
        child.start()
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            return "hangs"
        text = output.read_text(encoding="utf-8", errors="replace")
    if child.exitcode in (0, 1):
        skipped_all = child.exitcode == 0 and " passed" not in text
        return "all skipped" if skipped_all else ("passed", "failed")[child.exitcode]
    if child.exitcode == 2 and "during collection" not in text:
        return "failed"  # a bug of signals ends pytest itself
    return f"pytest ended with {child.exitcode}: {' '.join(text.split()[-30:])}"


def _pytest(root: Path, arguments: list[str], output: Path) -> None:
    """In a process of its own: pytest in `root`, as a user would start it there."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "rwkv_bone")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "src")]
    os.chdir(root)
    # No file of bytecode: a bug of the same length, planted within the same second, would not be seen.
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    torch.set_num_threads(1)
    status = pytest.main(["-x", "-o", "addopts=--import-mode=importlib", *arguments])
    sys.stdout.flush()
    os._exit(status)  # no more: what the forked process had loaded has nothing to clean up here
