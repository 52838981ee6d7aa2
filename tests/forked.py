"""A second process for a test of a few lines, without the start of another interpreter."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def forked(body: Callable[[Callable[[], object]], object]) -> Iterator[int]:
    """The number of a process that runs `body(ready)` and has called `ready()`. At the end it is dead, however."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            body(lambda: os.write(writer, b"."))
        finally:
            os._exit(1)
    try:
        os.close(writer)
        assert os.read(reader, 1) == b".", "the process ended before it was ready"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
