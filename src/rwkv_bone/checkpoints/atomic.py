"""Files that appear whole or not at all, whatever happens: an error, a full disk, a kill, a power cut.

A file is written under a temporary name beside its own, `.NAME.HOST-PID-RANDOM.partial`, and synced. Then it gets its
name, and the folder is synced. The writer holds a lock on the temporary file (`locks.py`). So the next writer of the
same name knows what a dead one has left, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from rwkv_bone.errors import UserError
from rwkv_bone.locks import NoLocks, hold

LONGEST_NAME = 255  # bytes, where the system does not say
LONGEST_SUFFIX = 16  # bytes; what is longer is no suffix that a program goes by
DAY = 24 * 3600  # seconds without a change after which a file of another machine's process was left behind
NO_LINKS = {errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
NOT_SYNCED = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False, previous: Path | None = None) -> Iterator[Path]:
    """A file beside `path`, empty, that becomes `path` when the block ends well and vanishes when it does not.

    The block writes into this file under its temporary name, which ends in the suffix of `path`. previous: the name,
    in the same folder, that a file which stands at `path` then gets, in place of being replaced.
    UserError when `path` exists and `overwrite` is not set, or when the disk refuses the write; what stood at `path`
    is then still there, or (if its new name was the last thing that worked) at `previous`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise _kept(path)
    try:
        make_folder(path.parent)
        with temporary_beside(path) as (temporary, descriptor):
            yield temporary
            if not os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                raise OSError(errno.ESTALE, f"{temporary.name} became another file while it was written")
            # Through the descriptor that was open all the time: no second opening can fail, and every error that the
            # disk has had with these bytes is seen.
            os.fsync(descriptor)
            if previous and path.exists():
                os.replace(path, previous)
            _name(temporary, path, overwrite)
            sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def _name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a temporary file to `path`. UserError if something stands there and `overwrite` is not set."""
    if not overwrite:
        try:
            # Unlike a renaming, it fails where somebody has taken the name since it was looked at.
            os.link(temporary, path)
        except FileExistsError:
            raise _kept(path) from None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(path):
                raise _kept(path) from None
        else:
            os.unlink(temporary)
            return
    os.replace(temporary, path)


def _kept(path: Path) -> UserError:
    return UserError(f"{path} exists and is kept: give another name, or --overwrite")


@contextlib.contextmanager
def temporary_beside(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """(an empty file, or folder, with a temporary name beside `path`; its descriptor, which holds its lock).

    What has this temporary name at the end is removed; so the block renames what is to stay. What dead writers of
    `path` have left is removed first. The parent folder must exist. OSError as the system raises it.
    """
    for left in leftovers(path):
        _remove(left)
    while True:
        temporary = path.with_name(_temporary_name(path))
        if folder:
            os.mkdir(temporary)
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if _is_mine(temporary, descriptor):
                yield temporary, descriptor
                return
        finally:
            _remove(temporary)
            os.close(descriptor)


def _is_mine(temporary: Path, descriptor: int) -> bool:
    """Take the lock of a file just made. False if another process has taken it first, for what a dead one had left."""
    with contextlib.suppress(NoLocks):
        if not hold(descriptor):
            return False
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(temporary))
    except FileNotFoundError:
        return False


def leftovers(path: Path) -> list[Path]:
    """The temporary files and folders of writers of `path` that are dead.

    Where the file system has no locks, none is known to be.
    """
    start, end = _around(path)
    pattern = re.compile(re.escape(start) + r"([0-9a-f]{6})-[0-9]+-[0-9a-f]{8}\.partial" + re.escape(end))
    found = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and _is_abandoned(Path(entry.path), match[1] == _host()):
                found.append(Path(entry.path))
    return sorted(found)


def _is_abandoned(path: Path, made_here: bool) -> bool:
    """Whether nobody holds the lock of a temporary file or folder. Its maker may be on another machine, whose locks are
    not always seen here: then it must also be old."""
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
        descriptor = os.open(path, flags | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return hold(descriptor) and (made_here or time.time() - os.fstat(descriptor).st_mtime > DAY)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> str:
    start, end = _around(path)
    return f"{start}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial{end}"


def _around(path: Path) -> tuple[str, str]:
    """What a temporary name for `path` begins and ends with: its name, as far as there is room, and its suffix."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= LONGEST_SUFFIX else ""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        longest = LONGEST_NAME
    name = os.fsencode(path.name)
    room = longest - len("..123456-1234567-12345678.partial") - len(os.fsencode(suffix))
    if len(name) <= room:
        return f".{path.name}.", suffix
    mark = hashlib.sha256(name).hexdigest()[:8]
    # No half of a character stays.
    return f".{name[: max(0, room - 9)].decode(errors='ignore')}-{mark}.", suffix


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; a system that refuses is let be."""
    try:
        os.unlink(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut. OSError as the system raises it."""
    missing = []
    while not path.is_dir() and path != path.parent:
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(path: str | Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system and its rights allow that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SYNCED:
            raise
    finally:
        os.close(descriptor)
