"""All adapters, by the names that files and flags give them."""

from rwkv_bone.adapters.bat import BatLinear
from rwkv_bone.adapters.bat_col import BatColLinear
from rwkv_bone.adapters.bone import BoneLinear
from rwkv_bone.adapters.layer import AdapterLinear
from rwkv_bone.adapters.lora import LoraLinear, PissaLinear

ADAPTERS: dict[str, type[AdapterLinear]] = {
    "bone": BoneLinear,
    "bat": BatLinear,
    "bat-col": BatColLinear,
    "lora": LoraLinear,
    "pissa": PissaLinear,
}

STORED = {name for layer in ADAPTERS.values() for name in (*layer.parameter_names, *layer.frozen_names)}


def split_key(key: str) -> tuple[str, str] | None:
    """(module, name) of an adapter tensor's key `<module>.<name>`; None for any other key."""
    module, _, name = key.rpartition(".")
    return (module, name) if name in STORED else None
