"""Every setting of a run (`sections.py`), as flags (`flags.py`) and as a saved file (`saved.py`).

`acts.py` says which setting acts when, and `layers.py` tells what a user typed from what a script or a saved run has,
so that nothing is ignored in silence; `rates.py` chooses learning rates, and doubts them. `pages.py` makes tables of
docs/ from these.

`field_flags.py` says what the flags of RWKV-PEFT and RWKV-LM mean here, with `field_adapters.py` and `pretraining.py`;
`translate.py` makes settings of them, and `unsaid.py` of what they leave out. `other_names.py` says what other programs
call the same thing. This package needs the standard library alone, so that --help is instant.
"""

from rwkv_bone.config.fields import setting
from rwkv_bone.config.sections import (
    BAD_ROWS,
    BONE_MODES,
    LAYOUTS,
    OUTTYPES,
    QUANTS,
    SCHEDULES,
    STRATEGIES,
    TRAIN_PARTS,
    AdapterConfig,
    DataConfig,
    MergeConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BAD_ROWS",
    "BONE_MODES",
    "LAYOUTS",
    "OUTTYPES",
    "QUANTS",
    "SCHEDULES",
    "STRATEGIES",
    "TRAIN_PARTS",
    "AdapterConfig",
    "DataConfig",
    "MergeConfig",
    "ModelConfig",
    "OptimConfig",
    "PreferenceConfig",
    "RunConfig",
    "TrainConfig",
    "setting",
]
