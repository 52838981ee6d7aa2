"""Rows of prompts and responses, or of messages, as token ids of a Hugging Face tokenizer.

A tokenizer with a chat template writes the conversation, its thinking and tools; without one, a prompt and its response
are joined as they are. What the template has no place for is written in the text of the turns, and counted. Only
responses are trained, each with the end-of-turn or end-of-text tokens after it. A prompt and the response after it are
tokenised apart, as they are when the trained model answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_bone.console import counted
from rwkv_bone.data.conversations.conversation import (
    NOTHING_TRAINED,
    Conversation,
    Layout,
    Turn,
    check_named,
    conversation,
    layout_of,
)
from rwkv_bone.data.conversations.remarks import Remarks
from rwkv_bone.data.ids import check_ids
from rwkv_bone.data.lost import Lost
from rwkv_bone.data.sources.open import Rows, Split, open_source
from rwkv_bone.data.templates.segments import think_block
from rwkv_bone.data.templates.tools import has_tools, with_tools_as_text
from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED_LABEL = -100  # the label of tokens that are not trained, in transformers and PyTorch
# What messages about files call the flags of train.py, and what those of train_hf.py are called; some it does not have.
OWN_FLAGS = {
    "--sft_field": "--dataset_field",
    "--sft_split": "--dataset_split",
    "--data_file and --eval_data take": "--data_path and --eval_path take",
    "; a dataset of the hub with --data_type hf": "",
    ", or give --data_type": "",
    ".bin or --data_type hf": " another name",
}
# Remarks.
TOOLS_AS_TEXT = "rows whose tools, calls and results are text of their turns, as the chat template writes none of them"
THINKING_AS_TEXT = "rows whose thinking is a <think> block in the text, as the chat template has no place for it"


@dataclass(frozen=True)
class Limits:
    """What a model can read; 0 where nothing limits it."""

    vocab_size: int = 0  # rows of the embedding
    positions: int = 0  # tokens of a sample

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Limits:
        """Of a model's configuration.

        Rotary positions have no table, but a limit that the model was made for; it grows with the factor of the
        scalings that are applied on top of it.
        """
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or 0
        if positions < 0 or text.model_type.startswith("rwkv"):  # recurrent: some state a number all the same
            positions = 0
        rotary = getattr(text, "rope_parameters", None) or {}
        for scaling in (rotary, *rotary.values()):  # gemma has one for each kind of layer
            if isinstance(scaling, dict) and scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
                original = scaling.get("original_max_position_embeddings") or text.max_position_embeddings
                positions = max(positions, int(original * (scaling.get("factor") or 1)))
        return cls(getattr(text, "vocab_size", None) or 0, positions)


@dataclass
class Samples:
    """Token ids and labels of equal length, for `transformers.Trainer`, and counts of what was changed."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    targets: int = 0  # trained tokens before anything was cut
    cut: int = 0
    dropped: int = 0  # samples whose prompt alone fills model_max_length
    last_only: int = 0  # conversations in which the template changes earlier turns, so that the last one is trained
    remarks: Remarks = field(default_factory=Remarks)
    notes: list[str] = field(default_factory=list)  # about the file

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def facts(self) -> list[str]:
        """What was read, cut and left out, in words."""
        trained = sum(label != IGNORED_LABEL for row in self.rows for label in row["labels"])
        facts = [f"{counted(len(self.rows), 'sample')} with {trained:,} trained tokens"]
        if self.last_only:
            facts.append(f"{self.last_only:,} train their last response only, as the chat template changes the others")
        return facts

    def lost(self, name: str) -> list[Lost]:
        """What is cut off or left out, of a file that the user calls `name`."""
        if not self.cut:
            return []
        what = f"{name}: {counted(self.cut, 'sample')} cut to model_max_length"
        if self.dropped:
            what += f", {self.dropped:,} of them left out because the prompt alone fills it"
        kept = sum(label != IGNORED_LABEL for row in self.rows for label in row["labels"][1:])
        return [Lost(what, 1 - kept / max(self.targets, 1), remedy="raise --model_max_length")]

    def lines(self) -> list[str]:
        """What was changed or not used of the rows: lines for the user."""
        return [*self.notes, *self.remarks.lines()]


def load_samples(
    rows: Iterable[tuple[str, dict]],
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: Limits = Limits(),  # noqa: B008, it is frozen
    flag: str = "--dataset_field",
    or_usual: bool = False,
) -> Samples:
    """The samples of (place, row) pairs. UserError, beginning with the place, for a row that cannot be used.

    So is one that, cut to max_length, has more tokens or other ids than the model can read. flag: the setting that
    names the fields of this file; or_usual: `fields` are those of another file, which hold where this one has them.
    """
    try:
        return _load(rows, fields, tokenizer, max_length, limits, flag, or_usual)
    except UserError as error:
        words = str(error)
        for theirs, ours in OWN_FLAGS.items():
            words = words.replace(theirs, ours)
        raise UserError(words) from None


def _load(
    rows: Iterable[tuple[str, dict]],
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: Limits,
    flag: str,
    or_usual: bool,
) -> Samples:
    samples, layout, where, count = Samples(), None, "no row", 0
    for count, (where, row) in enumerate(rows, 1):  # noqa: B007, of all of them
        if layout is None:
            layout = layout_of(row, fields, "auto", where, flag, or_usual)
            if isinstance(rows, RowsOf):
                rows.keep(layout)
            if layout.instead:
                samples.notes.append(
                    f"not the fields of --dataset_field {' '.join(fields)}, so that usual names are read: {layout}"
                )
        talk, found = conversation(row, layout, where), Counter[str]()
        segments, last_only = render(talk, tokenizer, found)
        samples.remarks.add(talk.remarks)
        samples.remarks.add(found)
        samples.last_only += last_only
        ids, labels = [], []
        for tokens, trained in segments:
            ids += tokens
            labels += tokens if trained else [IGNORED_LABEL] * len(tokens)
        samples.targets += sum(label != IGNORED_LABEL for label in labels[1:])
        samples.cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if limits.vocab_size:
            check_ids(ids, limits.vocab_size, where, tokenizer.convert_ids_to_tokens)
        if limits.positions and len(ids) > limits.positions:
            raise UserError(
                f"{where}: {len(ids)} tokens, but the model has {limits.positions} positions: give --model_max_length "
                f"{limits.positions}, which cuts longer samples, instead of {max_length}"
            )
        # The first token has nothing before it to be predicted from.
        if any(label != IGNORED_LABEL for label in labels[1:]):
            samples.rows.append({"input_ids": ids, "labels": labels})
        elif NOTHING_TRAINED not in talk.remarks:  # else it is counted there
            samples.dropped += 1
    check_named(samples.remarks.counts, count, where)
    if isinstance(rows, RowsOf):
        samples.notes += rows.notes
    if not samples.rows:
        if samples.remarks.counts.get(NOTHING_TRAINED):
            raise UserError(f"{where}: up to here {'; '.join(samples.remarks.lines())}")
        raise UserError(f"{where}: up to here no row has a response within --model_max_length {max_length}")
    return samples


class RowsOf:
    """(place, row) of a file of rows, or of a folder of the datasets library, which is opened when it is read.

    split: a part of it, such as train[:1000]; held_out: which of its splits is meant; fields, columns: as `open_source`
    takes them. `notes` are lines for the user about what was read.
    """

    def __init__(
        self,
        path: str,
        split: str = "",
        held_out: bool = False,
        fields: tuple[str, ...] = (),
        columns: tuple[str, ...] = (),
    ):
        self.path, self.split, self.held_out, self.fields, self.columns = path, split, held_out, fields, columns
        self.notes: list[str] = []
        self._source: Rows | None = None

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        part = Split.parse(self.split)
        source = open_source(
            self.path, split=part.name, held_out=self.held_out, fields=self.fields, columns=self.columns
        )
        if not isinstance(source, Rows):
            raise UserError(f"{self.path} is {source.kind}: expected rows of prompt and response, or of messages")
        self._source, self.notes = source, source.notes
        for number, raw, _ in part.items(source):
            where = source.places(number)
            if isinstance(raw, UserError):
                raise raw
            yield where, source.parse(raw, where)

    def keep(self, layout: Layout) -> None:
        """Convert the fields of this layout from now on, and text, but no other columns."""
        if self._source is not None:
            self._source.keep(layout.names)


def render(
    talk: Conversation, tokenizer: PreTrainedTokenizerBase, remarks: Counter[str] | None = None
) -> tuple[list[tuple[list[int], bool]], bool]:
    """([(token ids, trained), ...], whether only the last response of several is trained).

    remarks: takes what was written in another way than the row has it.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if talk.document is not None:
        return [(_begun(tokenizer, talk.document) + end, True)], False
    if not getattr(tokenizer, "chat_template", None):
        talk = with_tools_as_text(talk)
        if [turn.role for turn in talk.turns] != ["user", "assistant"]:
            raise UserError(f"{talk.where}: several turns need a tokenizer with a chat template, and this one has none")
        user, answer = talk.turns
        written = _ids(tokenizer, think_block(answer) + answer.text) + end
        return [(_begun(tokenizer, _said(user)), False), (written, answer.trained)], False
    remarks = Counter() if remarks is None else remarks
    if has_tools(talk) and not _writes_tools(talk, tokenizer):
        remarks[TOOLS_AS_TEXT] += 1
        turns = [replace(turn, name="") for turn in with_tools_as_text(talk).turns]
        turns = [replace(turn, role="user") if turn.role == "tool" else turn for turn in turns]
        talk = replace(talk, turns=tuple(turns), tools=())
    if any(turn.thinking for turn in talk.turns) and not _writes_thinking(talk, tokenizer):
        remarks[THINKING_AS_TEXT] += 1
        turns = [replace(turn, text=think_block(turn) + turn.text, thinking="") for turn in talk.turns]
        talk = replace(talk, turns=tuple(turns))
    spans, last_only = _template_spans(talk, tokenizer)
    return [(_ids(tokenizer, text), trained) for text, trained in spans if text], last_only


def _said(turn: Turn) -> str:
    return f"{turn.text}\n{turn.material}" if turn.material else turn.text


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates take it."""
    message: dict[str, Any] = {"role": turn.role, "content": _said(turn)}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    ids = turn.call_ids or ("",) * len(turn.calls)
    if turn.calls:
        message["tool_calls"] = [
            ({"id": name} if name else {}) | {"type": "function", "function": dict(call)}
            for name, call in zip(ids, turn.calls, strict=True)
        ]
    elif turn.role == "tool" and ids:
        message["tool_call_id"] = ids[0]
    return message | ({"name": turn.name} if turn.name else {})


def _written(talk: Conversation, tokenizer: PreTrainedTokenizerBase, count: int, prompt: bool = False) -> str:
    """The template's text of the first `count` turns; prompt: with what begins a response."""
    try:
        return tokenizer.apply_chat_template(
            [_message(turn) for turn in talk.turns[:count]],
            tools=list(talk.tools) or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:
        # A template may raise anything for roles or an order that it does not support.
        raise UserError(f"{talk.where}: the tokenizer's chat template refuses this row: {error}") from error


def _writes_tools(talk: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the tools on offer, the first calls and the first result of a conversation."""
    try:
        if talk.tools and _written(talk, tokenizer, len(talk.turns)) == _written(
            replace(talk, tools=()), tokenizer, len(talk.turns)
        ):
            return False
        for turn in {turn.role: turn for turn in reversed(talk.turns) if turn.calls or turn.role == "tool"}.values():
            written = _written(talk, tokenizer, talk.turns.index(turn) + 1)
            said = turn.text.strip()
            if said not in written and json.dumps(said, ensure_ascii=False) not in written:
                return False
            if not all(call["name"] in written for call in turn.calls):
                return False
        return True
    except UserError:
        return False


def _writes_thinking(talk: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the thinking of the first turn that thinks, while that is the last turn."""
    count, turn = next((i + 1, turn) for i, turn in enumerate(talk.turns) if turn.thinking)
    return turn.thinking in _written(talk, tokenizer, count)


def _template_spans(talk: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, bool]], bool]:
    """([(piece of the template's text, whether it is trained), ...], whether only the last response of several is).

    What is trained begins where the model would continue and ends where the turn does.
    """
    whole = _written(talk, tokenizer, len(talk.turns))
    spans, position, last_only = [], 0, False
    answers = [index for index, turn in enumerate(talk.turns) if turn.role == "assistant" and turn.trained]
    for index in answers:
        before, after = _written(talk, tokenizer, index, True), _written(talk, tokenizer, index + 1)
        if whole.startswith(before) and whole.startswith(after) and position <= len(before) <= len(after):
            spans += [(whole[position : len(before)], False), (whole[len(before) : len(after)], True)]
            position = len(after)
        elif index == answers[-1]:
            raise UserError(
                f"{talk.where}: the chat template writes the prompt {before[-40:]!r} and then, with the response, "
                "something else: what is to be trained cannot be told apart. Give the tokenizer another chat template"
            )
        else:
            last_only = True
    return spans, last_only


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that is continued: with the tokenizer's start of text, but without its end."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch, padded on the right: input_ids, labels and attention_mask, [B, T]."""
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        length = len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [pad] * (width - length))
        batch["labels"].append(row["labels"] + [IGNORED_LABEL] * (width - length))
        batch["attention_mask"].append([1] * length + [0] * (width - length))
    return {name: torch.tensor(values) for name, values in batch.items()}
