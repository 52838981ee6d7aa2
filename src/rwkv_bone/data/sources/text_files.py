"""Plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_bone.data.sources import files
from rwkv_bone.data.sources.files import Encoding, Stamp, head_of, opened, stamp
from rwkv_bone.data.sources.rows import Places
from rwkv_bone.errors import UserError


class Text:
    """One file, or those of a folder. Each is a document, blank lines and all."""

    def __init__(self, path: Path, parts: Sequence[tuple[Path, str]] = ()):
        """parts: (path, what the user calls it) of the files of the folder `path`; () = `path` is the file itself."""
        self.path, self._names = path, dict(parts or [(path, str(path))])
        self.paths = list(self._names)
        self.notes: list[str] = []
        self._seen: dict[Path, Stamp] = {path: stamp(path) for path in self.paths}
        if parts:
            self.kind = f"text, {len(self.paths):,} files, a document each"
        else:
            self.kind = f"{Encoding.of(head_of(path))} text, one document"

    @property
    def files(self) -> list[Path]:
        return self.paths

    @property
    def places(self) -> Places:
        """Of the documents, each of which is number 1 of its file."""
        return Places(tuple(f"{self._names[path]}, document " for path in self.paths))

    def pieces(self, path: Path) -> Iterator[str]:
        """The text of a file in pieces that cut no token: each ends with a line, the next begins with no white space.

        UserError, beginning with the file, for what is no text.
        """
        text, line, encoding = "", 1, Encoding.of(head_of(path))
        decode = encoding.decoder().decode
        with opened(path, self._seen[path]) as file:
            file.seek(len(encoding.mark))
            while True:
                data = file.read(files.CHUNK)
                try:
                    new = decode(data, not data)
                except UnicodeDecodeError as error:
                    raise encoding.problem(path, error, line - 1 + text.count("\n")) from error
                text += new
                if "\0" in new:
                    line += text.count("\n", 0, text.index("\0"))
                    raise UserError(f"{path}: a NUL character, in line {line}: no text, or in an unknown encoding")
                if not data:
                    break
                end = _line_start(text)
                if end:
                    yield text[:end]
                    line += text.count("\n", 0, end)
                    text = text[end:]
                elif len(text) > files.LIMIT:
                    raise UserError(f"{path}:{line}: a line longer than {files.LIMIT >> 20} MB")
        if text:
            yield text


def _line_start(text: str) -> int:
    """The last position at which a line begins with something visible; 0 if there is none but the first."""
    end = len(text) - 1
    while (end := text.rfind("\n", 0, end)) >= 0:
        if not text[end + 1].isspace():
            return end + 1
    return 0
