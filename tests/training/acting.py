"""Runs in which something happens at a place: python -m tests.training.acting FOLDER < runs.json

The libraries are loaded once, which takes longer than these runs do; each process of a run is a fork. Its ranks are
started as torchrun starts them. FOLDER gets `results.json`: {name: {"statuses": [of each rank], "left": processes that
have not ended, "output": of rank 0, "errors": of all ranks, "step": of the state that it left}}.

A run is {"name", "argv", "proj_dir", "ranks", "after", "acts", "sends", "ignored"}. after: the name of a run that must
have ended. acts: [rank, place, what, value]; places: `import` (of the libraries), `load`, `data`, `before` (the
measurement), `step N` (after it), `save`, `after`; what: `signal` (value: its number), `raise`, `mistake` (the text),
`sleep`, `sleep in C`, `hold the lock`, `stop`, `die`. sends: [seconds after the first act, number of a signal, ranks].
ignored: signals, as by nohup.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

LIMIT = 100.0  # seconds for a run
AT_ONCE = 5  # runs; some only wait


def act(what: str, value: Any, marker: Path) -> None:
    """Do it, once in a run."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    if what == "signal":
        os.kill(os.getpid(), value)
        time.sleep(0.1)  # for the thread that hears it
    elif what == "raise":
        raise ZeroDivisionError(value)
    elif what == "mistake":
        from rwkv_bone.errors import UserError

        raise UserError(value)
    elif what == "sleep":
        while True:
            time.sleep(1000)
    elif what == "sleep in C":
        while True:
            ctypes.CDLL(None).sleep(1000)
    elif what == "hold the lock":
        ctypes.PyDLL(None).sleep(1000)
    else:
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "die": signal.SIGKILL}[what])


def arrange(acts: list[tuple[int, str, str, Any]], rank: int, folder: Path) -> None:
    """Have this rank do what the acts say."""
    from rwkv_bone import commands
    from rwkv_bone.training import fit, heldout, log, saving

    def at(place: str) -> None:
        for number, (who, where, what, value) in enumerate(acts):
            if who == rank and where == place:
                act(what, value, folder / f"act {number}")

    def before(holder: Any, name: str, place: str, when: Any = lambda *_: True) -> None:
        original = getattr(holder, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            if when(*arguments):
                at(place)
            return original(*arguments, **more)

        mock.patch.object(holder, name, wrapped).start()

    before(commands, "uncollected", "import")
    before(fit, "prepare_model", "load")
    before(fit, "load_data", "data")
    before(heldout.HeldOut, "_measure", "before", lambda self, module, step: step == 0)
    before(heldout.HeldOut, "_measure", "after", lambda self, module, step: step > 0)
    before(saving.SaveTrained, "_save", "save")
    stepped = log.StepLog.on_train_batch_end

    def after_step(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        stepped(self, trainer, module, *rest)
        if module.window_finished():
            at(f"step {module.window.step}")

    mock.patch.object(log.StepLog, "on_train_batch_end", after_step).start()


def start(run: dict, rank: int, port: int, folder: Path) -> int:
    """Fork a rank of a run; its process number."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setpgid(0, 0)
        errors = os.open(folder / f"errors {rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        output = os.open(folder / f"output {rank}", os.O_WRONLY | os.O_CREAT)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number in run.get("ignored", ()):
            signal.signal(number, signal.SIG_IGN)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        if run["ranks"] > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["ranks"]),
                "LOCAL_WORLD_SIZE": str(run["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        from rwkv_bone import signals
        from rwkv_bone.commands import train

        signals.BEGAN = time.monotonic()
        arrange(run["acts"], rank, folder)
        sys.argv = ["train.py", *run["argv"]]
        status = train("train.py")
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def free_port() -> int:
    """One that no connection of another program is given in the meantime."""
    for port in random.sample(range(30000, 32000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


class Running:
    """A run under way."""

    def __init__(self, run: dict, folder: Path):
        self.run, self.folder = run, folder
        folder.mkdir()
        port = free_port()
        self.processes = [start(run, rank, port, folder) for rank in range(run["ranks"])]
        self.statuses: list[int | None] = [None] * run["ranks"]
        self.sends = list(run.get("sends", ()))
        self.acted: float | None = None
        self.end = time.monotonic() + LIMIT

    def over(self) -> bool:
        """Send what is due, and see which processes have ended."""
        now = time.monotonic()
        if self.acted is None and any(self.folder.glob("act *")):
            self.acted = now
        while self.acted and self.sends and now - self.acted >= self.sends[0][0]:
            _, number, ranks = self.sends.pop(0)
            for rank in ranks:
                if self.statuses[rank] is None:
                    os.kill(self.processes[rank], number)
        for rank, process in enumerate(self.processes):
            if self.statuses[rank] is None:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        # A process that is still there when all others have ended for long is one too many.
        return None not in self.statuses or now > self.end

    def result(self) -> dict:
        left = [rank for rank, status in enumerate(self.statuses) if status is None]
        for rank in left:
            os.kill(self.processes[rank], signal.SIGKILL)
            os.waitpid(self.processes[rank], 0)
        errors = "".join((self.folder / f"errors {rank}").read_text() for rank in range(self.run["ranks"]))
        output = (self.folder / "output 0").read_text()
        from rwkv_bone import checkpoints

        state = Path(self.run["proj_dir"]) / "resume.pth"
        step = checkpoints.read_metadata(state)["step"] if state.is_file() else 0
        return {"statuses": self.statuses, "left": left, "output": output, "errors": errors, "step": step}


def main(where: str) -> None:
    import torch

    torch.set_num_threads(1)
    from rwkv_bone.training import fit  # noqa: F401
    from rwkv_bone.training.libraries import load_deepspeed

    load_deepspeed()
    folder, waiting = Path(where), json.load(sys.stdin)
    running: list[Running] = []
    results: dict[str, dict] = {}
    while waiting or running:
        for run in list(waiting):
            if len(running) < AT_ONCE and run.get("after", "") in {"", *results}:
                waiting.remove(run)
                running.append(Running(run, folder / f"acting {run['name']}"))
        for one in list(running):
            if one.over():
                running.remove(one)
                results[one.run["name"]] = one.result()
        time.sleep(0.02)
    (folder / "results.json").write_text(json.dumps(results))


def perform(runs: list[dict], folder: Path) -> dict[str, dict]:
    """The results of these runs."""
    from tests.conftest import clean_environment, python_path

    command = [sys.executable, "-m", "tests.training.acting", str(folder)]
    environment = clean_environment() | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, input=json.dumps(runs), text=True, env=environment, check=True, timeout=600)
    return json.loads((folder / "results.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
