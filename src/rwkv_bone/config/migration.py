"""The tables of docs/migrating.md: python -m rwkv_bone.config.migration docs/migrating.md

It makes the tables from the settings and from `field_flags.py`, so that the page and the command line agree, and writes
them between the two marks of the page. The text around them is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import Field, fields
from typing import NamedTuple

from rwkv_bone.config import pages
from rwkv_bone.config.field_adapters import ADAPTER_FLAGS, ADAPTER_KEYS, HF_FLAG
from rwkv_bone.config.field_flags import (
    ERAS,
    IGNORED_FLAGS,
    MERGE_IGNORED_FLAGS,
    MERGE_TRANSLATED_FLAGS,
    TRANSLATED_FLAGS,
    VALUES,
    Ignored,
    Means,
)
from rwkv_bone.config.fields import worded
from rwkv_bone.config.flags import ALIASES
from rwkv_bone.config.pages import table
from rwkv_bone.config.saved import SECTIONS
from rwkv_bone.config.sections import MergeConfig
from rwkv_bone.errors import exit_status

BEGIN = "<!-- Made by python -m rwkv_bone.config.migration docs/migrating.md: change the tables there. -->"


class Same(NamedTuple):
    """A flag that RWKV-PEFT has under the same name: its default there, and what else differs."""

    default: str
    differs: str = ""


READ = Same("", "may be left out")
SAME_FLAGS = {
    "load_model": Same("empty", "`0` is RWKV-LM's `rwkv-init.pth` in `--proj_dir`, or a new model"),
    "proj_dir": Same("out", "results of an earlier run are not replaced without `--overwrite 1`"),
    "wandb": Same("empty"),
    "random_seed": Same("-1"),
    "data_file": Same("empty", "several files, and more formats"),
    "data_type": Same("utf-8"),
    "vocab_size": READ._replace(default="0"),
    "ctx_len": Same("1024", "any length from one token up"),
    "epoch_steps": Same(
        "1000",
        "there it counts forward passes: a command line of RWKV-PEFT has it divided by `--accumulate_grad_batches`; "
        "since 2026 it is the number of samples to keep: `--sft_split`",
    ),
    "epoch_count": Same("500"),
    "epoch_begin": Same("0", "there it moves the learning rate too"),
    "epoch_save": Same("5"),
    "micro_bsz": Same("12"),
    "n_layer": READ._replace(default="6"),
    "n_embd": READ._replace(default="512"),
    "dim_ffn": READ._replace(default="0"),
    "head_size_a": READ._replace(default="64"),
    "my_testing": READ._replace(default="x052"),
    "lr_init": Same("6e-4"),
    "lr_final": Same("1e-5", "reached at the last step, on any number of devices and with accumulation"),
    "lr_schedule": Same("cos", "warm-up and `--lr_final` count in every schedule; the curve of 2024 is `exp`"),
    "warmup_steps": Same("-1"),
    "beta1": Same("0.9"),
    "beta2": Same("0.99"),
    "adam_eps": Same("1e-8"),
    "weight_decay": Same("0", "there on every matrix, however small"),
    "grad_cp": Same("0"),
    "compile": Same("0", "only in 2024, where it compiled the whole model"),
    "peft": Same("none", "left out on a command line of RWKV-PEFT or RWKV-LM, it is `none`, as there"),
    "train_parts": Same("time ln"),
    "quant": Same("none", "the adapter is merged into the quantised weights, on which it was trained"),
    "dataload": Same("get (2025: pad)", "`pad` pads; there it goes on into the next documents"),
    "loss_mask": Same("none", "with `qa` and `se` the marker itself is not trained, nor a document without one"),
    "mask_id": Same("0 and 1"),
    "chunk_ctx": Same("512", "works without `--train_type infctx`; there the gradient is cut between chunks"),
    "sft_field": Same("none", "may be left out"),
    "sft_split": Same("train"),
    "op": Same("cuda"),
    "accelerator": Same("gpu"),
    "devices": Same("1"),
    "num_nodes": Same("1"),
    "strategy": Same("auto"),
    "precision": Same("fp16"),
    "accumulate_grad_batches": Same("1"),
}
MERGE_SAME_FLAGS = {
    "base_model": Same("empty"),
    "peft_checkpoint": Same("empty"),
    "lora_checkpoint": Same("empty"),
    "output": Same("empty", "an existing file is not replaced without `--overwrite 1`"),
    "quant": Same("none", "an adapter of RWKV-PEFT has no metadata: give it"),
    "lora_alpha": Same("16", "an adapter of RWKV-PEFT has no metadata: give it"),
}


def tables() -> str:
    """The tables, in Markdown."""
    train = {spec.name: spec for section in SECTIONS.values() for spec in fields(section)}
    merge = {spec.name: spec for spec in fields(MergeConfig)}
    return "\n\n".join(
        [
            "### Flags of train.py with the same name",
            _same(SAME_FLAGS, train),
            "### Values with another name, and values that are refused",
            table("flag and value | here", _values()),
            "### Flags of train.py that are translated",
            table("flag | in | here", _translated({**_adapters(), **TRANSLATED_FLAGS})),
            "### Flags of train.py that have no effect here",
            "Each is ignored with a note. Where the table names a value, any other value is refused.",
            table("flag | in | only with | why it has no effect", _ignored(IGNORED_FLAGS)),
            "### Flags of merge.py",
            _same(MERGE_SAME_FLAGS, merge),
            table("flag | in | here", _translated(MERGE_TRANSLATED_FLAGS)),
            table("flag | in | only with | why it has no effect", _ignored(MERGE_IGNORED_FLAGS)),
        ]
    )


def _same(flags: dict[str, Same], settings: dict[str, Field[object]]) -> str:
    names = {alias: name for name, alias in ALIASES.items()}
    rows = []
    for flag, (default, differs) in flags.items():
        spec = settings[names.get(flag, flag)]
        here = _written(worded(spec, spec.default))
        meaning = spec.metadata["help"] if spec.name == flag else f"`--{spec.name}`: {spec.metadata['help']}"
        rows.append((f"`--{flag}`", ERAS.get(flag, "all"), default, here, meaning, differs))
    return table("flag | in | default there | default here | meaning here | what differs", rows)


def _written(default: object) -> str:
    if isinstance(default, bool | float):
        return f"{default:g}"
    return "empty" if default in ("", ()) else str(default)


def _values() -> Iterable[tuple[str, ...]]:
    for flag, values in VALUES.items():
        for value, meaning in values.items():
            told = f"`{meaning.value}`: {meaning.why}" if isinstance(meaning, Means) else f"refused: {meaning}"
            yield f"`--{flag} {value}`", told


def _adapters() -> dict[str, str]:
    """{flag: what its JSON of an adapter is translated into}."""
    told = {}
    for flag, kind in ADAPTER_FLAGS.items():
        keys = ", ".join(f"`{kind}_{key}` is `--{ours.ours}`" for key, ours in ADAPTER_KEYS[kind].items())
        told[flag] = f"`--peft {kind}`; {keys}; keys also without `{kind}_`"
    told[HF_FLAG] = (
        "as the JSON of the adapter that `--peft` names; `init_weights` `bat` is `--bone_mode bat-col`; of a LoRA, `r` "
        "and `lora_alpha` that are left out are 8"
    )
    for flag in told:
        told[flag] += "; `target_modules` is as the flag"
    told["lora_config"] += "; `lora_parts` is as the flag"
    return told


def _translated(flags: dict[str, str]) -> Iterable[tuple[str, ...]]:
    return ((f"`--{flag}`", ERAS.get(flag, "all"), told) for flag, told in flags.items())


def _ignored(flags: dict[str, Ignored]) -> Iterable[tuple[str, ...]]:
    for flag, (why, harmless) in flags.items():
        only = "any value" if harmless is None else ", ".join(f"`{value}`" for value in harmless if value)
        yield f"`--{flag}`", ERAS.get(flag, "all"), only, why


def renewed(page: str) -> str:
    """The text of the page with the tables of today between its marks; UserError if it has no such marks."""
    return pages.renewed(page, BEGIN, tables())


def main() -> None:
    pages.write(renewed)


if __name__ == "__main__":
    sys.exit(exit_status(main))
