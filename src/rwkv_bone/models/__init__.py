"""RWKV models: one shell (`rwkv.py`), one file for each generation (`v7.py`), and their weights (`load.py`)."""

from rwkv_bone.models.load import architecture_from_scratch, init_from_scratch, load_base_into
from rwkv_bone.models.rwkv import EVERY_BLOCK, NOTHING, RWKV, LayerState, Recompute, build

__all__ = [
    "EVERY_BLOCK",
    "NOTHING",
    "RWKV",
    "LayerState",
    "Recompute",
    "architecture_from_scratch",
    "build",
    "init_from_scratch",
    "load_base_into",
]
