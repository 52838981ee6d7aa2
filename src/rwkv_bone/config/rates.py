"""Learning rates: those of `--lr_init auto` and `--lr_final auto`, and those that are allowed and hardly meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rwkv_bone.config.fields import plain
from rwkv_bone.config.sections import AUTO, AdapterConfig, OptimConfig, TrainConfig

# AdamW moves each number by about the rate in a step. Weights are around 0.01 to 1, an adapter begins at 0, and a
# state, which is read once a sequence, takes far larger steps.
HIGHEST = {"none": 0.01, "bone": 0.1, "lora": 0.1, "pissa": 0.1, "state": 10.0}
HIGHEST_OF_B = 1.0  # LoRA+

# Learning rates with which models of some width were trained well, times that width: the rate that suits a matrix falls
# with it (Yang et al., arXiv 2203.03466). Measured here (docs/measured.md): width 128, adapters 1e-3 to 3e-3, 1e-2 is
# worse; every weight 1e-3, 3e-3 is worse. Published, widths 2048 to 4096: Bone and PiSSA 2e-5, RWKV-PEFT's scripts 2e-5
# to 1e-4, LoRA 5e-5 to 5e-4 and every weight 1e-6 to 5e-5 (Biderman et al., arXiv 2405.09673; Dettmers et al.,
# arXiv 2305.14314). Pre-training: 6e-4 at width 768 (RWKV-LM). The ranges are three to four times as wide at both ends.
BY_WIDTH = {"bone": (0.01, 5.0), "lora": (0.01, 5.0), "pissa": (0.01, 5.0), "none": (0.0005, 0.8)}
FROM_SCRATCH = (0.01, 4.0)
STATE = (1e-3, 10.0)  # RWKV-PEFT trains states at 1 to 0.01, whatever the width


class Rule(NamedTuple):
    """rate x (width / WIDTH)^by_width x (size / SIZE)^by_size. size: bone_r, or LoRA's scale times its rank."""

    rate: float
    by_width: float = 0.0
    by_size: float = 0.0


WIDTH, SIZE = 128, 32
# docs/bone-or-lora.md says where the numbers come from.
RULES = {
    "bone": Rule(3e-3, -1.28, -0.5),
    "lora": Rule(3e-3, -0.78, -0.7),
    "pissa": Rule(3e-3, -1.28),
    "none": Rule(1e-3, -0.78),
    "state": Rule(0.1),
    "from scratch": Rule(2e-3, -0.67),
}
# What --task multiplies a rate by. Published, where fine-tuning has 2e-5 for every weight and 2e-4 for LoRA: DPO and
# KTO 5e-7 and 5e-6 (Zephyr in the alignment-handbook; Ethayarajh et al., arXiv 2402.01306), in Tulu 3 a tenth of its
# fine-tuning's (Lambert et al., arXiv 2411.15124); SimPO 3e-7 to 1e-6 (Meng et al., arXiv 2405.14734); ORPO 5e-6 to
# 8e-6 for every weight (Hong et al., arXiv 2403.07691). docs/preferences.md has what was measured on the bundled sets.
BY_TASK = {"sft": 1.0, "dpo": 0.1, "orpo": 0.5, "simpo": 0.1, "kto": 0.1}
MOST = 0.01  # of weights: models narrower than WIDTH were not better above it
FINAL, FINAL_OF_STATE = 1 / 30, 1 / 10  # of lr_init, at the end of a run


def auto_rate(adapter: AdapterConfig, width: int, from_scratch: bool = False, task: str = "sft") -> float:
    """What `--lr_init auto` is, on two digits, for a model this wide. task: as --task."""
    rule = RULES["from scratch" if from_scratch else adapter.peft]
    rate = rule.rate * (width / WIDTH) ** rule.by_width * (_size(adapter) / SIZE) ** rule.by_size
    if adapter.peft in ("lora", "pissa"):
        rate /= adapter.lora_plus**0.5  # between the rate of lora_A and that of lora_B
    rate = rate if adapter.peft == "state" else min(rate, MOST)
    return float(f"{rate * BY_TASK[task]:.1e}")


def decided(
    optim: OptimConfig, adapter: AdapterConfig, width: int, from_scratch: bool = False, task: str = "sft"
) -> OptimConfig:
    """The settings with numbers for --lr_init auto and --lr_final auto, on a model this wide. task: as --task."""
    first = auto_rate(adapter, width, from_scratch, task) if optim.lr_init == AUTO else optim.lr_init
    share = FINAL_OF_STATE if adapter.peft == "state" else FINAL
    last = float(f"{first * share:.1e}") if optim.lr_final == AUTO else optim.lr_final
    return replace(optim, lr_init=first, lr_final=last)


def continued(optim: OptimConfig, began: OptimConfig) -> OptimConfig:
    """The settings with the rates that a run began with for --lr_init auto and --lr_final auto."""
    first = began.lr_init if optim.lr_init == AUTO else optim.lr_init
    return replace(optim, lr_init=first, lr_final=began.lr_final if optim.lr_final == AUTO else optim.lr_final)


def said(
    asked: OptimConfig, optim: OptimConfig, adapter: AdapterConfig, width: int, goes_on: bool, task: str = "sft"
) -> Iterator[str]:
    """What became of --lr_init auto and --lr_final auto, and why, on a line; nothing where numbers were given.

    asked, optim: before and after `decided`, or, where the run goes on, `continued`.
    """
    names = [name for name in ("lr_init", "lr_final") if getattr(asked, name) == AUTO]
    if optim.lr_schedule == "constant" and "lr_final" in names:
        names.remove("lr_final")
    if not names:
        return
    found = ", ".join(f"--{name} auto is {plain(getattr(optim, name))}" for name in names)
    if goes_on:
        why = "as the run began"
    elif "lr_init" in names:
        size = {"bone": f" and bone_r {adapter.bone_r}", "lora": f" and a scale x rank of {plain(_size(adapter))}"}
        why = f"for --peft {adapter.peft} on a model of width {width}{size.get(adapter.peft, '')}"
        if BY_TASK[task] != 1:
            why += f", times {plain(BY_TASK[task])} for --task {task}"
    else:
        why = f"a {'tenth' if adapter.peft == 'state' else 'thirtieth'} of lr_init"
    rises = optim.lr_schedule != "constant" and asked.lr_init == AUTO and optim.lr_final > optim.lr_init
    last = f"; --lr_final {plain(optim.lr_final)} is above it: the learning rate rises to the end of the run"
    yield f"{found}: {why}{last if rises else ''}"


def _size(adapter: AdapterConfig) -> float:
    """What the step of the weights grows with, as `Rule` has it; SIZE where it depends on none."""
    if adapter.peft == "bone":
        return adapter.bone_r
    if adapter.peft == "lora":
        alpha = adapter.lora_alpha or adapter.lora_r
        return alpha * adapter.lora_r**0.5 if adapter.lora_rs else alpha
    return SIZE


def usual_rates(peft: str, width: int, from_scratch: bool = False, task: str = "sft") -> tuple[float, float]:
    """The lowest and the highest learning rate that a run of this kind, on a model this wide, may be meant to have."""
    low, high = STATE if peft == "state" else FROM_SCRATCH if from_scratch else BY_WIDTH[peft]
    share = BY_TASK[task] / (1 if peft == "state" else width)
    return low * share, high * share


def unusual_rate(config: TrainConfig, width: int) -> str:
    """A sentence on a rate outside `usual_rates`, or nothing: also nothing on one that `doubtful_rates` tells of."""
    rate, peft = config.optim.lr_init, config.adapter.peft
    task = config.data.task
    low, high = usual_rates(peft, width, not config.model.load_model, task)
    if rate in (0, AUTO) or low <= rate <= high or rate > HIGHEST[peft]:
        return ""
    size = "large" if rate > high else "small"
    kind = peft if task == "sft" else f"{peft} and --task {task}"
    return (
        f"--lr_init {plain(rate)} is unusually {size} for --peft {kind} on a model of width {width}: what is known to "
        f"work lies between {plain(float(f'{low:.1g}'))} and {plain(float(f'{high:.1g}'))}"
    )


def doubtful_rates(config: TrainConfig) -> Iterator[str]:
    """A sentence on each."""
    optim, adapter = config.optim, config.adapter
    highest = HIGHEST[adapter.peft]
    if optim.lr_init > highest:
        yield (
            f"--lr_init {plain(optim.lr_init)} is unusually large: with --peft {adapter.peft}, training above "
            f"{plain(highest)} hardly ever works"
        )
    elif adapter.peft in ("lora", "pissa") and optim.lr_init * adapter.lora_plus > HIGHEST_OF_B:
        yield (
            f"--lora_plus {plain(adapter.lora_plus)} makes the rate of lora_B "
            f"{plain(optim.lr_init * adapter.lora_plus)}, which is unusually large"
        )
    if not optim.lr_init:
        yield "--lr_init 0: nothing is learnt at this rate"
    if optim.lr_schedule != "constant" and optim.lr_final > optim.lr_init != AUTO:
        yield (
            f"--lr_final {plain(optim.lr_final)} is above --lr_init {plain(optim.lr_init)}: the learning rate rises "
            "to the end of the run"
        )
