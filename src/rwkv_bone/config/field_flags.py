"""What the flags of RWKV-PEFT (its 2024 and mid-2025 scripts) mean here.

Every flag of RWKV-PEFT that does not exist here is in a table below: it is translated, ignored with a note where that
changes nothing, or refused with the reason. Nothing is skipped in silence. `flags.py` translates by these tables, and
`migration.py` writes the tables of docs/migrating.md from them.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rwkv_bone.config import BONE_MODES
from rwkv_bone.errors import UserError


class Ignored(NamedTuple):
    """Why a flag of RWKV-PEFT has no effect here."""

    why: str
    harmless: tuple[str, ...] | None = None  # the values under which ignoring the flag changes nothing; None = all


class Means(NamedTuple):
    """The value that a value of RWKV-PEFT stands for here, and why."""

    value: Any
    why: str


ZERO, ONE = ("0",), ("1",)
PILE = "the Pile pre-training schedule of RWKV-LM is not part of this repository"
STOP = "a run ends after --epoch_count epochs of --epoch_steps"
SHUFFLED = "the order of the data follows from --random_seed alone"
NOT_YET = "not supported yet"

IGNORED_FLAGS = {
    "pre_ffn": Ignored("every block has its time mix", ZERO),
    "head_qk": Ignored("there is no headQK layer", ZERO),
    "tiny_att_dim": Ignored("there is no tiny attention", ZERO),
    "tiny_att_layer": Ignored("there is no tiny attention; --tiny_att_dim decides"),
    "my_pos_emb": Ignored("there is no position embedding", ZERO),
    "my_ffn_shift": Ignored("the token shift is one position", ONE),
    "my_att_shift": Ignored("the token shift is one position", ONE),
    "head_size_divisor": Ignored("it is fixed at 8 (the epsilon of ln_x)", ("8",)),
    "dropout": Ignored("there is no dropout here", ZERO),
    "layerwise_lr": Ignored("each parameter has upstream's multiple of the rate (w0 of RWKV-7: 2)", ONE),
    "weight_decay_final": Ignored("the weight decay is constant, --weight_decay", ("-1",)),
    "my_pile_version": Ignored(PILE),
    "my_pile_stage": Ignored(PILE, ZERO),
    "my_pile_shift": Ignored(PILE),
    "my_pile_edecay": Ignored(PILE, ZERO),
    "magic_prime": Ignored(SHUFFLED),
    "my_random_steps": Ignored(SHUFFLED, ZERO),
    "my_sample_len": Ignored("the length of a sample is --ctx_len", ZERO),
    "my_qa_mask": Ignored("--loss_mask says what is trained", ZERO),
    "my_exit": Ignored(STOP, ("99999999",)),
    "my_exit_tokens": Ignored(STOP, ZERO),
    "load_partial": Ignored("checkpoints load completely or not at all", ZERO),
    "data_shuffle": Ignored("samples are always shuffled, by --random_seed", ONE),
    "optim": Ignored("the optimiser is AdamW", ("none", "adam", "adamw")),
    "fla": Ignored("--op chooses the WKV operator"),
    "fused_kernel": Ignored("--op chooses the WKV operator"),
    "compile": Ignored("nothing here is compiled by torch.compile"),
    "l2warp_sparse": Ignored("--l2wrap is the penalty's weight"),
    "avg_loss": Ignored("the loss of a step is the mean over all its trained tokens"),
    "ds_bucket_mb": Ignored("DeepSpeed's bucket size follows from what is trained"),
    "enable_progress_bar": Ignored("the progress bar is always shown", ("1", "true", "")),
}


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
ADAPTER_FLAGS = {
    "bone_config": "bone",
    "disha_config": "bone",
    "peft_config": "bone",
    "lora_config": "lora",
    "pissa_config": "pissa",
}
# The other flags that are translated, and into what.
TRANSLATED_FLAGS = {
    "dim_att": "`--n_embd`: the time mix is as wide as the model",
    "train_type": "`state` is `--peft state`, or beside an adapter `--train_parts state`; `infctx` is "
    "`--chunk_ctx`, with 512 unless it is given, and the gradient is exact; `none` is nothing",
    "state_tune": "as `--train_type state`",
}
TRAIN_FLAGS = (*IGNORED_FLAGS, *ADAPTER_FLAGS, *TRANSLATED_FLAGS)

NO_FP16 = "fp16 overflows in RWKV and is not supported: use bf16, or fp32"
# flag, the same in both programs -> value of RWKV-PEFT -> what it means here, or why it is refused
VALUES: dict[str, dict[str, Means | str]] = {
    "peft": {
        "disha": Means("bone", "DiSHA and MiSS are other names of Bone"),
        "miss": Means("bone", "DiSHA and MiSS are other names of Bone"),
        **dict.fromkeys(("adalora", "prefix"), NOT_YET),
    },
    "precision": {
        **dict.fromkeys(("bf16-true", "bf16-mixed"), Means("bf16", "frozen weights bf16, trained ones fp32")),
        **dict.fromkeys(("fp16", "16", "16-true", "16-mixed"), NO_FP16),
        **dict.fromkeys(("32", "32-true"), "write --precision fp32"),
        "tf32": "matrices are multiplied in full bf16 or fp32: use one of these",
    },
    "data_type": {
        **dict.fromkeys(("utf-8", "utf-16le"), Means("text", "the file is one document, its encoding is recognised")),
        **dict.fromkeys(("numpy", "uint16"), Means("tokens", "an array of token ids, .npy or bare uint16")),
        "dummy": "there is no dummy data: name a file",
    },
    "quant": {
        "4bit": Means("fp4", "RWKV-PEFT asked bitsandbytes for 4bit, which made it fp4; nf4 is more exact"),
        "fp8": "there is no fp8: int8 takes as much memory and is more exact",
    },
    "lr_schedule": {"wsd": "in RWKV-PEFT wsd was a cosine to 0: use --lr_schedule cos --lr_final 0"},
    "op": dict.fromkeys(("fla", "triton"), Means("auto", "there is no Triton operator here")),
    "strategy": dict.fromkeys(
        ("single-device", "ddp", "deepspeed", "fsdp"), "every run goes through DeepSpeed ZeRO: use deepspeed_stage_1"
    ),
    "warmup_steps": {"-1": Means(0, "no warm-up")},
    "random_seed": {"-1": Means(42, "every run is seeded")},
}

MERGE_IGNORED_FLAGS = {
    "device": Ignored("merging runs on the CPU"),
}
MERGE_TRANSLATED_FLAGS = {
    "type": "`lora` and `pissa` are `--peft`; `bone` and `disha` are nothing, since their shapes tell them apart",
    "lora_init": "`--pissa_init`",
}
MERGE_FLAGS = (*MERGE_IGNORED_FLAGS, *MERGE_TRANSLATED_FLAGS)


def translate_train(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(settings under their names here, notes for the user) of the flags given.

    Values of RWKV-PEFT's flags are the text as typed. UserError for what is refused, malformed or contradictory.
    """
    theirs = [name for name in TRAIN_FLAGS if name in given]
    given, notes = _read_values(given)
    said = [name for name in ADAPTER_FLAGS if name in given]
    adapter = bool(said)
    for name in said:
        text, kind = given.pop(name), given.get("peft", ADAPTER_FLAGS[name])
        if kind != ADAPTER_FLAGS[name] and name != "peft_config":
            notes.append(f"--{name} is ignored: only --peft {ADAPTER_FLAGS[name]} reads it")
            continue
        if kind not in ADAPTER_KEYS:
            raise UserError(f"--{name} has no meaning with --peft {kind}: remove one")
        settings, unread = _adapter_config(name, text, kind)
        notes += unread
        given["peft"] = kind
        if kind == "bone" and "bone_mode" not in settings | given:
            notes.append(f"--{name} names no mode: bone; RWKV-PEFT before bone_mode trained what is now called bat")
        for key, value in settings.items():
            _set(given, key, value, f"--{name}")
    given, said = _train_type(given)
    notes += said
    if "dim_att" in given:
        width = given.pop("dim_att")
        if not width.isdecimal():
            raise UserError(f"--dim_att {width}: expected a whole number")
        if int(width):
            _set(given, "n_embd", int(width), "--dim_att")  # the time mix is as wide as the model
    given, ignored = _ignore(given, IGNORED_FLAGS)
    notes += ignored
    if theirs and "config" not in given:
        notes += _unsaid(given, f"an RWKV-PEFT command line (it has --{theirs[0]})", adapter=adapter)
    return given, notes


def translate_merge(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `translate_train`, for merge.py."""
    given, notes = _read_values(given)
    kind, init = given.pop("type", ""), given.pop("lora_init", "")
    if kind in ("lora", "pissa"):
        _set(given, "peft", kind, "--type")
        notes.append(f"--type {kind} is read as --peft {kind}")
    elif kind in ("bone", "disha"):
        notes.append(f"--type {kind} is ignored: bone and bat are told apart by their shapes")
    elif kind:
        raise UserError(f"--type {kind}: expected lora, pissa, bone or disha")
    if init:
        _set(given, "pissa_init", init, "--lora_init")
        notes.append("--lora_init is read as --pissa_init")
    if kind == "pissa" and given.pop("lora_alpha", None) is not None:
        notes.append("--lora_alpha is ignored: PiSSA of RWKV-PEFT has no alpha")
    given, ignored = _ignore(given, MERGE_IGNORED_FLAGS)
    return given, notes + ignored


def _read_values(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
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
    config, notes = {key.removeprefix(f"{kind}_"): value for key, value in config.items()}, []
    if kind == "bone":
        _read_init_weights(flag, config)
    if kind == "pissa":
        if "svd_niter" in config:
            found = config.pop("svd_niter")
            notes.append(f"--{flag} svd_niter {found} is ignored: how exact the components are changes nothing else")
        if config.pop("init", ""):
            raise UserError(
                f"--{flag}: pissa_init is needed for adapters of RWKV-PEFT alone, those of this repository hold their "
                "initial factors; to go on from one of RWKV-PEFT, merge it (merge.py --pissa_init) and train the result"
            )
    keys = ADAPTER_KEYS[kind]
    unknown = config.keys() - keys.keys()
    if unknown:
        expected = ", ".join(f"{kind}_{key}" for key in keys)
        raise UserError(f"--{flag}: unknown key {', '.join(sorted(unknown))}; expected {expected}")
    if config.get("mode", "bone") not in BONE_MODES:
        # RWKV-PEFT's own default, "mode", trained no adapter at all and said nothing.
        raise UserError(f"--{flag}: mode {config['mode']!r} is none of {', '.join(BONE_MODES)}")
    for key, value in config.items():
        if keys[key].type is float and type(value) is int:
            config[key] = float(value)
        elif type(value) is not keys[key].type:
            raise UserError(f"--{flag}: {key} {json.dumps(value)}: expected {keys[key].what}")
    return {keys[key].ours: value for key, value in config.items()}, notes


def _read_init_weights(flag: str, config: dict[str, Any]) -> None:
    """Hugging Face's name for the mode, `init_weights`, as our `mode`, in place."""
    form = config.pop("init_weights", True)
    if form == "bat":
        _set(config, "mode", "bat-col", "init_weights bat, Hugging Face's bat, whose blocks follow the outputs")
    elif form is not True:
        raise UserError(
            f"--{flag} init_weights {json.dumps(form)}: expected true (bone) or bat (here bat-col); mini, which shares "
            "its columns, is not trained here"
        )


def _train_type(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`--train_type state` (or `--state_tune 1`) and `--train_type infctx` as settings; and notes."""
    given, notes = dict(given), []
    kind = given.pop("train_type", "none")
    tuned = given.pop("state_tune", "0").lower()
    if kind not in ("none", "", "state", "infctx"):
        raise UserError(f"--train_type {kind}: expected none, state or infctx")
    if kind == "state" or tuned in ("1", "true"):
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


def _set(given: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Set a setting, in place; UserError if it was given another value."""
    if given.setdefault(name, value) != value:
        raise UserError(f"--{name} {given[name]} contradicts {source}, which says {value}: keep one")


def _unsaid(given: dict[str, Any], who: str, adapter: bool) -> list[str]:
    """Set, in place, what RWKV-PEFT means by flags that were left out. Returns the notes.

    who: how the notes call the command line. adapter: whether another flag than --peft names an adapter.
    """
    notes = []
    if "peft" not in given and not adapter:
        given["peft"] = "none"
        notes.append(f"{who} without --peft trains every weight: read as --peft none")
    if given.get("peft", "bone") != "none" and "train_parts" not in given:
        notes.append("without --train_parts only the adapter is trained; RWKV-PEFT then trains time and ln too")
    steps, window = given.get("epoch_steps", 0), given.get("accumulate_grad_batches", 1)
    if steps and window > 1:
        given["epoch_steps"] = -(-steps // window)
        notes.append(
            f"{who} counts --epoch_steps in forward passes: {steps} of them, {window} to a step, "
            f"are {given['epoch_steps']} optimiser steps here"
        )
    return notes
