"""`BoneConfig` where peft is installed: what `BoneConfig(...)` makes there, so that peft and TRL take it as their own.

The fields and checks are BoneConfig's, and so is `__init__`; of peft's class come its type, its methods and the
defaults of the fields that only peft has. The adapters that peft builds, trains and saves from it are plain MiSS. This
module imports peft, so it is imported by the first BoneConfig and by nothing else.
"""

from __future__ import annotations

from peft import MissConfig, PeftType

from rwkv_bone.errors import UserError
from rwkv_bone.hf.config import BoneConfig


class PeftBoneConfig(BoneConfig, MissConfig):
    """A BoneConfig that is a `peft.MissConfig`, too."""

    @property
    def peft_type(self) -> PeftType:
        """What peft is to build. UserError for bat-row, which it cannot."""
        if self.kind == "bat":
            raise UserError(
                "BoneConfig: mode 'bat-row' is RWKV-PEFT's bat, which PEFT cannot build. Take mode 'bat-col', PEFT's "
                "own, or put the adapter in with rwkv_bone.hf.get_bone_model and give a trainer the model without "
                "peft_config"
            )
        return PeftType.MISS

    def to_dict(self) -> dict:
        """`adapter_config.json` as peft writes it, which any peft reads: without `mode`, which init_weights says."""
        return {**self.to_peft(), "init_weights": self.init_weights, "inference_mode": self.inference_mode}
