"""Learning rates that are allowed and hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_bone.config.fields import plain
from rwkv_bone.config.sections import TrainConfig

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


def usual_rates(peft: str, width: int, from_scratch: bool = False) -> tuple[float, float]:
    """The lowest and the highest learning rate that a run of this kind, on a model this wide, may be meant to have."""
    if peft == "state":
        return STATE
    low, high = FROM_SCRATCH if from_scratch else BY_WIDTH[peft]
    return low / width, high / width


def unusual_rate(config: TrainConfig, width: int) -> str:
    """A sentence on a rate outside `usual_rates`, or nothing: also nothing on one that `doubtful_rates` tells of."""
    rate, peft = config.optim.lr_init, config.adapter.peft
    low, high = usual_rates(peft, width, not config.model.load_model)
    if not rate or low <= rate <= high or rate > HIGHEST[peft]:
        return ""
    size = "large" if rate > high else "small"
    return (
        f"--lr_init {plain(rate)} is unusually {size} for --peft {peft} on a model of width {width}: what is known to "
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
    if optim.lr_schedule != "constant" and optim.lr_final > optim.lr_init:
        yield (
            f"--lr_final {plain(optim.lr_final)} is above --lr_init {plain(optim.lr_init)}: the learning rate rises "
            "to the end of the run"
        )
