"""What `auto` stands for in the settings of preference tuning."""

from __future__ import annotations

from dataclasses import replace

from rwkv_bone.config.sections import AUTO, PreferenceConfig

# The papers' usual values: DPO (Rafailov et al., arXiv 2305.18290), ORPO (Hong et al., arXiv 2403.07691), SimPO (Meng
# et al., arXiv 2405.14734), KTO (Ethayarajh et al., arXiv 2402.01306).
BETA = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
GAMMA = 1.0
SFT_WEIGHT = {"orpo": 1.0}  # the others have none
PAIRED = ("dpo", "orpo", "simpo")  # tasks whose rows have two answers
AUTOMATIC = ("beta", "gamma", "sft_weight")  # settings that may be auto
REFERRING = ("dpo", "kto")  # tasks that compare with the probabilities of a reference


def decided(preference: PreferenceConfig, task: str) -> PreferenceConfig:
    """The settings with numbers for auto. task: dpo, orpo, simpo or kto."""
    numbers = {"beta": BETA[task], "gamma": GAMMA, "sft_weight": SFT_WEIGHT.get(task, 0.0)}
    given = {name: value for name in numbers if (value := getattr(preference, name)) != AUTO}
    return replace(preference, **numbers | given)


def continued(preference: PreferenceConfig, then: PreferenceConfig) -> PreferenceConfig:
    """The settings of a run that goes on: where they are auto, those that it began with."""
    kept = {name: getattr(then, name) for name in AUTOMATIC if getattr(preference, name) == AUTO}
    return replace(preference, **kept)
