"""When each setting acts: the one table of it for train.py (`TRAIN`), and those of the other programs.

A setting that is not in the table of its program acts always. The checks of what was given (`layers.py`), the words in
--help and the tables in docs/settings.md are made from these tables, and tests/config/test_acts.py holds them to what
the programs do. What only a file can tell, such as whether rows have responses, is checked where the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rwkv_bone.config.names import suffix_of
from rwkv_bone.config.sections import AUTO, CONVERSATIONS, TASKS


class When(NamedTuple):
    """The values of other settings with which a setting acts."""

    names: tuple[str, ...]  # the settings that it depends on
    holds: Callable[..., bool]  # of their values, in this order
    words: str  # goes on from "acts"
    remedy: str = ""  # a flag with which it acts
    parts: tuple[When, ...] = ()  # of a condition that is made of several

    def met(self, values: Mapping[str, Any]) -> bool:
        return self.holds(*(values[name] for name in self.names))

    def remedy_for(self, values: Mapping[str, Any]) -> str:
        """A flag with which the first part that does not hold would; nothing if no single flag does it."""
        return next((part.remedy for part in self.parts or (self,) if not part.met(values)), "")

    def __and__(self, other: When) -> When:
        count = len(self.names)

        def both(*values: Any) -> bool:
            return self.holds(*values[:count]) and other.holds(*values[count:])

        words = f"{self.words}, and {other.words}"
        parts = (*(self.parts or (self,)), *(other.parts or (other,)))
        return When(self.names + other.names, both, words, parts=parts)


Table = Mapping[str, When]


def only(name: str, *values: str) -> When:
    """With one of these values of another setting."""
    return When((name,), lambda value: value in values, f"with --{name} {listed(values)}", f"--{name} {values[0]}")


def but(name: str, *values: str) -> When:
    """With every other value of another setting."""
    return When((name,), lambda value: value not in values, f"with every --{name} but {listed(values)}")


def given(*names: str) -> When:
    """With at least one of these other settings."""
    return When(names, lambda *values: any(values), f"with {listed([f'--{name}' for name in names])}", f"--{names[0]}")


def without(name: str) -> When:
    """With another setting empty, or 0."""
    return When((name,), lambda value: not value, f"without --{name}")


def listed(words: Any) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


ADAPTERS = ("bone", "lora", "pissa")
MARKED = ("qa", "se")  # masks that look for turns in the text of documents

TRAIN: dict[str, When] = {
    "chunk_ctx": When(
        ("chunk_ctx", "ctx_len", "micro_bsz", "dataload"),
        lambda chunk, tokens, rows, how: chunk < tokens * ((rows or 8) if how == "pack" else 1),
        "below --ctx_len; with --dataload pack, below --ctx_len times --micro_bsz",
    ),
    "bptt_chunks": given("chunk_ctx"),
    "quant": but("peft", "none"),
    # At stage 3 DeepSpeed takes weights away between layers, which no compiled block expects.
    "compile": but("strategy", "deepspeed_stage_3", "deepspeed_stage_3_offload"),
    "bone_mode": only("peft", "bone"),
    "bone_r": only("peft", "bone"),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_rs", "lora_plus"), only("peft", "lora", "pissa")),
    "peft_load": but("peft", "none"),
    "targets": only("peft", *ADAPTERS),
    "train_parts": but("peft", "none"),
    "data_weights": When(
        ("data_file", "dataload"),
        lambda files, how: len(files) > 1 and how != "get",
        "with several --data_file, and with every --dataload but get",
    ),
    "eval_data": without("eval_split"),
    "eval_split": without("eval_data"),
    "sft_split": but("data_type", "text"),
    "sft_field": only("data_type", *CONVERSATIONS),
    "eval_field": given("eval_data") & only("data_type", *CONVERSATIONS),
    **dict.fromkeys(("template", "tool_format"), only("data_type", *CONVERSATIONS)),
    "columns": but("data_type", "text", "tokens", "binidx"),
    "loss_mask": When(
        ("loss_mask", "data_type"),
        lambda mask, kind: mask not in ("response", "last") or kind in CONVERSATIONS,
        f"with --data_type {listed(CONVERSATIONS)}, or as none, pad, {listed(MARKED)}",
    ),
    "mask_id": only("loss_mask", "se"),
    **dict.fromkeys(("long_samples", "max_lost"), but("dataload", "get")),
    "beta": only("task", *TASKS[1:])._replace(
        words=f"with --task {listed(TASKS[1:])} (Adam's are --beta1 and --beta2)"
    ),
    "gamma": only("task", "simpo"),
    "label_smoothing": only("task", "dpo", "simpo"),
    "sft_weight": only("task", "dpo", "orpo", "simpo"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), only("task", "kto")),
    "reference": only("task", "dpo", "kto") & given("peft_load"),
    "l2wrap": only("task", "sft"),
    "lr_final": but("lr_schedule", "constant"),
    "overwrite": but("resume", "1"),
    "resume": When(
        ("resume", "overwrite"), lambda how, replace: how != "1" or not replace, "without --overwrite where it is 1"
    ),
    "resume_with": When(
        ("resume", "overwrite"),
        lambda how, replace: how in ("auto", "1") and not replace,
        "with --resume auto or 1, and without --overwrite",
        "--resume 1",
    ),
    "cards": but("accelerator", "cpu"),
    "epoch_save": When(("epoch_count",), lambda count: count > 1, "with --epoch_count above 1", "--epoch_count 2"),
    "save_minutes": When(("save_state",), bool, "with --save_state 1", "--save_state 1"),
    "rank_timeout": When(
        ("devices", "num_nodes"),
        lambda devices, nodes: devices != 1 or nodes > 1,
        "with --devices or --num_nodes above 1",
        "--devices 2",
    ),
    "eval_samples": given("eval_data", "eval_split") & only("data_type", *CONVERSATIONS),
    **dict.fromkeys(("eval_general", "eval_steps", "sample_prompts"), given("eval_data", "eval_split")),
    "early_stop": When(
        ("eval_data", "eval_split", "eval_steps"),
        lambda files, share, every: bool((files or share) and every),
        "with --eval_data or --eval_split, and with --eval_steps above 0, or auto",
    ),
}

FOLDER = When(("output",), lambda name: not suffix_of(name), "with a folder as --output")
GGUF = When(("output",), lambda name: suffix_of(name) == ".gguf", "with a .gguf file as --output")
MERGE: dict[str, When] = {
    "layout": FOLDER,
    "shard_size": FOLDER,
    "outtype": GGUF,
    "bone_r": but("peft", "state"),
    "lora_alpha": only("peft", "auto", "lora", "pissa"),
    "pissa_init": only("peft", "auto", "pissa"),
    "merge_base": but("quant", "none"),
}
MODEL = without("adapter")
CONVERT: dict[str, When] = {
    "to": given("adapter"),
    "peft": given("adapter"),
    "quant": given("adapter"),
    **{name: given("adapter") & MERGE[name] for name in ("bone_r", "lora_alpha", "pissa_init")},
    **dict.fromkeys(("names", "hf_base"), given("adapter") & FOLDER),
    **{name: MODEL & MERGE[name] for name in ("layout", "outtype", "shard_size")},
    "verify": MODEL,
}
TALK = When(
    ("prompts",),
    lambda name: not name,
    "in a conversation: without --prompts, and without a pipe (--prompts -)",
)
ANSWERS = When(("prompts",), bool, "with --prompts, or where prompts come through a pipe", "--prompts FILE")
CHAT: dict[str, When] = {
    **dict.fromkeys(("compare", "thinking", "color", "undo", "history"), TALK),
    **dict.fromkeys(("output", "bad_rows", "sft_field", "batch"), ANSWERS),
    "overwrite": given("output"),
}
READ = ("choice", "perplexity")  # tasks in which nothing is written
WRITES = but("task", *READ)
SAMPLES = WRITES & When(("temperature",), lambda heat: heat > 0, "with --temperature above 0", "--temperature 0.7")
EVALUATE: dict[str, When] = {
    **dict.fromkeys(("max_new", "temperature", "stop"), WRITES),
    **dict.fromkeys(("top_p", "samples"), SAMPLES),
    "seed": When(
        ("task", "temperature", "shots"),
        lambda task, heat, shots: bool((heat and task not in READ) or (shots and task != "perplexity")),
        "where anything is drawn: with --temperature above 0 or with --shots",
    ),
    **dict.fromkeys(("template", "system", "shots"), but("task", "perplexity")),
    "shots_file": given("shots"),
    "prompt": but("task", "perplexity", "exact"),
    "extract": only("task", "gsm8k", "math", "svamp"),
    "execute_code": only("task", "humaneval"),
}
HF: dict[str, When] = {
    "eval_field": given("eval_path"),
    "warmup_ratio": but("lr_scheduler_type", "constant"),
    "overwrite": TRAIN["overwrite"],
    "resume": TRAIN["resume"],
}
PREVIEW: dict[str, When] = {
    "show_tokens": When(("samples",), lambda count: count > 0, "with --samples above 0", "--samples 1")
}
# Values that ask for nothing, besides empty ones, 0 and auto: they are true also where the setting does not act.
NOTHING: dict[str, tuple[Any, ...]] = {
    "eval_samples": (0,),
    "epoch_save": (1,),
    "lora_plus": (1.0,),
    "lr_final": (AUTO,),
    "quant": ("none",),
    "compile": ("0",),
    "beta": (AUTO,),
    **dict.fromkeys(("gamma", "sft_weight"), (AUTO, 0.0)),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), (1.0,)),
    "reference": ("start",),
}
# What describes the files of another setting, the GPUs or a loss: with others given, it is left out unless given again.
# 0.1 is a usual --beta of dpo, and of simpo one that teaches next to nothing.
BELONGS = {"eval_data": "data_file", "data_weights": "data_file", "eval_path": "data_path", "cards": "devices"}
BELONGS |= {"beta": "task", "sft_weight": "task"}


def asks(name: str, value: Any, default: Any) -> bool:
    """Whether a value of a setting asks for anything, so that the setting must act."""
    if name in NOTHING:
        return value not in NOTHING[name]
    return value != default or bool(default and default != "auto")


def belonging(table: Table) -> Mapping[str, str]:
    """`BELONGS` of the program with this table: rows of evaluate.sh are questions of its --task."""
    return BELONGS | ({"data_file": "task"} if table is EVALUATE else {})
