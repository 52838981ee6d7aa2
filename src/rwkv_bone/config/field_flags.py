"""What the flags of RWKV-PEFT (its scripts of 2023 to 2026) and of RWKV-LM mean here.

Every flag of theirs that does not exist here is in a table below, in `field_adapters.py` or in `pretraining.py`: it is
translated, ignored with a note where that changes nothing, or refused with the reason. Nothing is skipped in silence.
What such a command line leaves unsaid has another meaning there than here: that is set, or named in a note.
`flags.py` translates by these tables, and `migration.py` writes the tables of docs/migrating.md from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_bone.config import pretraining
from rwkv_bone.config.field_adapters import ADAPTER_FLAGS, EARLY_FLAGS, read_adapter_flags, set_once
from rwkv_bone.config.pretraining import read_pretraining
from rwkv_bone.config.sections import AdapterConfig, DataConfig, OptimConfig, RunConfig
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
PILE = "the schedule follows from --lr_schedule and --warmup_steps"
BATCHES = "a thread of each process makes the batches"
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
    "my_pile_version": Ignored("the data is --data_file"),
    "my_pile_shift": Ignored("the data is --data_file"),
    "my_pile_edecay": Ignored(PILE, ZERO),
    "magic_prime": Ignored(SHUFFLED),
    "my_random_steps": Ignored(SHUFFLED, ZERO),
    "my_sample_len": Ignored("the length of a sample is --ctx_len", ZERO),
    "my_qa_mask": Ignored("--loss_mask says what is trained", ZERO),
    "my_exit": Ignored(STOP, ("99999999",)),
    "load_partial": Ignored("checkpoints load completely or not at all", ZERO),
    "data_shuffle": Ignored("samples are always shuffled, by --random_seed", ONE),
    **dict.fromkeys(("optim", "optimizer"), Ignored("the optimiser is AdamW", ("none", "adam", "adamw"))),
    **dict.fromkeys(("fla", "fused_kernel", "kernel"), Ignored("--op chooses the WKV operator")),
    "head_chunk": Ignored("the head's loss is always computed in pieces"),
    "merge": Ignored("the adapter alone is saved, and merge.py merges it"),
    **dict.fromkeys(("num_workers", "persistent_workers", "prefetch_factor"), Ignored(BATCHES)),
    "svd_niter": Ignored("how exact PiSSA's components are changes nothing else"),
    **dict.fromkeys(("lisa_r", "lisa_k", "lisa_config"), Ignored("only LISA reads it, which is not here")),
    "compile": Ignored("nothing here is compiled by torch.compile"),
    "l2warp_sparse": Ignored("--l2wrap is the penalty's weight"),
    "avg_loss": Ignored("the loss of a step is the mean over all its trained tokens"),
    "ds_bucket_mb": Ignored("DeepSpeed's bucket size follows from what is trained"),
    "enable_progress_bar": Ignored("the progress bar is always shown", ("1", "true", "")),
}


# The other flags that are translated, and into what.
TRANSLATED_FLAGS = {
    "dim_att": "`--n_embd`: the time mix is as wide as the model",
    "train_type": "`state` is `--peft state`, or beside an adapter `--train_parts state`; `infctx` is "
    "`--chunk_ctx`, with 512 unless it is given, and the gradient is exact; `none` is nothing",
    "state_tune": "as `--train_type state`",
    **pretraining.FLAGS,
    **EARLY_FLAGS,
}
TRAIN_FLAGS = (*IGNORED_FLAGS, *ADAPTER_FLAGS, *TRANSLATED_FLAGS)
# RWKV-PEFT's scripts of December 2024, those of June 2025, and what came before and after them; and RWKV-LM's.
Y2023, Y2024, Y2025, LATER, LM = "2023", "2024", "2025", "2026", "RWKV-LM"
# Flags that only one of these has.
ERAS = {
    **dict.fromkeys((*EARLY_FLAGS, "svd_niter", "lisa_r", "lisa_k", "lisa_config"), Y2023),
    **dict.fromkeys(("bone_config", "state_tune", "compile", "l2warp_sparse", "enable_progress_bar"), Y2024),
    **dict.fromkeys(("disha_config", "op", "fused_kernel", "lr_schedule", "peft_checkpoint"), Y2025),
    **dict.fromkeys(("peft_config", "miss_config", "merge", "optimizer", "target_modules"), LATER),
    **dict.fromkeys(("num_workers", "persistent_workers", "prefetch_factor"), LATER),
    **dict.fromkeys(("train_stage", "kernel", "head_chunk"), LM),
}
# What a checkpoint knows. Nobody types it here, and every script of theirs does.
SIZES = ("my_testing", "n_layer", "n_embd", "vocab_size", "dim_ffn", "head_size")
# Names of theirs that other trainers have, too: by habit somebody may type them here.
COMMON = frozenset(
    ("compile", "dropout", "enable_progress_bar", "kernel", "merge", "num_workers", "optim", "optimizer")
)
COMMON |= {"persistent_workers", "prefetch_factor", "target_modules"}

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
    "type": "`lora`, `pissa` and `state` are `--peft`; `bone`, `disha` and `miss` are nothing, since their shapes tell "
    "them apart",
    "lora_init": "`--pissa_init`, and `--type pissa`; left out where there is no such file, since an adapter of this "
    "repository holds its initial factors",
    "state_checkpoint": "`--peft_checkpoint`, and `--type state`",
}
MERGE_FLAGS = (*MERGE_IGNORED_FLAGS, *MERGE_TRANSLATED_FLAGS)


def translate_train(given: dict[str, Any], trains: bool = True) -> tuple[dict[str, Any], list[str]]:
    """(settings under their names here, notes for the user) of the flags given.

    Values of RWKV-PEFT's flags are the text as typed. trains: False for a program that only reads the data, and needs
    no note about training. UserError for what is refused, malformed or contradictory.
    """
    sign, era = _sign(given, trains), _era(given)
    given, notes = _read_values(given)
    ours = not sign or "config" in given
    notes += [] if ours else _epoch_steps(given, era)
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
    notes += [] if ours else _unsaid_of_data(given, era)
    notes += [] if ours or not trains else _unsaid_of_training(given, era, sign)
    return given, notes


def translate_merge(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `translate_train`, for merge.py."""
    given, notes = _read_values(given)
    kind, init, state = (given.pop(name, "") for name in ("type", "lora_init", "state_checkpoint"))
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
        set_once(given, "peft", kind, "--state_checkpoint" if state else "--type")
        notes.append(f"{f'--state_checkpoint {state}' if state else f'--type {kind}'} is read as --peft {kind}")
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
    if kind and not any(word.split("=")[0] in ("--type", "--peft", "--state_checkpoint", "--help") for word in words):
        words = [f"--type={kind}", *words]
    return words + (["--device", "gpu"] if "--use-gpu" in argv else [])


def kind_named(name: str) -> str:
    """What --peft NAME means here: bone for disha and miss."""
    meaning = VALUES["peft"].get(name)
    return meaning.value if isinstance(meaning, Means) else name


def _sign(given: dict[str, Any], trains: bool) -> str:
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


def _era(given: dict[str, Any]) -> str:
    """The newest version of RWKV-PEFT whose flags are given; nothing where they are those of all of them."""
    eras = {ERAS[name] for name in given if name in ERAS}
    # What --peft names in these versions alone: before, --train_type state was state tuning.
    kinds = {"disha": Y2025, **dict.fromkeys(("miss", "adalora", "prefix", "state"), LATER)}
    eras.add(kinds.get(given.get("peft", ""), ""))
    return next((era for era in (LATER, Y2025, Y2024, Y2023) if era in eras), "")


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


def _epoch_steps(given: dict[str, Any], era: str) -> list[str]:
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
    defaults = {spec.name: spec.default for section in (DataConfig, OptimConfig, RunConfig) for spec in fields(section)}
    left = [f"--{name} {defaults[name]} (there {value})" for name, value in theirs.items() if name not in given]
    return [f"left out, with another default than in RWKV-PEFT: {', '.join(left)}"] if left else []


def _unsaid_of_data(given: dict[str, Any], era: str) -> list[str]:
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


def _unsaid_of_training(given: dict[str, Any], era: str, sign: str) -> list[str]:
    """As `_unsaid_of_data`, about what is trained and how; sets --peft, in place, where nothing names an adapter."""
    notes = _other_defaults(given, {"lr_init": "6e-4", "lr_final": "1e-5", "epoch_count": "500"})
    named = [spec.name for spec in fields(AdapterConfig) if spec.name in given and spec.name != "train_parts"]
    if not named and not given.get("resume"):  # which goes on with what the run has
        given["peft"] = "none"
        notes.append(
            f"a command line of RWKV-PEFT or RWKV-LM (it has {sign}) without --peft trains every weight: read as "
            "--peft none; --peft bone trains an adapter"
        )
        if given.get("train_parts"):
            notes.append(f"--train_parts {' '.join(given.pop('train_parts'))} is ignored: every weight is trained")
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
