"""The exceptions that are not defects: a mistake of the user, and a run stopped by a signal.

`exit_status` turns them into the exit status of a program.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

from rwkv_bone import console

SIGINT, SIGPIPE = 2, 13  # signal.SIGPIPE does not exist everywhere


# Why the machine refuses a file whose name the user gave: no rights, no room, no such name, a disk that fails.
OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
OF_THE_MACHINE |= {errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EISDIR}
SHOWN = 200  # characters of such a name

# What json.loads raises; the second for brackets within brackets a thousand deep.
JSON_ERRORS = (ValueError, RecursionError)


class UserError(ValueError):
    """A mistake in a flag, a file or an environment.

    The message names what is wrong, what was expected and what to do about it; the entry points print it without a
    traceback and exit with status 2. Anything else that is raised, except `Interrupted`, is a defect of this project
    and keeps its traceback; but for an OSError about a file that the machine refuses.
    """


class Interrupted(Exception):
    """A signal ended the run between two steps, with everything saved.

    The entry points print the message, if there is one, and exit with 128 + `signum`, as a shell reports it.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal, or one between the steps, ended the run where it was."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


def exit_status(function: Callable[[], Any], shows: bool = False) -> int:
    """Call an entry point's body and return the exit status.

    0; 2 for a user's mistake; 128 + N for signal N, which is also what a program ends with that `shows` (its output is
    its result) and whose reader has gone, as `| head` does. Other programs go on without a reader.
    """
    console.guard(needed=shows)
    try:
        try:
            function()
        finally:
            sys.stdout.flush()
            console.tell_lost_output()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except console.OutputLost as error:
        if error.reader_left:
            return 128 + SIGPIPE
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None or error.errno not in OF_THE_MACHINE:
            raise
        name = str(error.filename)
        name = name if len(name) <= SHOWN else f"{name[:SHOWN]}... ({len(name)} characters)"
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signum", SIGINT)
    return 0
