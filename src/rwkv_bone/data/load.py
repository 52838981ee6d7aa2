"""From the settings to a `Dataset`: sources, layouts, templates, tokenizers and the cache put together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from rwkv_bone.config import DataConfig
from rwkv_bone.config.heldout import each_set
from rwkv_bone.console import counted
from rwkv_bone.data.conversations.conversation import Conversation, conversation
from rwkv_bone.data.conversations.preference import answers_of
from rwkv_bone.data.dataset import Dataset
from rwkv_bone.data.lost import WARNING
from rwkv_bone.data.part import Part
from rwkv_bone.data.samples import Documents
from rwkv_bone.data.sources.rows import Rows
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenise import RowReader
from rwkv_bone.data.tokenizer import END_MARK, Tokenizer, decode_marked, encode_marked
from rwkv_bone.data.used import check_tools, check_used
from rwkv_bone.errors import UserError

NEARLY = 1.1  # numbers of good and bad answers that are this near to balance count as balanced


def load_dataset(
    cfg: DataConfig,
    vocab_size: int,
    path: str | None = None,
    *,
    typed: DataConfig | None = None,
    shows_text: bool = False,
    keep: bool = True,
) -> Dataset:
    """Read, tokenise and check cfg.data_file, or the held-out data `path`, for a model with `vocab_size` tokens.

    cfg: for one of several held-out sets as `each_set` has it.
    typed: the settings as the user gave them, where `cfg` has a model's own tokenizer and template for `auto`;
    shows_text: the ids will be shown as text; keep: False leaves nothing on the disk, no entry of the cache either.
    UserError for data that cannot be used, beginning with its file or row, and for settings that no file of it can use.
    """

    def held_out() -> list[Part]:
        return [Part(own, vocab_size, one.path, held_out=True, keep=keep) for one, own in each_set(cfg)]

    weights = None
    if cfg.data_weights and path is None:
        if cfg.dataload == "get":
            raise UserError("--data_weights has no meaning with --dataload get, which draws anywhere: remove one")
        weights = [float(weight) for weight in cfg.data_weights]
    files = cfg.data_file if path is None else (path,)
    parts = [Part(cfg, vocab_size, name, held_out=path is not None, keep=keep) for name in files]
    if path is None:
        check_used(typed or cfg, parts, held_out, shows_text)
    found = [part.documents() for part in parts]
    if path is None:
        check_tools(typed or cfg, found, held_out)
    if path is None and cfg.task == "kto" and (line := balance_line(found)):
        found[-1] = replace(found[-1], notes=(*found[-1].notes, line))
    if weights:
        found = [
            replace(one, kind=f"{one.kind}; weight {weight:g}") for one, weight in zip(found, weights, strict=True)
        ]
    return Dataset(
        found,
        cfg.ctx_len,
        windows=cfg.dataload == "get",
        long_samples=cfg.long_samples,
        max_lost=cfg.max_lost,
        weights=weights,
    )


def balance_line(found: Sequence[Documents]) -> str:
    """What is to be said of the numbers of good and bad answers; empty if they are balanced.

    The paper (Ethayarajh et al., arXiv 2402.01306, section 4.2) has the weight of the good answers times their number
    between 1 and 4/3 of the same for bad ones.
    """
    labels = np.concatenate([np.asarray(documents.good, dtype=bool) for documents in found])
    good, bad = int(np.count_nonzero(labels)), int(np.count_nonzero(~labels))
    if not (good and bad):
        kind, remedy = ("good", "bad ones, or give --task sft") if good else ("bad", "good ones")
        number = counted(good + bad, "answer")
        return f"{WARNING}--task kto learns from good and bad answers, and all are {kind} ({number}): add {remedy}"
    ratio = good / bad
    if 1 / NEARLY <= ratio <= NEARLY * 4 / 3:
        return ""
    flag, low = ("undesirable", 0.75 * ratio) if ratio > 1 else ("desirable", 1 / ratio)
    return (
        f"{good:,} good and {counted(bad, 'bad answer')}: --{flag}_weight {low:.3g} to {low * 4 / 3:.3g} balances them "
        "(their weights times their numbers as 1 to 4/3 of good ones to 1 of bad ones)"
    )


def load_pairs(cfg: DataConfig, path: str, tokenizer: Tokenizer, limit: int | None = None) -> list[tuple[str, str]]:
    """(prompt, last response) as the template writes them, of the first `limit` rows of held-out data.

    Of preference data the response is the chosen one, or one that is labelled as good. Empty if `path` holds documents.
    """
    part = Part(cfg, tokenizer.vocab_size, path, held_out=True)
    if not isinstance(part.source, Rows):
        return []
    try:
        layout = part.layout(part.source)
    except UserError:
        if cfg.task != "sft":  # a file of prompts may have one response each, whatever the task
            with suppress(UserError):
                return load_pairs(replace(cfg, task="sft", sft_field=(), eval_field=()), path, tokenizer, limit)
        raise
    if layout.kind == "text":
        return []
    template = load_template(cfg.template, tokenizer.name, cfg.tool_format)

    def talks_of(row: dict, where: str) -> list[Conversation]:
        if layout.compares:
            return [answer.conversation for answer in answers_of(row, layout, where) if answer.good]
        return [conversation(row, layout, where)]

    def pairs_of(row: dict, where: str) -> list[tuple[str, str]]:
        # What is trained ends a document; what a model writes ends before that.
        return [
            (
                template.prompt(talk),
                decode_marked(tokenizer, encode_marked(tokenizer, template.response(talk))).partition(END_MARK)[0],
            )
            for talk in talks_of(row, where)
        ]

    reader = RowReader(part.source.parse, part.source.places, part.skip)
    items = ((number, raw) for number, raw, _ in part.source.items())
    found = (pairs for _, pairs in reader.each(items, pairs_of) if not isinstance(pairs, str))
    return list(islice(chain.from_iterable(found), limit))
