"""What runs in the child process of `code.run`: it binds itself by limits, runs a program and its check, and reports.

`code.py` starts this text with `python -c`, so it imports the standard library only. The request comes as JSON on the
standard input, the report goes as one line of JSON to the descriptor that the request names.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

NAME = "solution"  # the module that the program becomes; not __main__, so that a demonstration in it does not run
MB = 2**20
WRITTEN = 16 * MB  # bytes of the longest file it may write
OPEN_FILES = 64
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of https://docs.python.org/3/library/audit_events.html that change a file: where among the arguments the paths
# stand that must lie in the working folder, and where the descriptors of the folders they are relative to.
CHANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "os.remove": ((0,), (1,)),
    "os.rmdir": ((0,), (1,)),
    "os.mkdir": ((0,), (2,)),
    "os.rename": ((0, 1), (2, 3)),
    "os.link": ((0, 1), (2, 3)),
    "os.symlink": ((1,), (2,)),
    "os.chmod": ((0,), (2,)),
    "os.chown": ((0,), (3,)),
    "os.utime": ((0,), (3,)),
    "os.truncate": ((0,), ()),
    "os.setxattr": ((0,), ()),
    "sqlite3.connect": ((0,), ()),
    "shutil.rmtree": ((0,), ()),
    "shutil.move": ((0, 1), ()),
}
REFUSED = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "subprocess.Popen",
    "pty.spawn",
}
REFUSED |= {"os.kill", "os.killpg", "signal.pthread_kill", "resource.setrlimit", "resource.prlimit"}
REFUSED |= {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}


def limit(seconds: float, wall: float, memory_mb: int) -> None:
    """CPU time, memory, sizes of files, and an alarm that ends this process should its parent be gone."""
    cpu = math.ceil(seconds) + 1
    for what, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_mb * MB),
        (resource.RLIMIT_FSIZE, WRITTEN),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of the address space
            resource.setrlimit(what, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(math.ceil(wall) + 1)


def watch(folder: str) -> None:
    """Refuse, for the rest of this process, what would reach beyond `folder`: changed files, processes, the network."""
    realpath, join, fspath, fsdecode, readlink = os.path.realpath, os.path.join, os.fspath, os.fsdecode, os.readlink
    inside = realpath(folder)

    def reaches_out(path: Any, descriptor: int = -1) -> bool:
        if isinstance(path, int):
            return False
        base = readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
        full = realpath(join(base, fsdecode(fspath(path))))
        return full != inside and not full.startswith(inside + "/") and full != "/dev/null"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            out = bool(arguments[2] & WRITES) and reaches_out(arguments[0])
        elif event in CHANGES:
            paths, descriptors = CHANGES[event]
            below = [arguments[at] for at in descriptors] or [-1]
            out = any(reaches_out(arguments[path], below[min(i, len(below) - 1)]) for i, path in enumerate(paths))
        else:
            out = event in REFUSED or (event == "socket.__new__" and arguments[1] != 1)  # 1: AF_UNIX
        if out:
            raise PermissionError(f"{event} is refused")

    sys.addaudithook(hook)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refusing to return objects of classes that the program defines: they could equal anything."""

    def foreign(value: Any, depth: int = 0) -> bool:
        if type(value).__module__ == NAME:
            return True
        if depth == 3 or not isinstance(value, (list, tuple, set, frozenset, dict)):
            return False
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return any(foreign(part, depth + 1) for part in parts)

    def call(*arguments: Any, **named: Any) -> Any:
        value = function(*arguments, **named)
        if foreign(value):
            raise TypeError("the answer holds an object of the program's own class")
        return value

    return call


def perform(program: str, check: str, entry_point: str) -> str:
    """Run both; why it failed, or nothing."""
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    before = dict(vars(builtins))
    source = program
    try:
        exec(compile(program, f"<{NAME}>", "exec"), vars(module))
        # The check sees Python as it was: what the program has put in place of built-in functions is taken back.
        sys.settrace(None)
        sys.setprofile(None)
        vars(builtins).update(before)
        names = dict(vars(module), __builtins__=builtins)
        if entry_point:
            if not callable(function := names.get(entry_point)):
                return f"it defines no function {entry_point}"
            names = {name: value for name, value in names.items() if name not in before or name.startswith("__")}
            names[entry_point] = guarded(function)
        source = check
        exec(compile(check, "<check>", "exec"), names)
        if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
            return "it left threads running"
    except BaseException as error:
        return described(error, source)
    return ""


def described(error: BaseException, source: str) -> str:
    """The error in a line; of a failed assertion without words, the line that asserts."""
    words = str(error)
    if isinstance(error, AssertionError) and not words:
        line, trace = 0, error.__traceback__
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<check>" else line
            trace = trace.tb_next
        words = source.splitlines()[line - 1].strip() if line else ""
    if isinstance(error, MemoryError):
        words = "more than the memory allowed"
    return " ".join(f"{type(error).__name__}: {words}".split())[:300]


def main() -> None:
    """Answer the one request."""
    request = json.load(sys.stdin)  # to its end: a program that asks for input then finds none
    write, leave, report = os.write, os._exit, request["report"]
    limit(request["seconds"], request["wall"], request["memory_mb"])
    watch(os.getcwd())
    reason = perform(request["program"], request["check"], request["entry_point"])
    write(report, json.dumps({"token": request["token"], "reason": reason}).encode() + b"\n")
    leave(0)  # threads and exit handlers that the program has left do not run on


if __name__ == "__main__":
    main()
