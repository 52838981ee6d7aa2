"""The adapter that a command line of RWKV-PEFT describes: its JSON, its flags of 2023, its names of projections.

Everything here becomes settings of `AdapterConfig`; what has no counterpart is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_bone.config.fields import is_number
from rwkv_bone.config.sections import BONE_MODES, TRAIN_PARTS
from rwkv_bone.errors import UserError


class Key(NamedTuple):
    """The setting that a key of RWKV-PEFT's JSON stands for here, and the type of its values."""

    ours: str
    type: type
    what: str  # the type in words, for messages


# RWKV-PEFT's JSON of each adapter, its keys without the prefix that some versions put before them (bone_, lora_).
R, LOAD = "a whole number", Key("peft_load", str, "a path")
ADAPTER_KEYS = {
    "bone": {"mode": Key("bone_mode", str, "a mode"), "load": LOAD, "r": Key("bone_r", int, R)},
    "lora": {
        "load": LOAD,
        "r": Key("lora_r", int, R),
        "alpha": Key("lora_alpha", float, "a number"),
        "dropout": Key("lora_dropout", float, "a number"),
        "use_rslora": Key("lora_rs", bool, "true or false"),
    },
    "pissa": {"load": LOAD, "r": Key("lora_r", int, R)},
}
# flag -> the adapter that it configures, unless --peft names another
HF_FLAG = "peft_config"
ADAPTER_FLAGS = {
    "bone_config": "bone",
    "disha_config": "bone",
    "miss_config": "bone",
    HF_FLAG: "bone",
    "lora_config": "lora",
    "pissa_config": "pissa",
}
# Flags of 2023 and early 2024, and --target_modules of Hugging Face PEFT.
EARLY_FLAGS = {
    "lora": "`--peft lora`; what is left out is `--lora_r 8 --lora_alpha 32 --lora_dropout 0.01`, as there",
    "PISSA": "`--peft pissa`",
    "lora_load": "`--peft_load`; a bare name such as `rwkv-0`, where there is no such file, is a new adapter, as there",
    "lora_parts": "`att` and `ffn` are `--targets`, `time`, `ln`, `emb` and `head` are `--train_parts`",
    "emb": "`--train_parts emb`",
    "target_modules": "`--targets`; names of fla and of Hugging Face (`r_proj`, `attn.k_proj`) are those of upstream",
    "LISA": "refused: training layers in turn is not supported",
}
EARLY_LORA = {"lora_r": 8, "lora_alpha": 32.0, "lora_dropout": 0.01}
EARLY_PARTS = "att,ln,time"
# Hugging Face PEFT's other keys, and the values of them that say what is so here anyway.
HF_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM", None),
    "peft_type": ("LORA", "MISS", "BONE", None),
    "bias": ("none",),
    "inference_mode": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "miss_dropout": (0, 0.0),
}
# What PEFT takes for a key that is left out, where it is not our default.
HF_UNSAID: dict[str, dict[str, Any]] = {"lora": {"r": 8, "alpha": 8}}

# Names of a projection elsewhere -> upstream's.
PROJECTIONS = {
    **{name: name for name in ("receptance", "key", "value", "output", "gate")},
    "r_proj": "att.receptance",
    "k_proj": "att.key",
    "v_proj": "att.value",
    "o_proj": "att.output",
    "g_proj": "att.gate",
}
WHOLE = {"att": "att", "attn": "att", "ffn": "ffn", "head": "head", "lm_head": "head"}
TARGET = re.compile(r"(?:(?:model\.)?(?:blocks|layers)\.(?P<layer>\d+)\.)?(?:(?P<half>att|attn|ffn)\.)?(?P<name>\w+)")


def read_targets(flag: str, value: Any) -> tuple[str, ...]:
    """--targets for names of projections: a list, or text with commas, spaces or JSON's brackets between them.

    () for all-linear, which is every projection. UserError, naming the flag, for a name that no RWKV has.
    """
    names = value if isinstance(value, list) else re.findall(r"[^\s,\[\]\"']+", str(value))
    if names == ["all-linear"]:
        return ()
    return tuple(dict.fromkeys(_target(flag, name) for name in names))


def _target(flag: str, name: Any) -> str:
    found = TARGET.fullmatch(name) if isinstance(name, str) else None
    if found:
        layer, half, last = found["layer"], WHOLE.get(found["half"] or ""), found["name"]
        ours = PROJECTIONS.get(last, "" if half else WHOLE.get(last, ""))
        if half and ours:
            # attn.r_proj: the table's att. is said already. ffn.r_proj is no name of any program.
            ours = "" if half == "ffn" and "." in ours else f"{half}.{ours.rpartition('.')[2]}"
        if ours and not (layer and ours == "head"):
            return f"blocks.{layer}.{ours}" if layer else ours
    raise UserError(
        f"{flag} {name}: no projection of an RWKV; expected att, ffn or head, or any of receptance, key, value, output "
        "and gate, alone or after att. or ffn."
    )


def read_parts(flag: str, text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(--targets, --train_parts) for --lora_parts, such as `att,ffn,time,ln`; UserError for what is neither."""
    names = [name for name in re.split(r"[\s,]+", text) if name]
    for name in names:
        if name not in ("att", "ffn", *TRAIN_PARTS):
            raise UserError(f"{flag} {text}: {name} is none of att, ffn, {', '.join(TRAIN_PARTS)}")
    targets = tuple(name for name in names if name in ("att", "ffn"))
    if not targets:
        raise UserError(f"{flag} {text}: neither att nor ffn is named, so no projection would get an adapter: add one")
    return targets, tuple(name for name in names if name not in targets)


def read_adapter_flags(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the flags given, with settings in place of those in EARLY_FLAGS and ADAPTER_FLAGS, and notes)."""
    given = dict(given)
    notes = _early_lora(given)
    if "target_modules" in given:
        set_once(given, "targets", read_targets("--target_modules", given.pop("target_modules")), "--target_modules")
    for name in [name for name in ADAPTER_FLAGS if name in given]:
        text, kind = given.pop(name), given.get("peft", ADAPTER_FLAGS[name])
        if kind != ADAPTER_FLAGS[name] and name != HF_FLAG:
            notes.append(f"--{name} is ignored: only --peft {ADAPTER_FLAGS[name]} reads it")
            continue
        if kind not in ADAPTER_KEYS:
            raise UserError(f"--{name} has no meaning with --peft {kind}: remove one")
        settings, unread = _adapter_config(name, text, kind)
        notes += unread
        given["peft"] = kind
        if kind == "bone" and name != HF_FLAG and "bone_mode" not in settings | given:
            notes.append(f"--{name} names no mode: bone; RWKV-PEFT before bone_mode trained what is now called bat")
        for key, value in settings.items():
            if key == "train_parts":
                _add_parts(given, value)
            else:
                set_once(given, key, value, f"--{name}")
    return given, notes


def set_once(given: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Set a setting, in place; UserError if it was given another value."""
    if given.setdefault(name, value) != value:
        raise UserError(f"--{name} {given[name]} contradicts {source}, which says {value}: keep one")


def _add_parts(given: dict[str, Any], parts: tuple[str, ...]) -> None:
    given["train_parts"] = tuple(dict.fromkeys((*given.get("train_parts", ()), *parts)))


def _early_lora(given: dict[str, Any]) -> list[str]:
    """Replace, in place, the flags of 2023, `--lora --lora_load rwkv-0 --lora_parts=att,ffn,time,ln`, by settings."""
    if "LISA" in given:
        raise UserError(
            "--LISA: training a few layers in turn is not supported; --peft bone or lora trains all at once"
        )
    if "emb" in given:
        given.pop("emb")
        _add_parts(given, ("emb",))
    flags = [name for name in ("lora", "PISSA", "lora_load", "lora_parts") if name in given]
    if not flags:
        return []
    notes, load = [], given.pop("lora_load", "")
    kind = "pissa" if "PISSA" in flags else "lora"
    parts = given.pop("lora_parts", EARLY_PARTS if {"lora", "PISSA"} & {*flags} else "")
    for name in ("lora", "PISSA"):
        given.pop(name, None)
    set_once(given, "peft", kind, f"--{flags[0]}")
    if load and not load.endswith((".pth", ".safetensors")) and not Path(load).is_file():
        notes.append(f"--lora_load {load} is ignored: there is no such file, so the adapter is new, as in RWKV-PEFT")
    elif load:
        set_once(given, "peft_load", load, "--lora_load")
    if kind == "pissa":
        for name in ("lora_alpha", "lora_dropout"):
            if name in given:
                notes.append(f"--{name} {given.pop(name):g} is ignored: PiSSA of RWKV-PEFT does not read it")
        unsaid = {"lora_r": EARLY_LORA["lora_r"]}
    else:
        unsaid = EARLY_LORA
    if "lora" in flags:
        unsaid = {name: value for name, value in unsaid.items() if name not in given}
        given |= unsaid
    else:
        unsaid = {}
    if parts:
        targets, trained = read_parts("--lora_parts", parts)
        set_once(given, "targets", targets, "--lora_parts")
        _add_parts(given, trained)
    read = [f"--peft {kind}", *(f"--{name} {value:g}" for name, value in unsaid.items())]
    read += [f"--targets {' '.join(given['targets'])}"] if parts else []
    read += [f"--train_parts {' '.join(given['train_parts'])}"] if given.get("train_parts") else []
    return [f"--{flags[0]} is read as {' '.join(read)}", *notes]


def _adapter_config(flag: str, text: str, kind: str) -> tuple[dict[str, Any], list[str]]:
    """(settings, notes) of JSON such as `{"bone_mode": "bat", "bone_load": "", "bone_r": 64}`."""
    try:
        config = json.loads(text)
    except ValueError:
        raise UserError(
            f"--{flag} {text}: not JSON; expected, quoted for the shell, such as --{flag} "
            f'\'{{"{kind}_load":"","{kind}_r":64}}\''
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"--{flag} {text}: expected a JSON object")
    found: dict[str, Any] = {}
    notes: list[str] = []
    config = {key.removeprefix(f"{kind}_"): value for key, value in config.items()}
    if flag == HF_FLAG:
        _drop_defaults(flag, config)
        for key, value in HF_UNSAID.get(kind, {}).items():
            if key not in config:
                notes.append(f"--{flag} without {key}: {value}, as in Hugging Face PEFT")
                config[key] = value
    if kind == "bone":
        _read_init_weights(flag, config)
    if kind == "pissa":
        if "svd_niter" in config:
            passes = config.pop("svd_niter")
            notes.append(f"--{flag} svd_niter {passes} is ignored: how exact the components are changes nothing else")
        if config.pop("init", ""):
            raise UserError(
                f"--{flag}: pissa_init is needed for adapters of RWKV-PEFT alone, those of this repository hold their "
                "initial factors; to go on from one of RWKV-PEFT, merge it (merge.py --pissa_init) and train the result"
            )
    if "target_modules" in config:
        found["targets"] = read_targets(f"--{flag} target_modules", config.pop("target_modules") or [])
    if "parts" in config and kind in ("lora", "pissa"):
        found["targets"], found["train_parts"] = read_parts(f"--{flag} {kind}_parts", str(config.pop("parts")))
        if not found["train_parts"]:
            del found["train_parts"]
    keys = ADAPTER_KEYS[kind]
    unknown = config.keys() - keys.keys()
    if unknown:
        expected = ", ".join(f"{kind}_{key}" for key in keys)
        raise UserError(f"--{flag}: unknown key {', '.join(sorted(unknown))}; expected {expected}")
    if config.get("mode", "bone") not in BONE_MODES:
        # RWKV-PEFT's own default, "mode", trained no adapter at all and said nothing.
        raise UserError(f"--{flag}: mode {config['mode']!r} is none of {', '.join(BONE_MODES)}")
    for key, value in config.items():
        if keys[key].type is float and is_number(value):
            config[key] = float(value)
        elif type(value) is not keys[key].type:
            raise UserError(f"--{flag}: {key} {json.dumps(value)}: expected {keys[key].what}")
    return {keys[key].ours: value for key, value in config.items()} | found, notes


def _drop_defaults(flag: str, config: dict[str, Any]) -> None:
    """Remove, in place, PEFT's keys that say what is so here anyway; UserError where they say something else."""
    for key in [key for key in config if key in HF_DEFAULTS]:
        value = config.pop(key)
        if value not in HF_DEFAULTS[key]:
            expected = " or ".join(json.dumps(value) for value in HF_DEFAULTS[key] if value is not None)
            more = "; name parts of the base in --train_parts" if key == "modules_to_save" else ""
            raise UserError(f"--{flag}: {key} {json.dumps(value)} is not supported: expected {expected}{more}")


def _read_init_weights(flag: str, config: dict[str, Any]) -> None:
    """Hugging Face's name for the mode, `init_weights`, as our `mode`, in place."""
    form = config.pop("init_weights", True)
    if form == "bat":
        set_once(config, "mode", "bat-col", "init_weights bat, Hugging Face's bat, whose blocks follow the outputs")
    elif form is not True:
        raise UserError(
            f"--{flag} init_weights {json.dumps(form)}: expected true (bone) or bat (here bat-col); mini, which shares "
            "its columns, is not trained here"
        )
