"""Which GPUs a run uses: `--devices` and `--cards`, settled before any of its processes is started.

PyTorch is imported only where there is something to settle.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rwkv_bone import console, launched
from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from rwkv_bone.config import RunConfig, TrainConfig
    from rwkv_bone.hf.flags import HfConfig

    Settings = TypeVar("Settings", RunConfig, HfConfig)

AUTO = 0  # stands for the word auto of --devices


def check_cards(cards: str, devices: int) -> None:
    """UserError unless `cards` is empty, or the numbers of as many different GPUs as there are devices: `2,3`."""
    if not cards:
        return
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", cards):
        raise UserError(f"--cards {cards}: expected numbers of GPUs, such as 2,3 (`nvidia-smi -L` lists them)")
    numbers = [int(word) for word in cards.split(",")]
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise UserError(f"--cards {cards} names GPU {twice[0]} twice: name it once")
    if devices not in (AUTO, len(numbers)):
        raise UserError(
            f"--cards {cards} names {console.counted(len(numbers), 'GPU')}, and --devices is {devices}: give --devices "
            f"{cards}{',' * (len(numbers) == 1)} alone, or leave --cards out"
        )


def settled(config: TrainConfig) -> TrainConfig:
    """`settle` for a whole configuration."""
    return replace(config, run=settle(config.run, config.run.accelerator))


def settle(settings: Settings, accelerator: str = "auto") -> Settings:
    """Show this process, and those that it starts, the GPUs of --cards alone, and make --devices auto a number.

    UserError for a GPU that is not there, and where Slurm has chosen GPUs already.
    """
    if settings.cards:
        choose(settings.cards)
    if settings.devices != AUTO:
        return settings
    found = launched.find()
    given = found.devices or (found.cards if accelerator != "cpu" else None)
    if given:
        number, why = given, f"as {found.launcher} has it"
    elif settings.cards:
        number, why = len(settings.cards.split(",")), "those of --cards"
    elif accelerator == "cpu":
        number, why = 1, "with --accelerator cpu it stands for one process"
    else:
        import torch

        there = torch.cuda.device_count()
        number, why = (there, "all GPUs that PyTorch sees") if there else (1, "PyTorch sees no GPU")
    if launched.speaks():
        console.say(f"note: --devices auto is {number}: {why}")
    return replace(settings, devices=number)


def choose(cards: str) -> None:
    """Set CUDA_VISIBLE_DEVICES to these cards, which are numbers among those that it shows now. UserError as above."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("RWKV_BONE_CARDS") == f"{cards} as {before}":
        return  # by the process that has started this one
    wanted = cards.split(",")
    if launched.find().launcher == "Slurm" and before is not None:
        raise UserError(
            f"--cards {cards}: Slurm has chosen the GPUs of this task already (CUDA_VISIBLE_DEVICES={before}): leave "
            "it out (--cards '')"
        )
    chosen = wanted
    if before is not None:
        shown = [word.strip() for word in before.split(",") if word.strip() not in ("", "-1")]
        if missing := [number for number in wanted if int(number) >= len(shown)]:
            raise UserError(
                f"--cards {cards}: there is no GPU {missing[0]} among the {len(shown)} that CUDA_VISIBLE_DEVICES="
                f"{before} shows, which --cards numbers from 0: give other numbers, or unset the variable"
            )
        chosen = [shown[int(number)] for number in wanted]
    kept = dict(os.environ)  # as before, CUDA_VISIBLE_DEVICES too
    if before is None:
        # CUDA would number the fastest first, and `nvidia-smi`, where a user reads the numbers, by the slots.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    os.environ["RWKV_BONE_CARDS"] = f"{cards} as {','.join(chosen)}"

    import torch

    from rwkv_bone.devices import require_cuda

    # CUDA sees those before the first that is not there.
    if (there := torch.cuda.device_count()) < len(wanted):
        for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "RWKV_BONE_CARDS"):
            os.environ.pop(name, None)  # CUDA_VISIBLE_DEVICES
            os.environ |= {name: kept[name]} if name in kept else {}  # CUDA_VISIBLE_DEVICES
        if not torch.cuda.is_available():
            require_cuda(f"--cards {cards}: ", "leave it out: then the CPU trains")
        raise UserError(
            f"--cards {cards}: there is no GPU {wanted[there]}: `nvidia-smi -L` lists those of this machine by number"
        )
