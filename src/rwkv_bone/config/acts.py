"""When each setting of train.py acts: the one table of it, and the words for its rows.

A setting that is not in `TRAIN` acts in every run. The checks of what was given (`layers.py`), the words in --help and
the table in docs/settings.md are made from this table, and tests/config/test_acts.py holds it to what runs do. What
only a file can tell, such as whether rows have responses, is checked where the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class When(NamedTuple):
    """The values of other settings with which a setting acts."""

    names: tuple[str, ...]  # the settings that it depends on
    holds: Callable[..., bool]  # of their values, in this order
    words: str  # goes on from "acts"
    remedy: str = ""  # a flag with which it acts

    def met(self, values: Mapping[str, Any]) -> bool:
        return self.holds(*(values[name] for name in self.names))

    def __and__(self, other: When) -> When:
        count = len(self.names)

        def both(*values: Any) -> bool:
            return self.holds(*values[:count]) and other.holds(*values[count:])

        words = f"{self.words}, and {other.words}"
        return When(self.names + other.names, both, words, self.remedy or other.remedy)


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
CONVERSATIONS = ("auto", "sft", "table", "hf")  # values of --data_type with which rows may be conversations
MARKED = ("qa", "se")  # masks that look for turns in the text of documents

TRAIN: dict[str, When] = {
    "chunk_ctx": When(
        ("chunk_ctx", "ctx_len", "micro_bsz", "dataload"),
        lambda chunk, tokens, rows, how: chunk < tokens * (rows if how == "pack" else 1),
        "below --ctx_len; with --dataload pack, below --ctx_len times --micro_bsz",
    ),
    "bptt_chunks": given("chunk_ctx"),
    "quant": but("peft", "none"),
    "bone_mode": only("peft", "bone"),
    "bone_r": only("peft", "bone"),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_rs", "lora_plus"), only("peft", "lora", "pissa")),
    "peft_load": but("peft", "none"),
    "targets": only("peft", *ADAPTERS),
    "train_parts": but("peft", "none"),
    "data_weights": but("dataload", "get"),
    "eval_data": without("eval_split"),
    "eval_split": without("eval_data"),
    "sft_split": but("data_type", "text"),
    "sft_field": only("data_type", *CONVERSATIONS),
    "template": only("data_type", *CONVERSATIONS),
    "loss_mask": When(
        ("loss_mask", "data_type"),
        lambda mask, kind: mask not in ("response", "last") or kind in CONVERSATIONS,
        f"with --data_type {listed(CONVERSATIONS)}, or as none, pad, {listed(MARKED)}",
    ),
    "mask_id": only("loss_mask", "se"),
    "long_samples": but("dataload", "get"),
    "lr_final": but("lr_schedule", "constant"),
    "weight_decay": When(
        ("peft", "train_parts"),
        lambda kind, parts: kind != "state" or bool({"emb", "head"} & {*parts}),
        "with every --peft but state, or with --train_parts emb or head",
    ),
    "overwrite": without("resume"),
    "resume": without("overwrite"),
    "epoch_save": When(("epoch_count",), lambda count: count > 1, "with --epoch_count above 1", "--epoch_count 2"),
    "eval_samples": given("eval_data", "eval_split") & only("data_type", *CONVERSATIONS),
}

# Values that ask for nothing, besides empty ones, 0 and auto: they are true also where the setting does not act.
NOTHING: dict[str, Any] = {"eval_samples": 0, "epoch_save": 1, "lora_plus": 1.0, "quant": "none"}
# What describes the files of another setting: with other files given, it is left out unless it is given again.
BELONGS = {"eval_data": "data_file", "data_weights": "data_file", "eval_path": "data_path"}


def asks(name: str, value: Any, default: Any) -> bool:
    """Whether a value of a setting asks for anything, so that the setting must act."""
    if name in NOTHING:
        return value != NOTHING[name]
    return value != default or bool(default and default != "auto")
