"""Bone and Bat on any Hugging Face model, with PEFT's names: in a script that uses PEFT, only the import changes.

`get_bone_model(model, BoneConfig(...))` puts adapters into a model; `save_pretrained` then writes PEFT's MiSS format,
which peft loads, and `BoneModel.from_pretrained`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_bone.hf.config import BoneConfig, TaskType
    from rwkv_bone.hf.config import BoneConfig as MissConfig
    from rwkv_bone.hf.model import BoneModel, get_bone_model
    from rwkv_bone.hf.model import BoneModel as PeftModel
    from rwkv_bone.hf.model import get_bone_model as get_peft_model

__all__ = ["BoneConfig", "BoneModel", "MissConfig", "PeftModel", "TaskType", "get_bone_model", "get_peft_model"]

# PEFT's names for the same.
ALIASES = {"MissConfig": "BoneConfig", "PeftModel": "BoneModel", "get_peft_model": "get_bone_model"}


def __getattr__(name: str) -> Any:
    # Lazily, so that the flags (`flags.py`) are there without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rwkv_bone.hf import config, model

    real = ALIASES.get(name, name)
    return getattr(config if hasattr(config, real) else model, real)
