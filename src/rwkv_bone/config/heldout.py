"""Several held-out sets: their names, files and fields in --eval_data and --eval_field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from rwkv_bone.config.sections import DataConfig

MAIN, GENERAL = "heldout", "general"
NAME = re.compile(r"([^=/.:,\s]+)=(.+)", re.DOTALL)  # as scripts/lib.sh reads it


class Named(NamedTuple):
    """A held-out set: its name, and its file, folder or name of the Hub."""

    name: str
    path: str


def split_name(word: str) -> Named:
    """`NAME=FILE` taken apart; the name is empty where there is none. A file whose path has a = is found as it is."""
    found = NAME.fullmatch(word)
    return Named(*found.groups()) if found and not Path(word).exists() else Named("", word)


def named_sets(words: Sequence[str]) -> list[Named]:
    """The sets of --eval_data, the main one first. UserError if two have the same name.

    A set without a name has that of its file, up to the first dot; the first is `heldout` if no other lacks one.
    """
    sets = [split_name(word) for word in words]
    unnamed = [number for number, one in enumerate(sets) if not one.name]
    for number in unnamed:
        stem = Path(sets[number].path).name.partition("@")[0].partition(".")[0]
        sets[number] = sets[number]._replace(name=MAIN if unnamed == [0] else stem or MAIN)
    for number, one in enumerate(sets):
        if other := next((before for before in sets[:number] if before.name == one.name), None):
            raise UserError(
                f"--eval_data: {other.path} and {one.path} are both named {one.name}: give each a name of its own, "
                f"--eval_data {one.name}={other.path} {one.name}2={one.path}"
            )
    return sets


def check_sets(cfg: DataConfig) -> None:
    """UserError for names of held-out sets and fields that do not fit together."""
    sets = named_sets(cfg.eval_data)
    if cfg.eval_general != "none" and any(one.name == GENERAL for one in sets):
        raise UserError(
            f"--eval_data {GENERAL}=...: that is the name of what --eval_general measures: give it another, or "
            "--eval_general none"
        )
    names = [one.name for one in sets]
    for word in cfg.eval_field:
        name, equals, fields = word.partition("=")
        if equals and sets and name not in names:
            raise UserError(f"--eval_field {word}: no held-out set is named {name}; there are {', '.join(names)}")
        words = fields.split(",")
        if equals and not (all(words) and len(words) <= (2 if cfg.task == "sft" else 3)):
            raise UserError(f"--eval_field {word}: expected the fields of a set, such as {name}=question,answer")


def fields_of(cfg: DataConfig, name: str) -> tuple[str, ...]:
    """The words of --eval_field for the set of this name: its own, or those for all."""
    for word in cfg.eval_field:
        if word.startswith(f"{name}="):
            return tuple(word.partition("=")[2].split(","))
    return common_fields(cfg.eval_field)


def common_fields(words: Sequence[str]) -> tuple[str, ...]:
    """The words of --eval_field that are for every set."""
    return tuple(word for word in words if "=" not in word)


def each_set(cfg: DataConfig) -> Iterator[tuple[Named, DataConfig]]:
    """Each held-out set, with the settings by which its file is read."""
    for one in named_sets(cfg.eval_data):
        yield one, replace(cfg, eval_data=(one.path,), eval_field=fields_of(cfg, one.name))
