"""Programs of ours as processes that begin in milliseconds: this one has imported everything, and forks.

    python -m tests.faults.server      (with the shim preloaded; one request and one answer a line, as JSON)

A request is {"processes": [{"program", "argv", "environment", "faults", "output", "errors", "draws"}], "timeout"}:
processes that run together, as a launcher starts them; errors: where standard error goes, if not to the output; draws:
whether a loss curve is drawn. When one is killed, so are the others, as on a machine that loses its power. The answer
is {"statuses", "timed_out"}; a status below 0 is a signal.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback

WARM = (
    "rwkv_bone.training.fit", "rwkv_bone.conversion.merge", "rwkv_bone.conversion.convert",
    "rwkv_bone.conversion.flags", "rwkv_bone.commands", "torch._dynamo", "matplotlib.pyplot",
    "deepspeed", "safetensors.torch",
)  # fmt: skip


def rank_environments(processes: int) -> list[dict[str, str]]:
    """What a launcher would tell each of several processes; nothing to a single one."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    ranks = ({"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(processes))
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def program(name: str, argv: list[str]) -> int:
    """The exit status of train, merge or convert, as at a command line."""
    from rwkv_bone import commands

    sys.argv = [f"{name}.py", *argv]
    return getattr(commands, name)(f"{name}.py")


def child(job: dict) -> None:
    """One process of a request; does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        errors = job.get("errors")
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if errors else out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        os.environ.update(job.get("environment") or {})
        _forget_rank()
        if not job.get("draws"):
            sys.modules["matplotlib"] = None  # type: ignore[assignment] # half of the time of a small run
        if job.get("faults"):
            from tests.faults.shim import Faults

            Faults(**job["faults"]).begin()
        status = program(job["program"], job["argv"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                status = status or 1
        os._exit(status)


def _forget_rank() -> None:
    """Lightning asks the environment for this process's number when it is imported."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0


def serve_one(request: dict) -> dict:
    pids = []
    for job in request["processes"]:
        pid = os.fork()
        if not pid:
            child(job)
        pids.append(pid)
    statuses: dict[int, int] = {}
    deadline, timed_out = time.monotonic() + request["timeout"], False
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        over = time.monotonic() > deadline
        lost = any(status < 0 for status in statuses.values())
        if over or lost:
            timed_out |= over
            for pid in pids:
                _kill_all_of(pid)
        time.sleep(0.002)
    for pid in pids:
        _kill_all_of(pid)
    return {"statuses": [statuses[pid] for pid in pids], "timed_out": timed_out}


def _kill_all_of(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main() -> None:
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
