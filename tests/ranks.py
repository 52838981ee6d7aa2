"""A run on several processes at once, as forks of one that has imported everything: seconds less than started ones.

What starts the processes of a run is left out. Tests of that use `Job.start`.
"""

import atexit
import functools
import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY, clean_environment, python_path
from tests.faults.server import rank_environments

TIMEOUT = 300  # seconds


@functools.cache
def _server() -> subprocess.Popen:
    """One for all tests of this process; it ends with it."""
    environment = clean_environment() | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.server"],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert server.stdin and server.stdout and server.stdout.readline()
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    assert server.stdin
    server.stdin.close()  # upon which it ends
    server.wait(timeout=60)


def train(argv: list[str], processes: int, folder: Path) -> subprocess.CompletedProcess:
    """`python train.py` as so many ranks, without its loss curve. folder: an existing one, for what they print.

    The status is the first rank's, as a launcher gives it.
    """
    output, errors = folder / "output.txt", folder / "errors.txt"
    job = {"program": "train", "argv": argv, "output": str(output), "errors": str(errors)}
    jobs = [job | {"environment": environment} for environment in rank_environments(processes)]
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps({"processes": jobs, "timeout": TIMEOUT}) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    said = [path.read_text(errors="replace") if path.exists() else "" for path in (output, errors)]
    assert not answer["timed_out"], "\n".join(said)
    return subprocess.CompletedProcess(argv, answer["statuses"][0], *said)
