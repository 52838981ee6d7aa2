"""Every setting of a run: what there is (`sections.py`), how it is typed (`flags.py`) and kept (`saved.py`).

`field_flags.py` says what the flags of RWKV-PEFT mean here. The standard library alone, so that --help is instant.
"""

from rwkv_bone.config.sections import (
    BAD_ROWS,
    BONE_MODES,
    QUANTS,
    SCHEDULES,
    STRATEGIES,
    TRAIN_PARTS,
    AdapterConfig,
    DataConfig,
    MergeConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    knob,
)

__all__ = [
    "BAD_ROWS",
    "BONE_MODES",
    "QUANTS",
    "SCHEDULES",
    "STRATEGIES",
    "TRAIN_PARTS",
    "AdapterConfig",
    "DataConfig",
    "MergeConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "knob",
]
