"""The adapters there are, by the name that files and flags give them."""

from rwkv_bone.adapters.bat import BatLinear
from rwkv_bone.adapters.bone import BoneLinear
from rwkv_bone.adapters.layer import AdapterLinear

ADAPTERS: dict[str, type[AdapterLinear]] = {
    "bone": BoneLinear,
    "bat": BatLinear,
}
