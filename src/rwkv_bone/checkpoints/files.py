"""Reading and writing checkpoint files.

Files are mapped into memory and not copied. They are written under a temporary name first, so that an interrupted write
never leaves half a file under a good name.

The metadata of our own files stands in a JSON beside them (`rwkv-0.json` for `rwkv-0.pth`) and once more inside the
file, so that it is not lost when the file is copied alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints.layouts import unwrapped
from rwkv_bone.errors import UserError

log = logging.getLogger("rwkv_bone")

SAFETENSORS = (".safetensors", ".st")  # what such files are called; .st is web-rwkv's name
METADATA_RECORD = "rwkv_bone.json"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file under their keys, memory-mapped, in the file's order.

    UserError when the file is missing, cut short, not a checkpoint, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: expected a .pth or .safetensors file")
    try:
        if path.suffix in SAFETENSORS:
            from safetensors.torch import load_file

            state = load_file(path)
        elif zipfile.is_zipfile(path):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            log.warning("%s is in torch's old file format: it is read into memory whole instead of being mapped", path)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch's own text advises the user to load unsafely.
            reason = "it was not written by torch.save, or holds more than tensors"
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it may be cut short or of another kind; "
            f"its size is {path.stat().st_size:,} bytes, compare that with where it came from"
        ) from error
    except Exception as error:
        # safetensors raises an exception class of its own, whose only base is Exception.
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    state = unwrapped(state, path)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds {type(state).__name__}, not a dictionary of tensors: it is not a checkpoint")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r} is {type(value).__name__}, not a tensor: only flat checkpoints are read")
    return state


@contextlib.contextmanager
def atomic_path(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well and vanishes when it does not.

    UserError when `path` exists and `overwrite` is not set, or when the disk refuses the write.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another name, or --overwrite")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_state(
    path: str | Path, state: Mapping[str, Tensor], metadata: dict | None = None, overwrite: bool = False
) -> None:
    """Write tensors to a .pth or .safetensors file, atomically, with metadata beside and inside it."""
    path = Path(path)
    with atomic_path(path, overwrite) as temporary:
        save_tensors(temporary, state, metadata)
    if metadata is not None:
        with atomic_path(path.with_suffix(".json"), overwrite=True) as temporary:
            temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict | None = None) -> None:
    """The bare write behind `write_state`: no temporary name, no JSON beside."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={METADATA_RECORD: json.dumps(metadata)} if metadata is not None else None)
        return
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        # torch reports a full or read-only disk as a RuntimeError of its zip writer.
        raise OSError(str(error).splitlines()[0]) from error
    if metadata is not None:
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/{METADATA_RECORD}", json.dumps(metadata))


def read_metadata(path: str | Path) -> dict | None:
    """The metadata of a file of ours, from inside it or from the JSON beside it; None when there is none."""
    path = Path(path)
    if path.suffix in SAFETENSORS:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_RECORD)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{METADATA_RECORD}")]
            text = archive.read(names[0]).decode() if names else None
    else:
        text = None
    beside = path.with_suffix(".json")
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"the metadata of {path} is not readable JSON: {error}") from error
