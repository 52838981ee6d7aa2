"""Rows of prompts and responses, or of messages, as token ids of a Hugging Face tokenizer.

A tokenizer with a chat template writes the conversation; without one, a prompt and its response are joined as they
are. Only responses are trained, each with the end-of-turn or end-of-text tokens after it. A prompt and the response
after it are tokenised apart, as they are when the trained model answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_bone.data.conversation import Conversation, conversation, layout_of
from rwkv_bone.data.ids import check_ids
from rwkv_bone.data.sources import Rows, Split, open_source
from rwkv_bone.data.tool_text import HERMES, with_tools_as_text
from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORED_LABEL = -100  # the label of tokens that are not trained, in transformers and PyTorch
# What messages about rows call the flags of train.py, and what those of train_hf.py are called; some it does not have.
OWN_FLAGS = {
    "--sft_field": "--dataset_field",
    "--sft_split": "--dataset_split",
    "--data_file and --eval_data take": "--data_path and --eval_path take",
    "; a dataset of the hub with --data_type hf": "",
    ", or give --data_type": "",
    ", or --data_type jsonl for 'text'": "",
}


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
    cut: int = 0
    dropped: int = 0  # samples whose prompt alone fills model_max_length
    last_only: int = 0  # conversations in which the template changes earlier turns, so that the last one is trained

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    def facts(self) -> list[str]:
        """What was read, cut and left out, in words."""
        trained = sum(label != IGNORED_LABEL for row in self.rows for label in row["labels"])
        facts = [f"{len(self.rows):,} samples with {trained:,} trained tokens"]
        if self.cut:
            facts.append(f"{self.cut:,} cut to model_max_length")
        if self.dropped:
            facts.append(f"{self.dropped:,} left out because the prompt alone fills model_max_length")
        if self.last_only:
            facts.append(f"{self.last_only:,} train their last response only, as the chat template changes the others")
        return facts


def load_samples(
    rows: Iterable[tuple[str, dict]],
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: Limits = Limits(),  # noqa: B008, it is frozen
) -> Samples:
    """The samples of (place, row) pairs. UserError, beginning with the place, for a row that cannot be used.

    So is one that, cut to max_length, has more tokens or other ids than the model can read.
    """
    try:
        return _load(rows, fields, tokenizer, max_length, limits)
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
) -> Samples:
    samples, layout, where = Samples(), None, "no row"
    for where, row in rows:
        layout = layout or layout_of(row, fields, "auto", where)
        segments, last_only = render(with_tools_as_text(conversation(row, layout, where), HERMES), tokenizer)
        samples.last_only += last_only
        ids, labels = [], []
        for tokens, trained in segments:
            ids += tokens
            labels += tokens if trained else [IGNORED_LABEL] * len(tokens)
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
        else:
            samples.dropped += 1
    if not samples.rows:
        raise UserError(f"{where}: up to here no row has a response within --model_max_length {max_length}")
    return samples


def rows_of(path: str, split: str = "", held_out: bool = False) -> Iterator[tuple[str, dict]]:
    """(place, row) of a file of rows, or of a folder of the datasets library. split: such as train[:1000]."""
    part = Split.parse(split)
    source = open_source(path, split=part.name, held_out=held_out)
    if not isinstance(source, Rows):
        raise UserError(f"{path} is {source.kind}: expected rows of prompt and response, or of messages")
    for number, raw, _ in part.items(source):
        where = source.places(number)
        if isinstance(raw, UserError):
            raise raw
        yield where, source.parse(raw, where)


def render(talk: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[list[int], bool]], bool]:
    """([(token ids, trained), ...], whether only the last response of several is trained)."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if talk.document is not None:
        return [(_begun(tokenizer, talk.document) + end, True)], False
    if not getattr(tokenizer, "chat_template", None):
        if [turn.role for turn in talk.turns] != ["user", "assistant"]:
            raise UserError(f"{talk.where}: several turns need a tokenizer with a chat template, and this one has none")
        user, answer = talk.turns
        prompt = f"{user.text}\n{user.material}" if user.material else user.text
        return [(_begun(tokenizer, prompt), False), (_ids(tokenizer, answer.text) + end, True)], False
    spans, last_only = _template_spans(talk, tokenizer)
    return [(_ids(tokenizer, text), trained) for text, trained in spans if text], last_only


def _template_spans(talk: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, bool]], bool]:
    """([(piece of the template's text, whether it is trained), ...], whether only the last response of several is).

    What is trained begins where the model would continue and ends where the turn does.
    """
    messages = []
    for turn in talk.turns:
        text = f"{turn.text}\n{turn.material}" if turn.material else turn.text
        messages.append({"role": turn.role, "content": text})
        if turn.thinking:
            messages[-1]["reasoning_content"] = turn.thinking

    def written(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            # A template may raise anything for roles or an order that it does not support.
            raise UserError(f"{talk.where}: the tokenizer's chat template refuses this row: {error}") from error

    whole = written(len(messages), False)
    spans, position, last_only = [], 0, False
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index in answers:
        before, after = written(index, True), written(index + 1, False)
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
