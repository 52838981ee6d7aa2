"""The cache of compiled kernels, and the processor's kernels: one source into a shared library on first use.

A file of the cache is named by everything that decides its content (sources, flags, compiler, processor or card), so a
stale one is never loaded, and it appears under its name only when complete, so any number of processes may start at
once. The sources include no PyTorch header: a build takes seconds and is bound to no PyTorch version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rwkv_bone.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# An installed package has the kernels inside it, a checkout beside src/.
SOURCES = PACKAGE / "cuda" if (PACKAGE / "cuda").is_dir() else PACKAGE.parents[1] / "cuda"
CPU_COMPILERS = ("g++", "c++", "clang++")
CPU_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
MISSING = "the kernel source {} is missing: install rwkv-bone again, or run from a complete clone of the repository"


class BuildError(UserError):
    """No library: a compiler is missing, or it failed. The text says which, and what to do."""


def default_cache() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/rwkv_bone, normally ~/.cache/rwkv_bone."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_bone"


def cpu_library(operator: str, cache: Path | None = None) -> Path:
    """The library of cuda/cpu/<operator>.cpp, compiled if need be. Raises BuildError."""
    named = os.environ.get("CXX", "").split()
    for words in [named] if named else [[name] for name in CPU_COMPILERS]:
        if compiler := shutil.which(words[0]):
            return _library(SOURCES / "cpu" / f"{operator}.cpp", [compiler, *words[1:], *CPU_FLAGS], cache)
    if named:
        raise BuildError(f"CXX={' '.join(named)}: there is no such compiler; correct the variable, or unset it")
    raise BuildError("no C++ compiler was found (looked for g++, c++, clang++): install one, e.g. `apt install g++`")


def kept(name: str, make: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The cache's file of this name; `make(path)` writes it if it is not there. Raises BuildError."""
    cache = default_cache() if cache is None else cache
    target = cache / name
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=cache) as folder:
            if not target.exists():
                made = Path(folder) / name
                make(made)
                os.replace(made, target)
    except OSError as problem:
        raise BuildError(
            f"cannot write to the kernel cache {cache} ({problem.strerror}): set XDG_CACHE_HOME to a writable folder"
        ) from problem
    return target


def _library(source: Path, command: list[str], cache: Path | None) -> Path:
    if not source.is_file():
        raise BuildError(MISSING.format(source))
    name = f"{source.stem}-{source.suffix[1:]}-{_fingerprint(source, command)}.so"
    return kept(name, lambda made: _compile([*command, str(source), "-o", str(made)]), cache)


def _fingerprint(source: Path, command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((command, version, platform.machine())).encode())
    for path in sorted(p for p in source.parent.iterdir() if p == source or p.suffix == ".h"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compile(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-12:])
        raise BuildError(f"compiling a kernel failed with `{' '.join(command)}`; the compiler's last lines:\n{last}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time build; the others find its result. Released by the system if a process dies."""
    import fcntl  # POSIX only, like the flags above

    with open(path, "w") as file:
        # Some network file systems have no locks. Then several processes do the same work: each renames a whole file.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
