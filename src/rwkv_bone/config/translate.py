"""Command lines of RWKV-PEFT and RWKV-LM as settings: what `flags.py` does between reading flags and checking them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_bone.config import unsaid
from rwkv_bone.config.field_adapters import read_adapter_flags, set_once
from rwkv_bone.config.field_flags import IGNORED_FLAGS, MERGE_IGNORED_FLAGS, VALUES, Ignored
from rwkv_bone.config.pretraining import read_pretraining
from rwkv_bone.errors import UserError


def translate_train(given: dict[str, Any], trains: bool = True) -> tuple[dict[str, Any], list[str]]:
    """(settings under their names here, notes for the user) of the flags given.

    Values of RWKV-PEFT's flags are the text as typed. trains: False for a program that only reads the data, and needs
    no note about training. UserError for what is refused, malformed or contradictory.
    """
    sign, era = unsaid.sign(given, trains), unsaid.era(given)
    given, notes = read_values(given)
    ours = not sign or "config" in given
    notes += [] if ours else unsaid.epoch_steps(given, era)
    given, read = read_pretraining(given)
    notes += read
    given, read = read_adapter_flags(given)
    notes += read
    given, read = _train_type(given)
    notes += read
    if "dim_att" in given:
        width = given.pop("dim_att")
        if not width.isdecimal():
            raise UserError(f"--dim_att {width}: expected a whole number")
        if int(width):
            set_once(given, "n_embd", int(width), "--dim_att")  # the time mix is as wide as the model
    given, read = _ignore(given, IGNORED_FLAGS)
    notes += read
    notes += [] if ours else unsaid.of_data(given, era)
    notes += [] if ours or not trains else unsaid.of_training(given, era, sign)
    return given, notes


def translate_merge(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `translate_train`, for merge.py."""
    given, notes = read_values(given)
    typed, init, state = (given.pop(name, "") for name in ("type", "lora_init", "state_checkpoint"))
    kind = typed
    if state:
        set_once(given, "peft_checkpoint", state, "--state_checkpoint")
        kind = kind or "state"
    if init == "none":  # RWKV-PEFT's default
        init = ""
    if init:
        kind = kind or "pissa"
        if Path(init).exists():
            set_once(given, "pissa_init", init, "--lora_init")
            notes.append("--lora_init is read as --pissa_init")
        else:
            notes.append(f"--lora_init {init} is ignored: no such file; adapters trained here hold what is in it there")
    if kind in ("lora", "pissa", "state"):
        said = "--state_checkpoint" if state else f"--type {kind}" if typed else "--lora_init"
        set_once(given, "peft", kind, said.split()[0])
        notes.append(f"{said} is read as --peft {kind}")
    elif kind in ("bone", "disha", "miss"):
        notes.append(f"--type {kind} is ignored: bone and bat are told apart by their shapes")
    elif kind:
        raise UserError(f"--type {kind}: expected lora, pissa, state, bone, disha or miss")
    if kind == "pissa" and given.pop("lora_alpha", None) is not None:
        notes.append("--lora_alpha is ignored: PiSSA of RWKV-PEFT has no alpha")
    given, ignored = _ignore(given, MERGE_IGNORED_FLAGS)
    return given, notes + ignored


def merge_words(argv: Sequence[str], kind: str) -> list[str]:
    """The arguments of RWKV-PEFT's merge/merge_KIND.py as flags of merge.py; `kind` as --type has it, or nothing.

    merge_lora.py and merge_pissa.py took no flags: `[--use-gpu] [ALPHA] BASE [INIT] ADAPTER OUTPUT`.
    """
    words = [word for word in argv if word != "--use-gpu"]
    names = {
        "lora": ("lora_alpha", "base_model", "lora_checkpoint", "output"),
        "pissa": ("base_model", "lora_init", "lora_checkpoint", "output"),
    }.get(kind, ())
    if words and names and not any(word.startswith("--") for word in words):
        if len(words) != len(names):
            raise UserError(f"expected {len(names)} arguments, {', '.join(names)}, or flags; got {len(words)}")
        words = [f"--{name}={word}" for name, word in zip(names, words, strict=True)]
    given = {word.split("=")[0] for word in words}
    # Bone and Bat are told apart by their shapes.
    if kind in ("lora", "pissa", "state") and not given & {"--type", "--peft", "--state_checkpoint", "--help"}:
        words = [f"--peft={kind}", *words]
    return words + (["--device", "gpu"] if "--use-gpu" in argv else [])


def read_values(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the flags, with each value listed in VALUES replaced by its meaning here, and notes)."""
    notes = []
    given = dict(given)
    for name, table in VALUES.items():
        meaning = table.get(str(given.get(name)))
        if isinstance(meaning, str):
            raise UserError(f"--{name} {given[name]}: {meaning}")
        if meaning:
            notes.append(f"--{name} {given[name]} is read as --{name} {meaning.value}: {meaning.why}")
            given[name] = meaning.value
    return given, notes


def _ignore(given: dict[str, Any], table: dict[str, Ignored]) -> tuple[dict[str, Any], list[str]]:
    """The flags that are not in `table`, and a note on each that is; UserError where ignoring it changes something."""
    notes = []
    for name in [name for name in given if name in table]:
        flag = f"--{name} {given[name]}".strip()
        why, harmless = table[name]
        if harmless is not None and not any(_same(given[name], value) for value in harmless):
            raise UserError(f"{flag}: {why}; remove the flag" + (f" or give {harmless[0]}" if harmless[0] else ""))
        notes.append(f"{flag} is ignored: {why}")
    return {name: value for name, value in given.items() if name not in table}, notes


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a.lower() == b.lower()


def _train_type(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`--train_type state` (or `--state_tune 1`) and `--train_type infctx` as settings; and notes."""
    given, notes = dict(given), []
    kind = given.pop("train_type", "none")
    tuned = given.pop("state_tune", "0").lower()
    if kind not in ("none", "", "state", "states", "infctx"):
        raise UserError(f"--train_type {kind}: expected none, state or infctx")
    if kind.startswith("state") or tuned in ("", "1", "true"):
        if given.get("peft", "none") in ("none", "state"):
            given["peft"] = "state"
            notes.append("state tuning is --peft state here: the initial state is trained and nothing else")
        else:
            given["train_parts"] = tuple(dict.fromkeys((*given.get("train_parts", ()), "state")))
            notes.append("state tuning beside an adapter is --train_parts state here")
    if kind == "infctx" and not given.get("chunk_ctx"):
        given["chunk_ctx"] = 512
        notes.append("--train_type infctx is --chunk_ctx here: chunks of 512 tokens, with the exact gradient")
    return given, notes
