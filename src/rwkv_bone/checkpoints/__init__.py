"""Checkpoints: read and written (`files.py`, `stream.py`), their keys (`keys.py`), their model (`architecture.py`)."""

from rwkv_bone.checkpoints.architecture import Architecture, Base, architecture_of, load_base
from rwkv_bone.checkpoints.files import (
    METADATA_RECORD,
    atomic_path,
    read_metadata,
    read_state,
    save_tensors,
    write_state,
)
from rwkv_bone.checkpoints.keys import fingerprint, match_keys, param_part
from rwkv_bone.checkpoints.layouts import LAYOUTS, Layout, layout_of, to_upstream

__all__ = [
    "METADATA_RECORD",
    "LAYOUTS",
    "Architecture",
    "Base",
    "Layout",
    "architecture_of",
    "atomic_path",
    "fingerprint",
    "layout_of",
    "load_base",
    "match_keys",
    "param_part",
    "read_metadata",
    "read_state",
    "save_tensors",
    "to_upstream",
    "write_state",
]
