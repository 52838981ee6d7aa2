"""Settings that cannot act on the data they are given with, which only the data can tell: refused, with what to do.

A setting acts if one file can use it: --template g1 is right for a chat and a novel, and wrong for two novels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rwkv_bone.config import DataConfig
from rwkv_bone.data.part import CONVERSATIONS, TOKEN_IDS, Part
from rwkv_bone.data.samples import Documents
from rwkv_bone.data.sources.rows import Rows
from rwkv_bone.errors import UserError


class Rule(NamedTuple):
    flag: str  # as the user types it, with its value in braces
    given: Callable[[DataConfig], bool]
    acts: Callable[[Part], bool]
    why: str  # what no file has or is


def _has_turns(part: Part) -> bool:
    return part.reads == CONVERSATIONS


def _has_named_fields(part: Part) -> bool:
    return part.has_named_fields


def _needs_tokenizer(part: Part) -> bool:
    # In token ids without lengths it names the id that ends a document; qa and se look for texts.
    has_lengths = part.reads == TOKEN_IDS and getattr(part.source, "lengths", None) is not None
    return not has_lengths or part.cfg.loss_mask in ("qa", "se")


def _lacks_header(part: Part) -> bool:
    return isinstance(part.source, Rows) and part.source.uses_columns


RULES = (
    Rule("--columns {columns}", lambda cfg: bool(cfg.columns), _lacks_header, "is a table without a header"),
    Rule("--template {template}", lambda cfg: cfg.template != "auto", _has_turns, "has turns"),
    Rule("--tool_format {tool_format}", lambda cfg: cfg.tool_format != "auto", _has_turns, "has turns"),
    Rule("--sft_field {sft_field}", lambda cfg: bool(cfg.sft_field), _has_named_fields, "has these fields"),
    Rule("--loss_mask {loss_mask}", lambda cfg: cfg.loss_mask == "last", _has_turns, "has responses"),
    Rule(
        "--tokenizer {tokenizer}",
        lambda cfg: cfg.tokenizer != "auto",
        _needs_tokenizer,
        "is left to tokenise",
    ),
)


def check_used(
    typed: DataConfig, parts: Sequence[Part], held_out: Callable[[], Sequence[Part]], shows_text: bool
) -> None:
    """UserError for a setting that no file can use.

    typed: as the user gave them; parts: the training data; held_out: opens each --eval_data; shows_text: the tokenizer
    is used to show ids as text.
    """
    for rule in RULES:
        if not rule.given(typed) or any(map(rule.acts, parts)) or (shows_text and rule.acts is _needs_tokenizer):
            continue
        if not any(map(rule.acts, held_out())):
            refuse(rule.flag.format(**_shown(typed)), [f"{part.name} ({part.reads})" for part in parts], rule.why)


def check_tools(typed: DataConfig, found: Sequence[Documents], held_out: Callable[[], Sequence[Part]]) -> None:
    """UserError for a --tool_format where no row has tools."""
    if typed.tool_format == "auto" or any(documents.tools for documents in found):
        return
    if not any(part.documents().tools for part in held_out()):
        refuse(f"--tool_format {typed.tool_format}", [documents.name for documents in found], "has tools")


def refuse(flag: str, names: Sequence[str], why: str) -> None:
    raise UserError(f"{flag} has no meaning here, as nothing in {', '.join(names)} {why}: remove it")


def _shown(cfg: DataConfig) -> dict[str, object]:
    return {name: " ".join(value) if isinstance(value, tuple) else value for name, value in vars(cfg).items()}
