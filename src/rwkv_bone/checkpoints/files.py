"""Reading and writing checkpoint files.

Files are mapped into memory and not copied. They are written whole or not at all (`atomic.py`).

The metadata of our own files stands in a JSON beside them (`rwkv-0.json` for `rwkv-0.pth`) and once more inside the
file, so that it is not lost when the file is copied alone.
"""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_bone.checkpoints import integrity
from rwkv_bone.checkpoints.atomic import atomic_path
from rwkv_bone.checkpoints.layouts import unwrapped
from rwkv_bone.checkpoints.stream import METADATA_RECORD, write_tensors
from rwkv_bone.config.names import check_name
from rwkv_bone.errors import JSON_ERRORS, UserError

log = logging.getLogger("rwkv_bone")

LONGEST_KEY = 1000  # characters of a tensor's name
OURS = {"format", "kind", "base"}  # keys by which metadata of ours is recognised in a JSON beside a file


def read_state(path: str | Path, verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file under their keys, memory-mapped, in the file's order.

    verify: compare the checksums that the file has, unless this process has done so before; not needed where the bytes
    were compared by other means. UserError when the file is missing, cut short, damaged, not a checkpoint, or holds
    anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}: expected a .pth or .safetensors file")
    check_name(path)
    try:
        if verify:
            integrity.verify_file(path)
        if integrity.is_safetensors(path):
            from safetensors.torch import load_file

            state = load_file(path)
        elif zipfile.is_zipfile(path):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            log.warning("%s is in torch's old file format: it is read into memory whole instead of being mapped", path)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
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
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
    state = unwrapped(state, path)
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds {type(state).__name__}, not a dictionary of tensors: it is not a checkpoint")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            name = repr(key)[:200]
            raise UserError(f"{path}: {name} is {type(value).__name__}, not a tensor: only flat checkpoints are read")
        if not (key.isprintable() and 0 < len(key) <= LONGEST_KEY):
            raise UserError(
                f"{path} holds a tensor named {key[:80]!r} ({len(key):,} characters): no program names one so"
            )
    return state


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


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping | None = None) -> None:
    """The bare write behind `write_state`: no temporary name, no JSON beside."""
    write_tensors(path, state, state.items(), metadata)


def read_record(path: str | Path, name: str) -> str | None:
    """The text that a file holds beside its tensors under this name; None if it holds none.

    A .pth file has it as a record, a .safetensors file in its header. UserError when it is damaged.
    """
    path = Path(path)
    if integrity.is_safetensors(path):
        integrity.tensor_pieces(path)  # compares the header's checksum
        return integrity.safetensors_header(path)[0].get("__metadata__", {}).get(name)
    if not zipfile.is_zipfile(path):
        return None
    records = integrity.zip_records(path)
    found = [record for record in records.values() if record.name.partition("/")[2] == name]
    if not found:
        return None
    if any(record.checksum for record in records.values()):
        integrity.verify_pieces(path, found)
    return integrity.read_piece(path, found[0]).decode(errors="replace")


def read_metadata(path: str | Path) -> dict | None:
    """The metadata of a file of ours, from inside it or else from the JSON beside it; None when there is none.

    A JSON beside is metadata only if it has the keys of ours, since other programs write files of such names, too.
    """
    path = Path(path)
    text, beside = read_record(path, METADATA_RECORD), _metadata_beside(path)
    if text is None:
        return beside
    try:
        inside = json.loads(text)
    except JSON_ERRORS as error:
        raise UserError(f"the metadata of {path} is not readable JSON: {error}") from error
    if not isinstance(inside, dict):
        raise UserError(f"the metadata of {path} is {type(inside).__name__}, expected an object")
    if beside is not None and beside != inside:
        different = [key for key in {**inside, **beside} if inside.get(key) != beside.get(key)]
        log.warning(
            "%s belongs to another file than %s (its %s differ); what the file itself says counts",
            path.with_suffix(".json"), path.name, ", ".join(different),
        )  # fmt: skip
    return inside


def _metadata_beside(path: Path) -> dict | None:
    """What stands in the JSON beside a file, if that is metadata of ours."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, *JSON_ERRORS):
        return None
    return found if isinstance(found, dict) and OURS <= found.keys() else None
