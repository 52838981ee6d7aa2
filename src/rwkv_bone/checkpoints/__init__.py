"""Checkpoints: read and written (`files.py`, `stream.py`, `atomic.py`), their pages in memory (`pages.py`), their keys
(`keys.py`), their model (`architecture.py`).

A base model (`base.py`) may be several files (`model_files.py`) with a config.json (`model_config.py`), in one of
several layouts (`layouts.py`); all of them become upstream's names and shapes (`shapes.py`).
"""

from rwkv_bone.checkpoints.architecture import Architecture, architecture_of
from rwkv_bone.checkpoints.atomic import atomic_path, make_folder, sync_folder
from rwkv_bone.checkpoints.base import Base, load_base
from rwkv_bone.checkpoints.files import (
    read_metadata,
    read_record,
    read_state,
    save_tensors,
    write_state,
)
from rwkv_bone.checkpoints.keys import fingerprint, match_keys, param_part
from rwkv_bone.checkpoints.layouts import LAYOUTS, Layout, layout_of, to_upstream
from rwkv_bone.checkpoints.pages import give_back, resident_bytes, taken_over
from rwkv_bone.checkpoints.stream import METADATA_RECORD

__all__ = [
    "METADATA_RECORD",
    "LAYOUTS",
    "Architecture",
    "Base",
    "Layout",
    "architecture_of",
    "atomic_path",
    "fingerprint",
    "give_back",
    "layout_of",
    "load_base",
    "make_folder",
    "match_keys",
    "param_part",
    "read_metadata",
    "read_record",
    "read_state",
    "resident_bytes",
    "save_tensors",
    "sync_folder",
    "taken_over",
    "to_upstream",
    "write_state",
]
