"""Python's packages against the versions that were tested, with the standard library alone."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rwkv_bone.doctor.finding import FINE, PROBLEM, WARNING, Finding

REPOSITORY = Path(__file__).resolve().parents[3]
PIP = f"{shlex.quote(sys.executable)} -m pip install"
# Packages of requirements.txt without which a run trains all the same.
UNNEEDED = {"ninja": "DeepSpeed compiles nothing here", "pyyaml": "only --config with a YAML file needs it"}
OPTIONAL = {
    "data": "Parquet, Arrow, CSV and dataset folders",
    "hf": "Hugging Face models: train_hf.py",
    "bnb": "faster nf4 and fp4 on GPUs",
    "gguf": "GGUF files, for llama.cpp",
    "report_to": "TensorBoard and the like: --report_to",
}


class Wanted(NamedTuple):
    """A requirement: name, bounds such as `>=2.8,<2.15`, and the extra that it belongs to; "" = every run needs it."""

    name: str
    bounds: str
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.bounds}"


def wanted(repository: Path = REPOSITORY) -> list[Wanted]:
    """What the requirements files name; where the package is installed without them, its metadata."""
    if (repository / "requirements.txt").is_file():
        files = {"": repository / "requirements.txt"}
        files |= {path.stem: path for path in sorted((repository / "requirements").glob("*.txt"))}
        lines = [(line, extra) for extra, path in files.items() for line in path.read_text("utf-8").splitlines()]
    else:
        try:
            lines = [(line, "") for line in metadata.requires("rwkv-bone") or ()]
        except metadata.PackageNotFoundError:
            lines = []
    return [found for line, extra in lines if (found := _parsed(line, extra))]


def _parsed(line: str, extra: str) -> Wanted | None:
    requirement, _, marker = line.partition("#")[0].partition(";")
    found = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", requirement.strip())
    if not found or line.startswith("-"):
        return None
    named = re.search(r"extra\s*==\s*['\"](\w+)['\"]", marker)
    return Wanted(found[1], found[2].replace(" ", ""), named[1] if named else extra)


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> 2, 13, 0; without zeros at the end, so that 2.0 equals 2."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def within(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds such as `>=2.8,<2.15`, of releases alone."""
    have = numbers(version)
    tests = {">=": have.__ge__, "<=": have.__le__, "==": have.__eq__, "<": have.__lt__, ">": have.__gt__}
    for bound in filter(None, bounds.split(",")):
        found = re.fullmatch(r"(>=|<=|==|<|>)(.+)", bound)
        if found and not tests[found[1]](numbers(found[2])):
            return False
    return True


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _remedy(names: str) -> str:
    if (REPOSITORY / "requirements.txt").is_file():
        return (
            "sh scripts/setup.sh (makes .venv in the repository, as the run scripts do by themselves; it changes "
            f"nothing else)\nor, into this Python: {PIP} -r {shlex.quote(str(REPOSITORY / 'requirements.txt'))}"
        )
    return f"{PIP} {names}"


def look() -> Iterator[Finding]:
    """Python itself (an older one than 3.10 cannot read this), what every run needs, and what is optional."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(FINE, "Python", f"{python}, {sys.executable}", "", python)
    missing, other, there, optional = [], [], [], []
    for one in wanted():
        found = installed(one.name)
        if one.extra:
            use = OPTIONAL.get(one.extra, one.extra)
            if found and not within(found, one.bounds):
                other.append((one, found))
            optional.append(f"{one.name} {found}" if found else f"{one.name} not installed ({use})")
        elif found is None and one.name.lower() in UNNEEDED:
            why = UNNEEDED[one.name.lower()]
            remedy = f"{PIP} '{one}'"
            yield Finding(WARNING, "packages", f"{one.name} is not installed: {why}", remedy)
        elif found is None:
            missing.append(one)
        elif not within(found, one.bounds):
            other.append((one, found))
        else:
            there.append(f"{one.name} {found}")
    if missing:
        names = " ".join(f"'{one}'" for one in missing)
        yield Finding(PROBLEM, "packages", f"not installed: {', '.join(map(str, missing))}", _remedy(names))
    for one, found in other:
        remedy = f"{PIP} '{one}'"
        yield Finding(WARNING, "packages", f"{one.name} {found} is installed; tested is {one.bounds}", remedy)
    if there:
        yield Finding(FINE, "packages", ", ".join(there))
    if optional:
        yield Finding(FINE, "optional", ", ".join(optional))
