"""Bone and Bat on any Hugging Face model, with PEFT's names: in a script that uses PEFT, only the import changes.

`get_bone_model(model, BoneConfig(...))` puts adapters into a model; `save_pretrained` then writes PEFT's MiSS format,
which peft loads, and `BoneModel.from_pretrained`.
"""

from rwkv_bone.hf.config import BoneConfig, TaskType
from rwkv_bone.hf.model import BoneModel, get_bone_model

# PEFT's names for the same.
get_peft_model, PeftModel, MissConfig = get_bone_model, BoneModel, BoneConfig

__all__ = ["BoneConfig", "BoneModel", "MissConfig", "PeftModel", "TaskType", "get_bone_model", "get_peft_model"]
