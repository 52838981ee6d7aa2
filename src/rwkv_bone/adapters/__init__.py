"""Adapters: layers that stand in for a projection, putting them into models, and their files.

A new adapter is one layer class and one line in `registry.py`.
"""

from rwkv_bone.adapters.bat import BatLinear
from rwkv_bone.adapters.bat_col import BatColLinear
from rwkv_bone.adapters.bone import BoneLinear
from rwkv_bone.adapters.files import (
    AdapterFile,
    apply_adapter,
    infer_adapter,
    load_adapter_file,
    read_adapter,
)
from rwkv_bone.adapters.inject import Injection, adapter_keys, inject, load_adapter
from rwkv_bone.adapters.layer import AdapterLinear
from rwkv_bone.adapters.lora import LoraLinear, PissaLinear
from rwkv_bone.adapters.registry import ADAPTERS
from rwkv_bone.adapters.settings import AdapterSettings, settings_of

__all__ = [
    "ADAPTERS",
    "AdapterFile",
    "AdapterLinear",
    "AdapterSettings",
    "BatColLinear",
    "BatLinear",
    "BoneLinear",
    "Injection",
    "LoraLinear",
    "PissaLinear",
    "adapter_keys",
    "apply_adapter",
    "infer_adapter",
    "inject",
    "load_adapter",
    "load_adapter_file",
    "read_adapter",
    "settings_of",
]
