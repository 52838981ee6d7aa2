"""What a disk may hold after a power cut: a model of a file system that promises no more than POSIX does.

- A file's content is safe when a sync of that file has returned. What was written since may be there, be cut at any
  byte, be missing in any pages, or be zeros: the file then has its new size, as with delayed allocation.
- A name (made, renamed, linked, removed) is safe when a sync of its folder has returned. Of the changes since, any may
  be missing, but those of one name take effect in their order. A rename happens whole or not at all.
- Nothing of a file says anything of its name, and the other way round.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.faults.shim import Operation

PAGE = 512  # bytes: small files, small pages
EXCHANGE = 2  # renameat2's flag


class _File:
    """A file whatever its names are: the content that is safe, and what was done to it since, in order."""

    def __init__(self, content: bytes = b""):
        self.safe = content
        self.pending: list[tuple[int, bytes | None]] = []  # (offset, data), or (size, None)

    def sync(self) -> None:
        self.safe, self.pending = _applied(self.safe, self.pending), []

    def after_cut(self, draw: random.Random) -> bytes:
        if not self.pending:
            return self.safe
        whole = _applied(self.safe, self.pending)
        what = draw.randrange(6)
        if what == 0:
            return self.safe
        if what == 1:
            return whole
        if what == 2:  # of the changes in order, the last cut short
            kept = self.pending[: draw.randrange(1, len(self.pending) + 1)]
            offset, data = kept[-1]
            if data:
                kept[-1] = offset, data[: draw.randrange(len(data) + 1)]
            return _applied(self.safe, kept)
        size = len(whole)
        pages = [
            self.safe[at : at + PAGE].ljust(min(PAGE, size - at), b"\0")[: size - at] for at in range(0, size, PAGE)
        ]
        if what == 3:  # the size and nothing else
            return b"".join(pages)
        if what == 4:  # the size, and pages up to some
            begin = draw.randrange(len(pages) + 1)
            return b"".join([whole[: begin * PAGE], *pages[begin:]])[:size]
        return b"".join(
            whole[i * PAGE : (i + 1) * PAGE] if draw.random() < 0.7 else page for i, page in enumerate(pages)
        )


def _applied(content: bytes, changes: Iterable[tuple[int, bytes | None]]) -> bytes:
    result = bytearray(content)
    for offset, data in changes:
        if data is None:
            result = result[:offset].ljust(offset, b"\0")
        else:
            result = result.ljust(offset, b"\0")
            result[offset : offset + len(data)] = data
    return bytes(result)


class _Folder:
    """The names that are safe, and the changes since: each gives names a file or folder, or None."""

    def __init__(self) -> None:
        self.safe: dict[str, _File | _Folder] = {}
        self.pending: list[dict[str, _File | _Folder | None]] = []

    def now(self) -> dict[str, _File | _Folder]:
        return _named(self.safe, self.pending)

    def sync(self) -> None:
        self.safe, self.pending = self.now(), []

    def after_cut(self, draw: random.Random) -> dict[str, _File | _Folder]:
        missing_share, missing, kept = draw.choice((0.0, 0.1, 0.5, 1.0)), set(), []
        for change in self.pending:
            if missing.isdisjoint(change) and draw.random() >= missing_share:
                kept.append(change)
            else:
                missing |= set(change)
        return _named(self.safe, kept)


def _named(names: dict, changes: Iterable[dict]) -> dict:
    result = dict(names)
    for change in changes:
        result |= change
    return {name: what for name, what in result.items() if what is not None}


class Disk:
    """The folder `root` as it was before the first operation, all of it safe, and the operations since.

    Files are found by their names, and written to by their inodes, which a file keeps when its name changes.
    """

    def __init__(self, root: str | Path):
        self.root = str(root)
        self.top = _Folder()
        self._open: dict[int, _File] = {}  # inode -> file
        self._read(self.top, Path(root))

    def _read(self, folder: _Folder, path: Path) -> None:
        if not path.is_dir():
            return
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                inner = folder.safe[entry.name] = _Folder()
                self._read(inner, path / entry.name)
            else:
                file = folder.safe[entry.name] = _File(Path(entry.path).read_bytes())
                self._open[entry.inode()] = file

    def _place(self, path: str) -> tuple[_Folder, str]:
        """(the folder that a path lies in, its last name)."""
        *above, name = os.path.relpath(path, self.root).split("/")
        folder = self.top
        for part in above:
            inner = folder.now()[part]
            assert isinstance(inner, _Folder), path
            folder = inner
        return folder, name

    def _folder_at(self, path: str) -> _Folder | None:
        if os.path.relpath(path, self.root) == ".":
            return self.top
        folder, name = self._place(path)
        found = folder.now().get(name)
        return found if isinstance(found, _Folder) else None

    def do(self, operation: Operation) -> None:
        """One operation that took place."""
        kind, path = operation.kind, operation.path
        if kind == "create":
            folder, name = self._place(path)
            file = self._open[operation.file] = _File()
            folder.pending.append({name: file})
        elif kind == "write":
            self._open[operation.file].pending.append((operation.offset, operation.data))
        elif kind == "truncate":
            self._open[operation.file].pending.append((operation.offset, None))
        elif kind == "sync":
            what = self._folder_at(path) if " (deleted)" not in path else None
            (what or self._open[operation.file]).sync()
        elif kind == "mkdir":
            folder, name = self._place(path)
            folder.pending.append({name: _Folder()})
        elif kind in ("unlink", "rmdir"):
            folder, name = self._place(path)
            folder.pending.append({name: None})
        elif kind in ("rename", "link"):
            (old, name), (new, other) = self._place(path), self._place(operation.other)
            what = old.now()[name]
            if kind == "rename" and operation.offset == EXCHANGE:
                assert old is new
                new.pending.append({name: new.now()[other], other: what})
                return
            gone = {} if kind == "link" else {name: None}
            if old is new:
                new.pending.append(gone | {other: what})
            else:  # between two folders: they are not synced together, so that either half may be missing
                new.pending.append({other: what})
                old.pending.append(gone)

    def after_cut(self, seed: int) -> dict[str, bytes | None]:
        """One state that a power cut now may leave: {path: content, None for a folder}. Equal seeds, equal states."""
        return dict(self._after_cut(self.top, "", random.Random(seed), {}))

    def _after_cut(self, folder: _Folder, above: str, draw: random.Random, contents: dict[int, bytes]) -> Iterator:
        for name, what in sorted(folder.after_cut(draw).items()):
            if isinstance(what, _Folder):
                yield above + name, None
                yield from self._after_cut(what, f"{above}{name}/", draw, contents)
                continue
            # A file with two names has one content.
            if id(what) not in contents:
                contents[id(what)] = what.after_cut(draw)
            yield above + name, contents[id(what)]

    def write_after_cut(self, target: Path, seed: int) -> None:
        """Make the new folder `target` hold such a state."""
        target.mkdir()
        for name, content in self.after_cut(seed).items():
            (target / name).mkdir() if content is None else (target / name).write_bytes(content)


def cut_at(disk: Disk, operations: Sequence[Operation]) -> Disk:
    """The disk after these operations; a convenience for short traces."""
    for operation in operations:
        disk.do(operation)
    return disk
