"""What an adapter is besides its tensors: kind, block size or rank, scale, dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from rwkv_bone.config import AdapterConfig

# Whether D's blocks run along the inputs or the outputs of the weight; in a file's metadata it is called `blocks`.
BLOCK_AXIS = {"bone": "in", "bat": "in", "bat-col": "out"}


@dataclass(frozen=True)
class AdapterSettings:
    """kind: a name in ADAPTERS, or `state`. Only LoRA and PiSSA read alpha (0 = r), dropout and rslora."""

    kind: str
    r: int
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What LoRA multiplies B A by: alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        return (self.alpha or self.r) / (math.sqrt(self.r) if self.rslora else self.r)

    def describe(self) -> str:
        """A few words for the user."""
        scale = f", scale {self.scale:g}" if self.kind in ("lora", "pissa") else ""
        return f"{self.kind} with r {self.r}{scale}"

    def to_metadata(self) -> dict:
        """These settings as an adapter file stores them."""
        axis = {"blocks": BLOCK_AXIS[self.kind]} if self.kind in BLOCK_AXIS else {}
        return {**asdict(self), **axis}

    @classmethod
    def from_metadata(cls, metadata: Mapping) -> AdapterSettings:
        return cls(**{spec.name: metadata[spec.name] for spec in fields(cls) if spec.name in metadata})


def settings_of(config: AdapterConfig) -> AdapterSettings:
    """The settings that the flags of a training run ask for."""
    if config.kind in ("lora", "pissa"):
        return AdapterSettings(config.kind, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_rs)
    return AdapterSettings(config.kind, 0 if config.kind == "state" else config.bone_r)
