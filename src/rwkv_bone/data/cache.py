"""Tokenised data on disk, under a name that is a hash of everything it was made from.

An entry is a folder of flat arrays, which readers map into memory, and `meta.json`, which says what they are. It is
made under a temporary name and renamed, so that a reader sees all of it or nothing. If several processes want
the same entry, one makes it and the others wait. On a file system without locks each makes it, and the first one stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from rwkv_bone.errors import UserError

FOLDER = ".rwkv_bone_cache"
META = "meta.json"
SMALL = 1 << 20  # bytes of data below which nothing is cached: tokenising takes no longer than looking it up
HASHED = 1 << 26  # bytes; a file up to this size is hashed each time, a larger one only if its dates change
LIBRARIES = ("datasets", "jinja2", "pyarrow", "pyrwkv-tokenizer", "tokenizers")
CHECKED = 1 << 28  # bytes; the checksum of an array up to this size is compared each time


class Arrays:
    """Flat arrays that grow, in memory or as files of a folder."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._parts: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, list] = {}  # name -> [file, dtype, count, checksum]

    def append(self, **arrays: np.ndarray | None) -> None:
        """Append values [n] to the array of each name; nothing for None."""
        for name, array in arrays.items():
            if array is None:
                continue
            if self._folder is None:
                self._parts.setdefault(name, []).append(array)
                continue
            if name not in self._files:
                self._files[name] = [open(self._folder / name, "wb"), array.dtype.str, 0, 0]
            record, data = self._files[name], np.ascontiguousarray(array).data.cast("B") if array.size else b""
            record[0].write(data)
            record[2] += array.size
            record[3] = zlib.crc32(data, record[3])

    def drop(self, name: str) -> None:
        """Forget what was appended under `name`, if anything was."""
        self._parts.pop(name, None)
        if record := self._files.pop(name, None):
            assert self._folder is not None  # files lie there
            record[0].close()
            (self._folder / name).unlink()

    def finish(self) -> dict[str, np.ndarray]:
        """{name: all that was appended under it}. Closes the files; `described` then describes them."""
        if self._folder is None:
            return {name: np.concatenate(parts) for name, parts in self._parts.items()}
        for record in self._files.values():
            record[0].flush()
            os.fsync(record[0].fileno())
            record[0].close()
        return {name: _mapped(self._folder / name, *record[1:3]) for name, record in self._files.items()}

    def described(self) -> dict[str, dict]:
        """{name: dtype, number of values and checksum} of the files."""
        return {name: {"dtype": r[1], "count": r[2], "crc32": r[3]} for name, r in self._files.items()}

    def close(self) -> None:
        for record in self._files.values():
            record[0].close()


Entry = tuple[dict[str, np.ndarray], dict]  # (arrays, what else was recorded)
Build = Callable[[Arrays], dict]  # fills the arrays and returns what else to record, as JSON


class Cache:
    """The entries of one folder, and the hashes of the files that they were made from.

    keep: False writes nothing: what is there is read, and what is not is made in memory.
    """

    def __init__(self, data: Path, cache_dir: str = "", keep: bool = True):
        self.notes: list[str] = []
        self.keep = keep
        if not cache_dir and not data.parent.is_dir():  # the name of a dataset on the hub
            cache_dir = str(_of_user())
        beside = Path(cache_dir) if cache_dir else data.absolute().parent / FOLDER
        self._folders = [beside]
        if not keep:
            self._folders += [] if cache_dir else [_of_user()]
        elif cache_dir:
            if not _writable(beside):
                raise UserError(f"--cache_dir {cache_dir}: cannot be written: name another folder")
        elif not _writable(beside):
            self._folders.insert(0, _of_user())
            if not _writable(self._folders[0]):
                raise UserError(f"neither {beside} nor {self._folders[0]} can be written: name a --cache_dir")
            self.notes.append(f"cache in {self._folders[0]}, since {beside.parent} cannot be written")
        self.folder = self._folders[0]

    def content(self, paths: list[Path], name: str) -> str:
        """A hash of the contents of the files. That of a large file is remembered until the file changes."""
        digest = hashlib.blake2b(digest_size=20)
        for path in paths:
            digest.update(self._file_hash(path).encode())
        if not paths:
            raise UserError(f"{name}: no file of it is there to be read")
        return digest.hexdigest()

    def _file_hash(self, path: Path) -> str:
        try:
            status = os.stat(path)
            # The change time moves whenever a file is written, whatever is done to its modification time.
            place = str(path.absolute())
            seen = [place, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            if status.st_size <= HASHED:
                return _hash(path)
            record = self.folder / "files" / hashlib.blake2b(place.encode(), digest_size=16).hexdigest()
            with suppress(OSError, ValueError):
                known = json.loads(record.read_text(encoding="utf-8"))
                if known.get("seen") == seen:
                    return str(known["hash"])
            found = _hash(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        if not self.keep:
            return found
        with suppress(OSError):  # remembering only saves time
            record.parent.mkdir(exist_ok=True)
            temporary = record.with_name(f".{record.name}.{os.getpid()}")
            temporary.write_text(json.dumps({"seen": seen, "hash": found}), encoding="utf-8")
            os.replace(temporary, record)
        return found

    def entry(self, made_from: Mapping, build: Build) -> Entry:
        """The entry made from `made_from` (anything that JSON can hold); built now if it is not there."""
        key = self.key(made_from)
        if found := self._read(key):
            return found
        if not self.keep:
            return in_memory(build)
        with self._lock(key) as alone:
            for left in self.folder.glob(f".{key[:8]}.*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            return self._read(key) or self._build(key, build)

    @staticmethod
    def key(made_from: Mapping) -> str:
        """The name of the entry made from this."""
        return hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=20).hexdigest()

    def _read(self, key: str) -> Entry | None:
        for folder in self._folders:
            if not (folder / key).exists():
                continue
            try:
                return _read_entry(folder / key)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                note = f"cache entry {folder / key} is damaged ({error}): made again"
                if note not in self.notes:
                    self.notes.append(note)
        return None

    def _build(self, key: str, build: Build) -> Entry:
        target = self.folder / key
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{key[:8]}.", dir=self.folder))
            arrays = Arrays(temporary)
            try:
                record = build(arrays)
                arrays.finish()
            finally:
                arrays.close()
            meta = json.dumps({"arrays": arrays.described(), "record": record}).encode()
            (temporary / META).write_bytes(meta + f"\n{zlib.crc32(meta)}".encode())
            temporary.chmod(0o777 & ~_umask())
            for _ in range(3):
                try:
                    os.rename(temporary, target)
                    break
                except OSError:
                    # Something is there: damaged, or made by another process just now.
                    if not target.exists():
                        raise
                    if found := self._read(key):
                        return found
                    target.unlink() if target.is_file() else shutil.rmtree(target, ignore_errors=True)
            return _read_entry(target)
        except OSError as error:
            raise UserError(
                f"cache folder {self.folder}: could not be written ({error.strerror or error}): make room, or name "
                "another with --cache_dir"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _lock(self, key: str) -> Iterator[bool]:
        """Wait until no other process makes this entry. False on a file system without locks: one may."""
        path = self.folder / f".{key}.lock"
        file, alone = None, False
        try:
            with suppress(OSError):
                file = open(path, "w")
                fcntl.flock(file, fcntl.LOCK_EX)
                alone = True
            yield alone
        finally:
            with suppress(OSError):
                path.unlink()
            if file:
                file.close()


@cache
def code_hash(folder: Path = Path(__file__).parent) -> str:
    """A hash of all code that may have a part in turning data into ids: a change of it makes new entries.

    All modules of this folder: a list of those that matter would be wrong some day, and nobody would notice.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """{package: version} of the packages that shape rows, texts or ids, as far as they are installed."""
    versions = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def in_memory(build: Build) -> Entry:
    """An entry that is built now and not kept on disk."""
    arrays = Arrays(None)
    record = build(arrays)
    return arrays.finish(), record


def _read_entry(folder: Path) -> Entry:
    content, _, checksum = (folder / META).read_bytes().rpartition(b"\n")
    if int(checksum) != zlib.crc32(content):
        raise ValueError(f"the content of {META} has changed")
    meta, arrays = json.loads(content), {}
    for name, described in meta["arrays"].items():
        path = folder / name
        expected = np.dtype(described["dtype"]).itemsize * described["count"]
        if path.stat().st_size != expected:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, not {expected}")
        arrays[name] = _mapped(path, described["dtype"], described["count"])
        if expected <= CHECKED and expected and zlib.crc32(arrays[name].data.cast("B")) != described["crc32"]:
            raise ValueError(f"the content of {name} has changed")
    return arrays, meta["record"]


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype=dtype)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=20)
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _of_user() -> Path:
    """The user's cache folder, used if the one beside the data cannot be written."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_bone" / "data"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
