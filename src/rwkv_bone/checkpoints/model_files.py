"""The files of a model: one file, an index with its shards, or a folder that holds exactly one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkv_bone.checkpoints.files import read_state
from rwkv_bone.errors import JSON_ERRORS, UserError

WEIGHTS = (".safetensors", ".st", ".pth", ".bin")
INDEX = ".index.json"
SHARD = re.compile(r"-(\d+)-of-(\d+)\.(safetensors|bin)$")
# Files of Hugging Face's trainer that have such a suffix and hold no weights.
OTHERS = re.compile(r"rng_state.*\.pth|(?!pytorch_model).*\.bin")
EXPECTED = "expected a .pth, .safetensors or .st file, the index of shards, or a folder with one model"


@dataclass(frozen=True)
class ModelFiles:
    """Where the tensors of a model are."""

    files: tuple[Path, ...]
    folder: Path | None  # the folder of the model, if it has one: see `find_files`
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None  # of the index: key -> name of its file

    def read(self, verify: bool = True) -> dict[str, Tensor]:
        """All tensors under the files' own keys, mapped; verify as `read_state` takes it.

        UserError if the index and its shards differ.
        """
        if self.weight_map is None:
            return read_state(self.files[0], verify)
        state: dict[str, Tensor] = {}
        for file in self.files:
            shard = read_state(file, verify)
            listed = {key for key, name in self.weight_map.items() if name == file.name}
            _same_keys(f"{self.index} lists", listed - shard.keys(), f"in {file.name}, which does not hold it")
            _same_keys(f"{file} holds", shard.keys() - listed, f"which {self.index} does not list there")
            state |= shard
        return state

    def describe(self) -> str:
        """Such as "folder, 2 shards"."""
        shards = f", {len(self.files)} shards" if self.index and len(self.files) > 1 else ""
        return f"{'folder' if self.folder else 'file'}{shards}"


def find_files(path: Path) -> ModelFiles:
    """The files of the model that `path` names. Nothing but an index is read.

    `folder` is set where the path is a folder, or a file in one with a config.json; a .pth stands for itself.
    UserError for a path that does not exist, and for a folder with no model or several.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}: {EXPECTED}")
    if path.name.endswith(INDEX):
        return _of_index(path, path.parent)
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, which is for running a model and is not read here: {EXPECTED}")
    part = SHARD.search(path.name)
    if part and int(part[2]) > 1:
        raise UserError(f"{path} is one shard of {int(part[2])}: give the folder, or the {INDEX} file in it")
    in_folder = path.suffix != ".pth" and (path.parent / "config.json").is_file()
    return ModelFiles((path,), path.parent if in_folder else None)


def _of_index(index: Path, folder: Path) -> ModelFiles:
    """The shards of an index, in the order of their names. UserError if it is not an index or a shard is missing."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, KeyError, TypeError, AttributeError, *JSON_ERRORS) as error:
        raise UserError(f"{index} is not an index of shards: no weight_map in it ({error})") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: expected names of files beside it in its weight_map, found {names[:3]}")
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise UserError(
            f"{index} lists {len(names)} shards, and {', '.join(missing[:8])} {_is(missing)} not there: "
            "is the download complete?"
        )
    return ModelFiles(tuple(index.parent / name for name in names), folder, index, weight_map)


def _in_folder(folder: Path) -> ModelFiles:
    """The one model of a folder; UserError naming what is there if it has none or several."""
    there = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in there if path.suffix in WEIGHTS and not OTHERS.fullmatch(path.name)]
    models = [_of_index(path, folder) for path in there if path.name.endswith(INDEX)]
    listed = {file for model in models for file in model.files}
    single = [path for path in files if path not in listed]
    shards = [path.name for path in single if SHARD.search(path.name)]
    if shards and models:
        raise UserError(f"{folder} holds {_some(shards)}, which {models[0].index} does not list: it is not one model")
    if shards:
        raise UserError(f"{folder} holds {_some(shards)}, but no {INDEX} that lists them: is the download complete?")
    models += [ModelFiles((path,), folder) for path in single]
    names = [(model.index or model.files[0]).name for model in models]
    if len(models) > 1:
        raise UserError(f"{folder} holds several models: {_some(names)}; give the path of one of them")
    if not models:
        found = f"it holds {_some([path.name for path in there])}" if there else "it is empty"
        raise UserError(f"{folder} holds no model: {found}; {EXPECTED}")
    if (folder / "adapter_config.json").is_file() and names[0].startswith("adapter_model."):
        raise UserError(f"{folder} is an adapter of Hugging Face PEFT, not a model: give it as the adapter")
    return models[0]


def _same_keys(what: str, keys: set[str], problem: str) -> None:
    if keys:
        raise UserError(f"{what} {_some(sorted(keys))} {problem}: is the download complete?")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
