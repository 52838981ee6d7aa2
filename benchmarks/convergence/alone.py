"""Each run in a process of its own: its peak memory is its own, and what breaks it breaks no other.

The processes are forked from a server that has imported everything and computed nothing, so a run does not pay the
seconds of an import.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.convergence.tasks import REPOSITORY

MODULE = "benchmarks.convergence.training"


class RunFailed(Exception):
    """A run ended without a result; the message says how."""


def alone(work: Callable[[Any], dict], argument: Any, threads: int = 1) -> dict:
    """work(argument), of a module that can be imported, computed with `threads` threads in a new process.

    RunFailed for a run that broke; UserError as it was raised there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([MODULE])
    # The server imports by PYTHONPATH alone.
    wanted = [str(REPOSITORY / "src"), str(REPOSITORY)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*wanted, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    sys.path[:0] = [path for path in wanted if path not in sys.path]
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_body, args=(sender, work, argument, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RunFailed(f"its process ended with status {process.exitcode}") from None
    except BaseException:
        process.terminate()
        raise
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _body(sender: Connection, work: Callable[[Any], dict], argument: Any, threads: int) -> None:
    # Imported by the server, and not where nothing is computed.
    import torch

    from rwkv_bone.errors import UserError

    torch.set_num_threads(threads)
    try:
        sender.send(work(argument))
    except UserError as error:
        sender.send(error)
    except Exception:
        sender.send(RunFailed(traceback.format_exc()))
