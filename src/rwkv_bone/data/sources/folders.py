"""Folders of files: those of one split, in order of path, as one source.

A folder that the `datasets` library saved says itself which files and splits it has. In others the names of files and
folders tell the splits, by the rules of that library. Every file is read, refused, or named as not read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_bone.data.sources.formats import FORMATS, Make, Options, format_of
from rwkv_bone.data.sources.rows import Places, Rows
from rwkv_bone.data.sources.text_files import Text
from rwkv_bone.errors import UserError

# Files that stand beside data and are none of it.
COMPANIONS = re.compile(
    r"(readme|license|licence|copying|notice|citation|changelog|authors)(\.\w+)?|requirements\.txt|config\.json|"
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|dummy_data\.zip",
    re.IGNORECASE,
)
KEYWORDS = {"train": "train training", "validation": "validation valid dev val", "test": "test testing eval evaluation"}
SHARD = re.compile(r"data/(?P<split>[\w.-]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
PREFERRED = {False: ("train",), True: ("test", "validation", "train")}  # held out or not
NAMED = 4  # files named in a message


@dataclass(frozen=True)
class File:
    """A file of data below the folder."""

    path: Path
    name: str  # below the folder, with slashes
    make: Make | None  # of its rows; None: text


class FolderRows(Rows):
    """The rows of several files, one after another."""

    def __init__(self, path: Path, name: str, parts: list[Rows], split: str):
        super().__init__(path, name)
        self._parts = parts
        kinds = " and ".join(sorted({part.kind for part in parts}))
        files = f", {len(parts):,} files" if len(parts) > 1 else ""
        self.kind = f"{kinds}{files}{f', split {split}' if split else ''}"
        notes = [note for part in parts for note in part.notes]
        self.notes = notes[:NAMED]
        if len(notes) > NAMED:
            self.notes.append(f"{name}: {len(notes) - NAMED:,} more lines such as these, of other files")
        self.uses_columns = any(part.uses_columns for part in parts)

    @property
    def places(self) -> Places:
        return Places(tuple(prefix for part in self._parts for prefix in part.places.prefixes))

    @property
    def files(self) -> list[Path]:
        return [path for part in self._parts for path in part.files]

    def keep(self, names: Collection[str]) -> None:
        for part in self._parts:
            part.keep(names)

    def items(self) -> Iterator[tuple[int, Any, int]]:
        for file, part in enumerate(self._parts):
            for number, raw, size in part.items():
                if isinstance(raw, UserError):
                    yield Places.number(file, number), raw, size
                else:
                    yield Places.number(file, number), (part.parse, raw), size

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @staticmethod
    def parse(raw: Any, where: str) -> dict:
        parse, inner = raw
        return parse(inner, where)


def open_folder(
    path: Path, name: str, folder: Path, *, text: bool, split: str, held_out: bool, options: Options
) -> Rows | Text:
    """The rows, or the texts, of a folder that the user calls `name`; `path` is that name too.

    text: every file is text, whatever it looks like.

    UserError for a folder with both, with none, or without that split.
    """
    left_out: dict[str, list[str]] = {}  # reason -> names of files
    names = {path: path.relative_to(folder).as_posix() for path in _walk(folder, left_out)}
    splits = _saved_splits(folder, names, left_out)
    saved = splits is not None
    candidates = [path for paths in splits.values() for path in paths] if splits is not None else list(names)
    files = list(_recognised(candidates, names, text, options, left_out))
    if not files:
        found = _summary(left_out)
        raise UserError(f"{name}: no file in it can be read: {found or 'it is empty'}; expected {FORMATS}")
    texts = [file for file in files if file.make is None]
    if texts and len(texts) < len(files):
        rows = [file.name for file in files if file.make]
        raise UserError(
            f"{name}: {len(texts):,} files of text ({_some([file.name for file in texts])}) and {len(rows):,} of rows "
            f"({_some(rows)}): name those that you mean, or move the others away"
        )
    if splits is None:
        splits = _splits_by_name([file for file in files], all_or_none=bool(texts), left_out=left_out, name=name)
    chosen = choose_split([s for s in splits], split, held_out, name)
    for other, paths in splits.items():
        if other != chosen:
            left_out.setdefault(f"of the split {other}", []).extend(names[path] for path in paths)
    of_split = [file for file in files if file.path in set(splits[chosen])]
    if not of_split:
        raise UserError(f"{name}: no file of the split {chosen} can be read: {_summary(left_out)}")
    if texts:
        source: Rows | Text = Text(path, [(file.path, f"{name}/{file.name}") for file in of_split])
    else:
        parts = [file.make(file.path, f"{name}/{file.name}") for file in of_split if file.make]
        source = FolderRows(path, name, parts, chosen if saved or len(splits) > 1 or chosen != "train" else "")
    if left_out:
        count = len(of_split) + sum(map(len, left_out.values()))
        source.notes.insert(0, f"{name}: {len(of_split):,} of {count:,} files are read; not read: {_summary(left_out)}")
    return source


def choose_split(splits: list[str], wanted: str, held_out: bool, name: str) -> str:
    """The split that the user asked for, or the usual one: train, and for held-out data test or validation."""
    found = ", ".join(splits)
    if wanted:
        if wanted not in splits:
            raise UserError(f"--sft_split {wanted}: {name} has the splits {found}")
        return wanted
    usual = next((usual for usual in PREFERRED[held_out] if usual in splits), None)
    if usual is None and len(splits) > 1:
        remedy = "name the files of one of them" if held_out else "choose one with --sft_split"
        raise UserError(f"{name} has the splits {found}, none of which is {PREFERRED[held_out][0]}: {remedy}")
    return usual or splits[0]


def _walk(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """The files below a folder in order of path, without hidden ones. UserError for what cannot be read."""

    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    found = []
    for place, below, files in os.walk(folder, onerror=failed, followlinks=True):
        here = Path(place)
        above = {parent.resolve() for parent in (here, *here.parents)}
        for name in list(below):
            if name.startswith((".", "__")):
                below.remove(name)
                left_out.setdefault("in hidden folders", []).append((here / name).relative_to(folder).as_posix())
            elif (here / name).is_symlink() and (here / name).resolve() in above:
                below.remove(name)
                left_out.setdefault("links to a folder around them", []).append(
                    (here / name).relative_to(folder).as_posix()
                )
        for name in files:
            path = here / name
            if name.startswith((".", "__")):
                left_out.setdefault("hidden", []).append(path.relative_to(folder).as_posix())
            elif not path.is_file():
                raise UserError(f"{path}: no ordinary file, or a link to nothing: remove it")
            else:
                found.append(path)
    yield from sorted(found, key=lambda path: path.relative_to(folder).parts)


def _recognised(
    paths: Iterable[Path], names: dict[Path, str], text: bool, options: Options, left_out: dict[str, list[str]]
) -> Iterator[File]:
    """Files of rows and of text; the others go to `left_out`. UserError for data in a form that is not read."""
    for path in paths:
        name = names[path]
        if COMPANIONS.fullmatch(path.name):
            left_out.setdefault("beside the data", []).append(name)
        elif not path.stat().st_size:
            left_out.setdefault("empty", []).append(name)
        elif text:
            yield File(path, name, None)
        else:
            found = format_of(path, options)
            if found == "numpy" or path.suffix in (".bin", ".idx"):
                raise UserError(f"{path}: token ids are not read from a folder: name the file itself, or move it away")
            if found is None:
                left_out.setdefault("of no format that is read", []).append(name)
            else:
                yield File(path, name, None if isinstance(found, str) else found)


def _saved_splits(folder: Path, names: dict[Path, str], left_out: dict[str, list[str]]) -> dict[str, list[Path]] | None:
    """The files of each split of a folder that the datasets library saved; None of another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
            raise UserError(f"{folder / 'dataset_dict.json'}: names no splits: damaged")
        found = {split: _saved_files(folder / split) for split in splits}
    elif (folder / "state.json").is_file():
        state = _json(folder / "state.json")
        found = {str(state.get("_split") or "train"): _saved_files(folder)}
    else:
        return None
    listed = {path for paths in found.values() for path in paths}
    for path, name in names.items():
        if path not in listed:
            reason = "beside the data" if COMPANIONS.fullmatch(path.name) else "not named in state.json"
            left_out.setdefault(reason, []).append(name)
    return found


def _saved_files(folder: Path) -> list[Path]:
    state = _json(folder / "state.json")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        raise UserError(f"{folder / 'state.json'}: names no files: damaged, or no folder of the datasets library")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{folder}: saved with an index of rows by an old version of datasets: load and save it again")
    paths = [folder / str(file["filename"]) for file in files]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: named in {folder / 'state.json'}, and is not there")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): damaged") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object: damaged")
    return found


def _splits_by_name(
    files: list[File], all_or_none: bool, left_out: dict[str, list[str]], name: str
) -> dict[str, list[Path]]:
    """{split: its files}; all are "train" if no name tells. all_or_none: names of single files tell only if all do."""
    rules = (_of_shard, _of_folders, _of_file_name)
    for rule in rules:
        named = {file: rule(file.name) for file in files}
        known = [file for file in files if named[file]]
        if not known or (rule is _of_file_name and all_or_none and len(known) < len(files)):
            continue
        splits: dict[str, list[Path]] = {}
        for file in files:
            if len(named[file]) > 1:
                raise UserError(
                    f"{name}/{file.name}: its name has the words of {len(named[file])} splits, "
                    f"{' and '.join(sorted(named[file]))}: rename it, or name the files that you mean"
                )
            if named[file]:
                splits.setdefault(min(named[file]), []).append(file.path)
            else:
                left_out.setdefault("of no split, as others name theirs", []).append(file.name)
        return {split: splits[split] for split in sorted(splits, key=[*KEYWORDS, *sorted(splits)].index)}
    return {"train": [file.path for file in files]}


def _of_shard(name: str) -> set[str]:
    found = SHARD.fullmatch(name)
    return {found["split"]} if found else set()


def _of_folders(name: str) -> set[str]:
    for part in name.split("/")[-2::-1]:  # the innermost that tells
        if found := _words(part):
            return found
    return set()


def _of_file_name(name: str) -> set[str]:
    return _words(name.split("/")[-1])


def _words(part: str) -> set[str]:
    words = set(re.split(r"[-._ 0-9]+", part.lower()))
    return {split for split, usual in KEYWORDS.items() if words & set(usual.split())}


def _summary(left_out: dict[str, list[str]]) -> str:
    counts = Counter({reason: len(names) for reason, names in left_out.items()})
    return "; ".join(f"{counts[reason]:,} {reason} ({_some(names)})" for reason, names in left_out.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
