"""Command lines of RWKV-LM that begin with new weights: the stages of its pre-training, and the files they begin with.

RWKV-LM trains in two commands. The first (stage 1) writes new weights to rwkv-init.pth and ends. The second (stage 2
or 3) takes the newest rwkv-N.pth of the results folder, whatever --load_model says, reads windows of a token stream in
an order that a prime number gives, and ends after --my_exit_tokens tokens. Fine-tuning is the second command with one's
own model as rwkv-init.pth. Here one command does it: without a checkpoint a run begins with new weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_bone.config.saved import STATES
from rwkv_bone.config.sections import DataConfig, RunConfig
from rwkv_bone.errors import UserError

INIT = "rwkv-init.pth"
SAMPLES = 40320  # of an epoch of RWKV-LM's stages 2 and 3
FLAGS = {
    "my_pile_stage": "RWKV-LM's stages: 1 is refused, since it only makes new weights, with which a run begins here "
    "without a `--load_model`; 2 and 3 are `--dataload get` for the tokens of `--my_exit_tokens`",
    "train_stage": "as `--my_pile_stage`",
    "my_exit_tokens": "`--epoch_count 1 --epoch_steps N`, the optimiser steps that read so many tokens",
}


def read_pretraining(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the flags given, with settings in place of those in FLAGS and of --load_model 0, and notes)."""
    given, notes = dict(given), []
    stage = _stage(given)
    if stage.endswith(" 1"):
        raise UserError(
            f"{stage} only makes new weights, {INIT}, and trains nothing: here a run without --load_model begins with "
            "new weights itself, so go on with the command that trains"
        )
    if stage and not given.get("my_exit_tokens", "0").strip("0"):
        raise UserError(
            f"{stage} takes the length of the run from --my_exit_tokens, the tokens to train on: give it, or remove "
            f"{stage.split()[0]} and give --epoch_steps"
        )
    notes += _base(given, newest=bool(stage))
    notes += _length(given, epoch=SAMPLES if stage else 0)
    if stage:
        given.setdefault("dataload", "get")
        notes.append(
            f"{stage} is read as --dataload {given['dataload']}: windows of the token stream, in an order that "
            "follows from --random_seed"
        )
    return given, notes


def _stage(given: dict[str, Any]) -> str:
    """The flag of a stage that is asked for, such as `--train_stage 3`, or nothing; removes those flags."""
    asked = ""
    for flag in ("my_pile_stage", "train_stage"):
        text = given.pop(flag, "0")
        if text not in ("0", "1", "2", "3"):
            raise UserError(f"--{flag} {text}: expected 0, 1, 2 or 3")
        if text != "0":
            asked = f"--{flag} {text}"
    return asked


def _base(given: dict[str, Any], newest: bool) -> list[str]:
    """Set, in place, the model that RWKV-LM begins with; notes. newest: that of the results folder in any case."""
    named = given.get("load_model", "")
    if not named and not newest:
        return []
    folder = Path(given.get("proj_dir", RunConfig.proj_dir))
    if named == "0" or newest:
        if given.get("resume") == "1":
            given.pop("load_model", None)
            return []
        flag = f"--load_model {named}" if named else "no --load_model"
        goes_on = given.get("resume", "auto") == "auto" and any(folder.glob(STATES))
        if not goes_on and (saved := sorted(folder.glob("rwkv-[0-9]*.pth"))):
            raise UserError(
                f"{flag} goes on from the newest rwkv-N.pth in --proj_dir {folder}, such as {saved[0].name}: here add "
                "--resume 1 to continue that run, or name the file in --load_model and another --proj_dir"
            )
        if (folder / INIT).is_file():
            given["load_model"] = str(folder / INIT)
            return [f"{flag} is read as --load_model {folder / INIT}, as in RWKV-LM"]
        if named in ("", "0"):
            given["load_model"] = ""
            return [f"{flag}: there is no {INIT} in {folder}, so the model is new"]
    if Path(named).name == INIT and not Path(named).is_file():
        given["load_model"] = ""
        return [f"--load_model {named}: there is no such file, so the model is new, as that file of RWKV-LM is"]
    return []


def _length(given: dict[str, Any], epoch: int) -> list[str]:
    """Set, in place, the steps in which --my_exit_tokens are read; notes. epoch: samples from save to save, or 0."""
    text = given.pop("my_exit_tokens", "0")
    try:
        tokens = int(text)
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise UserError(f"--my_exit_tokens {text}: expected the number of tokens to train on")
    if not tokens:
        return []
    samples = given.get("micro_bsz") or DataConfig.micro_bsz  # auto has the default's tokens a step
    for name in ("devices", "num_nodes", "accumulate_grad_batches"):
        samples *= given.get(name, 1)
    batch = samples * given.get("ctx_len", DataConfig.ctx_len)
    if batch < 1:
        # Which of them is wrong, the settings say.
        return []
    steps = -(-tokens // batch)
    between = epoch // samples if epoch else given.get("epoch_steps", 0)
    if between and (between := between * given.get("epoch_save", 1)) < steps:
        given["save_steps"] = between
    given |= {"epoch_count": 1, "epoch_steps": steps, "epoch_save": 1}
    given.setdefault("lr_schedule", "cos")
    saves = f", saved every {between:,} steps" if "save_steps" in given else ""
    return [f"--my_exit_tokens {tokens} is read as one epoch of {steps:,} steps of {batch:,} tokens{saves}"]
