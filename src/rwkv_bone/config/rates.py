"""Learning rates that are allowed and hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_bone.config.fields import plain
from rwkv_bone.config.sections import TrainConfig

# AdamW moves each number by about the rate in a step. Weights are around 0.01 to 1, an adapter begins at 0, and a
# state, which is read once a sequence, takes far larger steps.
HIGHEST = {"none": 0.01, "bone": 0.1, "lora": 0.1, "pissa": 0.1, "state": 10.0}
HIGHEST_OF_B = 1.0  # LoRA+


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
