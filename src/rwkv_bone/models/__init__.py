"""RWKV models: one shell (`rwkv.py`), one file for each generation (`v7.py`), and their weights (`load.py`)."""

from rwkv_bone.models.load import architecture_from_scratch, init_from_scratch, load_base_into
from rwkv_bone.models.rwkv import RWKV, LayerState, build

__all__ = ["RWKV", "LayerState", "architecture_from_scratch", "build", "init_from_scratch", "load_base_into"]
