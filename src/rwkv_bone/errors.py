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
TIME_UP = 1000  # stands among the numbers of signals for the end of --max_minutes
TIMED_OUT = 124  # the exit status of `timeout`


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
    """A signal, or TIME_UP, ended the run between two steps, with everything saved.

    The entry points print the message, if there is one, and exit with `status_of(signum)`.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal, or one between the steps, ended the run where it was."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


def status_of(number: int) -> int:
    """The exit status of a program that signal `number` has ended, as a shell reports it; 124 for TIME_UP."""
    return TIMED_OUT if number == TIME_UP else 128 + number


def sentence(error: BaseException) -> str:
    """What to tell a user whose mistake this error is; nothing if it is a defect of this project."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.errno in OF_THE_MACHINE:
        name = str(error.filename)
        name = name if len(name) <= SHOWN else f"{name[:SHOWN]}... ({len(name)} characters)"
        return f"{name}: {error.strerror}"
    return ""


def exit_status(function: Callable[[], Any], shows: bool = False) -> int:
    """Call an entry point's body and return the exit status.

    0; 2 for a user's mistake; 124 for a run whose time was up; 128 + N for signal N, which is also what a program ends
    with that `shows` (its output is its result) and whose reader has gone, as `| head` does. Other programs go on
    without a reader.
    """
    console.guard(needed=shows)
    try:
        try:
            function()
        finally:
            sys.stdout.flush()
            console.tell_lost_output()
    except console.OutputLost as error:
        if error.reader_left:
            return 128 + SIGPIPE
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        if not (words := sentence(error)):
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return status_of(stop.signum)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return status_of(getattr(stop, "signum", SIGINT))
    return 0
