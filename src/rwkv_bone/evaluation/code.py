r"""Programs that a model wrote, run to see whether they pass their tests: in a child process, with limits.

This is not a security boundary. It keeps a mistaken program from doing harm and from passing; code that is written to
break out will. Run evaluations of models that you do not trust in a container or virtual machine of their own.

What it holds off, on Linux and macOS: endless loops (CPU time, and a wall clock for sleepers), memory beyond a bound
(Linux only), floods of output, files longer than 16 MB, waiting for input, ending the process before the test, threads
and processes left behind; and, as Python announces them to an audit hook, changing files outside a temporary folder,
starting processes, sending signals, and the network.

What it does not: reading any file that you can read; anything done past Python's own functions (`ctypes`, an extension
module), such as forking and leaving the session; filling the disk with many small files; a program that looks for the
runner's own variables to report success itself, or changes library functions that the check uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.extract import after_thinking, code_block

# Where a base model's function has ended: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SECONDS = 3.0  # of CPU time; openai/human-eval allows 3 on the clock, which a busy machine would make a lottery
MEMORY_MB = 1024
CLOCK, GRACE = (
    4,
    4.0,
)  # on the clock a program has CLOCK times its seconds and GRACE more, for it may have to wait its turn
REPORTED = 2**16  # bytes of the longest report


class Outcome(NamedTuple):
    """passed: the program and its check ran to their ends. reason: why not, in a line; "passed" otherwise."""

    passed: bool
    reason: str


def solution(prompt: str, completion: str, entry_point: str) -> str:
    """The program that a completion of HumanEval's prompt stands for: prompt + body, or the function written again.

    A base model continues the prompt, and its text ends at the first of `STOPS`: this is the published rule (HumanEval,
    pass@k). Chat models write a fenced block, explain it, or write the whole function again, with imports; then what
    they wrote follows the prompt, whose helper functions stay. A block that is a bare body is indented.
    """
    text = after_thinking(completion)
    header = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    starts = re.match(r"\n*(?: {4}|\t| {0,3}(?:(?:async def|def|from|import|class)\b|@))", text)
    # A text that starts as code has no fence, or its first one closes one that the prompt has opened.
    text = text.partition("\n```")[0] if starts else text
    block = None if starts else code_block(text, f"def {entry_point}(")
    if block is not None:
        if header.search(block):
            return _after(prompt, block)
        lines = [line for line in block.splitlines() if line.strip()]
        return prompt + (block if lines and lines[0][0] in " \t" else textwrap.indent(block, "    ")) + "\n"
    if starts and not starts[0].endswith(("    ", "\t")):
        text = text.lstrip()
    if header.search(text):
        return _after(prompt, _unfenced(text, header))
    ends = [text.index(stop) for stop in STOPS if stop in text]
    return prompt + text[: min(ends, default=len(text))] + "\n"


def _after(prompt: str, code: str) -> str:
    """Code that defines the prompt's function anew; the prompt goes first, for its imports and helpers."""
    return f"{prompt.rstrip()}\n    pass\n\n\n{code}\n" if prompt.strip() else f"{code}\n"


def _unfenced(text: str, header: re.Pattern[str]) -> str:
    """The lines of a text from the first that is code to the last of the function's definition."""
    code = re.compile(r"\s|(?:async )?def |class |import |from |@|#|[A-Za-z_]\w* ?(?::[^=]*)?= |[)\]}\"']|\Z")
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if header.match(line))
    first = at if not code.match(lines[0]) else 0
    while first > 0 and code.match(lines[first - 1]):
        first -= 1
    last = at + 1
    while last < len(lines) and code.match(lines[last]):
        last += 1
    return "\n".join(lines[first:last])


def human_eval(
    item: Mapping[str, str], completion: str, *, seconds: float = SECONDS, memory_mb: int = MEMORY_MB
) -> Outcome:
    """Whether a completion passes the tests of HumanEval's item: its `prompt`, `test` and `entry_point`."""
    program = solution(item["prompt"], completion, item["entry_point"])
    check = f"{item['test']}\n\ncheck({item['entry_point']})\n"
    return run(program, check=check, entry_point=item["entry_point"], seconds=seconds, memory_mb=memory_mb)


def run(
    program: str, *, check: str = "", entry_point: str = "", seconds: float = SECONDS, memory_mb: int = MEMORY_MB
) -> Outcome:
    """Run a program, then its check, in a child process; passed if both end without an error. Threads may call it.

    check: code that tests the program, and sees what it has defined; kept apart from it, a program cannot swallow its
    check, and what it has put in place of built-in functions does not serve there. entry_point: the function that the
    check calls; it must return no objects of the program's own classes, which could equal anything.
    seconds: of CPU time; on the clock it may take longer (`CLOCK`, `GRACE`). memory_mb: of address space.
    """
    if os.name != "posix":
        raise UserError(
            "--execute_code 1 needs Linux or macOS: here no limits can be set to the code that a model wrote"
        )
    wall = CLOCK * seconds + GRACE
    request = {"program": program, "check": check, "entry_point": entry_point, "token": secrets.token_hex(16)}
    with tempfile.TemporaryDirectory(prefix="rwkv-bone-code-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        try:
            process = _start(folder, writing)
        finally:
            os.close(writing)
        try:
            limits = {"report": writing, "seconds": seconds, "wall": wall, "memory_mb": memory_mb}
            assert process.stdin
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps({**request, **limits}).encode())
            line, late = _report(process, reading, time.monotonic() + wall)
        finally:
            behind = _kill(process)
            os.close(reading)
    outcome = _outcome(line, request["token"], late, process.returncode, seconds, wall)
    return Outcome(False, "it left processes running") if outcome.passed and behind else outcome


def _start(folder: str, writing: int) -> subprocess.Popen[bytes]:
    source = Path(__file__).with_name("sandbox.py").read_text(encoding="utf-8")
    given = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment = {**given, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}
    environment |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    return subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(writing,),
        start_new_session=True,
    )


def _report(process: subprocess.Popen[bytes], reading: int, deadline: float) -> tuple[bytes, bool]:
    """The line that the child writes, and whether its time was up. It may be empty, or end early.

    A process that the child has left behind can hold the pipe, so this does not wait for the pipe's end alone.
    """
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if wait([reading], min(left, 0.1)):
            chunk = os.read(reading, REPORTED)
            data += chunk
            if not chunk or b"\n" in data or len(data) > REPORTED:
                return data, False
        elif process.poll() is not None:
            return data, False
    return data, True


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """End the child and the processes of its session; whether it had ended itself and left some behind."""
    if process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)  # one that has reported is about to end
    ended = process.returncode is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        ended = False
    process.wait()
    return ended


def _outcome(line: bytes, token: str, late: bool, status: int, seconds: float, wall: float) -> Outcome:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        report = json.loads(line)
        if report["token"] == token:
            return Outcome(not report["reason"], report["reason"] or "passed")
    if late:
        return Outcome(False, f"it did not end within {wall:g} s")
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return Outcome(False, f"more than {seconds:g} s of CPU time")
    if status < 0:
        return Outcome(False, f"ended by {signal.Signals(-status).name}")
    return Outcome(False, f"it ended itself before its check was over (exit status {status})")
