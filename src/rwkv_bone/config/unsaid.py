"""Whose command line it is, of which year, and what it means by flags that it leaves out.

A flag that is left out, or that counts in another unit, has another meaning in RWKV-PEFT and RWKV-LM than here: that is
set, or named in a note, once, and only where the run depends on it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rwkv_bone.config.field_adapters import set_once
from rwkv_bone.config.field_flags import ERAS, LATER, TRAIN_FLAGS, VALUES, Y2023, Y2024, Y2025
from rwkv_bone.config.fields import worded
from rwkv_bone.config.sections import AdapterConfig, DataConfig, OptimConfig, RunConfig

# What a checkpoint knows. Nobody types it here, and every script of theirs does.
SIZES = ("my_testing", "n_layer", "n_embd", "vocab_size", "dim_ffn", "head_size")
# Names of theirs that other trainers have, too: by habit somebody may type them here.
COMMON = {
    *("dropout", "enable_progress_bar", "kernel", "merge", "num_workers", "optim", "optimizer"),
    *("persistent_workers", "prefetch_factor", "target_modules"),
}


def sign(given: dict[str, Any], trains: bool) -> str:
    """A flag by which a command line is one of RWKV-PEFT or RWKV-LM, such as --n_layer; nothing if it is one of ours.

    It is theirs if it has a flag that only they have, or a size, which nobody types here but for a new model. Flags
    that our pages and scripts use, such as --data_type and --dataload, are no sign, but a name of a format that is
    theirs alone is. A program that only reads the data may need a --vocab_size.
    """
    signs = [name for name in TRAIN_FLAGS if name in given and name not in COMMON]
    signs += [name for name in SIZES if given.get(name) and (trains or name != "vocab_size")]
    signs += ["data_type"] if given.get("data_type") in VALUES["data_type"] else []
    signs += ["load_model"] if given.get("load_model") == "0" else []
    return f"--{signs[0]}" if signs else ""


def era(given: dict[str, Any]) -> str:
    """The newest version of RWKV-PEFT whose flags are given; nothing where they are those of all of them."""
    eras = {ERAS[name] for name in given if name in ERAS}
    # What --peft names in these versions alone. Before 2026 --train_type state was state tuning.
    kinds = {"disha": Y2025, **dict.fromkeys(("miss", "adalora", "prefix"), LATER)}
    if "my_testing" in given:
        kinds["state"] = LATER
    eras.add(kinds.get(given.get("peft", ""), ""))
    return next((era for era in (LATER, Y2025, Y2024, Y2023) if era in eras), "")


def epoch_steps(given: dict[str, Any], era: str) -> list[str]:
    """Replace, in place, what --epoch_steps counts in a command line of theirs by what it counts here; notes."""
    steps, window = given.get("epoch_steps", 0), given.get("accumulate_grad_batches", 1)
    if steps and era == LATER:
        del given["epoch_steps"]
        if given.get("data_type") == "sft":
            return [f"--epoch_steps {steps} is ignored: with sft RWKV-PEFT of 2026 trains on all rows"]
        set_once(given, "sft_split", f"[:{steps}]", "--epoch_steps, since 2026 the samples to keep,")
        return [f"--epoch_steps {steps} is read as --sft_split [:{steps}]: since 2026 it is the samples to keep"]
    if steps and window > 1:
        given["epoch_steps"] = -(-steps // window)
        return [
            f"RWKV-PEFT counts --epoch_steps in forward passes: {steps} of them, {window} to a step, "
            f"are {given['epoch_steps']} optimiser steps here"
        ]
    return []


def _other_defaults(given: dict[str, Any], theirs: dict[str, str]) -> list[str]:
    """A note on the flags of `theirs`, {name: default there}, that are left out; none where all are given."""
    specs = [spec for section in (DataConfig, OptimConfig, RunConfig) for spec in fields(section)]
    defaults = {spec.name: worded(spec, spec.default) for spec in specs}
    left = [f"--{name} {defaults[name]} (there {value})" for name, value in theirs.items() if name not in given]
    return [f"left out, with another default than in RWKV-PEFT: {', '.join(left)}"] if left else []


def of_data(given: dict[str, Any], era: str) -> list[str]:
    """What a command line of theirs means by flags about the data that it leaves out, where it differs; notes."""
    notes, kind = _other_defaults(given, {"ctx_len": "1024", "micro_bsz": "12"}), given.get("data_type", "auto")
    if kind == "sft" and "template" not in given:
        notes.append("--data_type sft: RWKV-PEFT writes rows in Alpaca's words; --template alpaca is near to that")
    if "dataload" not in given and kind not in ("sft", "auto"):
        other = "pads each document: --dataload pad" if era in (Y2025, LATER) else "cuts random windows: --dataload get"
        notes.append(f"without --dataload whole documents are packed; RWKV-PEFT {other}")
    if given.get("dataload") == "pad" and kind == "binidx" and given.get("loss_mask", "none") == "none":
        notes.append("--dataload pad pads each document; RWKV-PEFT without --loss_mask pad reads on into the next one")
    return notes


def of_training(given: dict[str, Any], era: str, sign: str) -> list[str]:
    """As `of_data`, about what is trained and how; sets --peft, in place, where nothing names an adapter."""
    notes = []
    named = [spec.name for spec in fields(AdapterConfig) if spec.name in given and spec.name != "train_parts"]
    if not named and given.get("resume") != "1":  # which goes on with what the run has
        given["peft"] = "none"
        notes.append(
            f"a command line of RWKV-PEFT or RWKV-LM (it has {sign}) without --peft trains every weight: read as "
            "--peft none; --peft bone trains an adapter"
        )
        if given.get("train_parts"):
            notes.append(f"--train_parts {' '.join(given.pop('train_parts'))} is ignored: every weight is trained")
    notes += _other_defaults(given, {"lr_init": "6e-4", "lr_final": "1e-5", "epoch_count": "500"})
    if given.get("peft") in ("lora", "pissa") and "lora_r" not in given:
        there = "r 8" if given["peft"] == "pissa" else "r 8, alpha 8" if era == LATER else "r 8, alpha 32, dropout 0.01"
        notes.append(f"--peft {given['peft']} without --lora_r has r {AdapterConfig.lora_r}; in RWKV-PEFT {there}")
    adapted = given.get("peft", "bone") not in ("none", "state")
    if adapted and era != LATER and "train_parts" not in given:
        notes.append("without --train_parts only the adapter is trained; RWKV-PEFT then trains time and ln too")
    first, last = given.get("lr_init"), given.get("lr_final")
    if era not in (Y2025, LATER) and "lr_schedule" not in given and None not in (first, last) and first != last:
        curve = "exp" if first and last else "linear"
        notes.append(
            "without --lr_schedule the learning rate falls along a cosine, as in RWKV-PEFT since 2025; before, it was "
            f"--lr_schedule {curve}"
        )
    return notes
