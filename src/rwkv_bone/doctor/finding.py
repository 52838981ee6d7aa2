"""What the doctor finds, and how it is told: problems first, and a block that gives nobody away."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_bone.console import counted

PROBLEM, WARNING, FINE = "problem", "warning", "fine"
TITLES = {
    PROBLEM: "Problems: training does not work until these are solved",
    WARNING: "Warnings: training works, with these drawbacks",
    FINE: "Fine",
}
PATH = re.compile(r"(?<![\w:/.<])/(?:[^\s'\"`:;,()<>/]+/)+")  # the folders of an absolute path


class Finding(NamedTuple):
    level: str
    what: str  # in a word or two: `memory`
    text: str
    remedy: str = ""  # what to type or do
    # What the block says instead of `text`, where that holds a value of the environment.
    public: str = ""


def report(findings: Iterable[Finding], version: str) -> Iterator[str]:
    """All findings as lines: each problem with its remedy, what is fine, and the block for a report of a bug."""
    found = list(findings)
    for level, title in TITLES.items():
        some = [finding for finding in found if finding.level == level]
        if not some:
            continue
        yield f"{title}"
        for finding in some:
            yield from _lines(finding)
        yield ""
    yield "For a report, copy from here; no names, folders or values of your environment are in it:"
    yield "```text"
    yield f"rwkv-bone {version}"
    for level in TITLES:
        for finding in found:
            if finding.level == level:
                mark = "" if level == FINE else f"{level.upper()} "
                first, *more = anonymous(finding.public or finding.text).splitlines() or [""]
                yield f"{mark}{finding.what}: {first}"
                yield from (f"    {line}" for line in more)
    yield "```"
    yield ""
    yield verdict(found)


def verdict(found: Iterable[Finding]) -> str:
    levels = [finding.level for finding in found]
    problems, warnings = levels.count(PROBLEM), levels.count(WARNING)
    also = f" ({counted(warnings, 'warning')})" if warnings else ""
    if problems:
        return f"not fit   {counted(problems, 'problem')}{also}: what to do stands with each, above"
    return f"fit       this machine can train{also}"


def _lines(finding: Finding) -> Iterator[str]:
    first, *more = finding.text.splitlines() or [""]
    yield f"  {finding.what:<12} {first}"
    yield from (f"  {'':<12} {line}" for line in more)
    for number, line in enumerate(finding.remedy.splitlines()):
        yield f"  {'':<12} {'do:' if number == 0 else '   '} {line}"


def anonymous(text: str) -> str:
    """The text without this machine's and this user's names, and with absolute paths by their last names alone."""
    places = {str(Path.home()): "<home>", os.getcwd(): "<here>", tempfile.gettempdir(): "<tmp>", sys.prefix: "<python>"}
    places |= {os.path.realpath(place): name for place, name in places.items()}
    for place, name in sorted(places.items(), key=lambda item: -len(item[0])):
        if len(place) > 1:
            text = text.replace(place, name)
    text = PATH.sub(".../", text)
    for word, name in _names():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", name, text)
    return text


def _names() -> Iterator[tuple[str, str]]:
    """(a name of this machine or user, what stands for it)."""
    host = socket.gethostname()
    yield from ((word, "<host>") for word in dict.fromkeys((host, host.partition(".")[0])) if word)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # of a number without a name, as in many containers
        return
    if user != "root":
        yield user, "<user>"
