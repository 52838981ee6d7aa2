"""What one row becomes: its documents, as ids and masks, and what is to be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rwkv_bone.data.conversations.conversation import Conversation, Layout, conversation
from rwkv_bone.data.conversations.preference import Answer, answers_of
from rwkv_bone.data.ids import check_ids
from rwkv_bone.data.masks import encode, encode_answer
from rwkv_bone.data.spelled import spelled_tokens
from rwkv_bone.data.templates.segments import Template
from rwkv_bone.data.templates.tools import has_tools
from rwkv_bone.data.tokenizer import Tokenizer
from rwkv_bone.errors import UserError


class Document(NamedTuple):
    ids: np.ndarray
    trained: np.ndarray  # bool, as long: which ids are targets
    prompt: int  # ids before the first target; of preference data, before the answer
    good: bool = False  # of preference data: chosen, or labelled as good


class Row(NamedTuple):
    documents: tuple[Document, ...]  # none: both answers of a pair are the same ids
    remarks: tuple[Mapping[str, int], ...]
    tools: bool  # whether the row has tools


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and int32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class RowEncoder:
    """`encode` makes a `Row` of a row and its place. UserError for a row that cannot be used."""

    def __init__(
        self, layout: Layout, template: Template, tokenizer: Tokenizer, vocab_size: int, loss_mask: str, mask_id: str
    ):
        self.layout, self.template, self.tokenizer = layout, template, tokenizer
        self.vocab_size, self.loss_mask, self.mask_id = vocab_size, loss_mask, mask_id
        self.dtype, self._may_exceed = token_dtype(vocab_size), tokenizer.vocab_size > vocab_size
        self.encode: Callable[[Mapping, str], Row] = self._compared if layout.compares else self._trained

    def _trained(self, row: Mapping, where: str) -> Row:
        talk = conversation(row, self.layout, where)
        ids, trained = encode(self.template.render(talk), self.tokenizer, self.loss_mask, self.mask_id)
        remarks = (talk.remarks, self.template.remarks(talk), spelled_tokens(talk, self.tokenizer))
        return Row((Document(self._checked(ids, where), trained, int(trained.argmax())),), remarks, has_tools(talk))

    def _compared(self, row: Mapping, where: str) -> Row:
        """The prompt is the same for all answers of a row: the ids that all have before their answers."""
        answers, found = answers_of(row, self.layout, where), []
        for talk, turns, good in answers:
            responses = sum(turn.role == "assistant" for turn in talk.turns[:turns])
            ids, trained, prompt = encode_answer(self.template.render(talk), self.tokenizer, self.loss_mask, responses)
            if not trained.any():
                raise UserError(f"{where}: an answer of which nothing is trained: there is nothing to compare")
            found.append(Document(self._checked(ids, where), trained, prompt, good))
        prompt = min(_common([one.ids for one in found]), *(one.prompt for one in found))
        if not prompt:
            raise UserError(
                f"{where}: nothing before the answers: fill the prompt, or give a --template that marks turns"
            )
        alike = len(found) > 1 and np.array_equal(found[0].ids, found[1].ids)
        documents = () if alike else tuple(one._replace(prompt=prompt) for one in found)
        talk = answers[0].conversation
        return Row(documents, (talk.remarks, self._remarks(answers)), has_tools(talk))

    def _remarks(self, answers: Sequence[Answer]) -> Mapping[str, int]:
        """Of the texts of all answers, those of their prompt once."""
        first, *others = [self._of_texts(answer.conversation) for answer in answers]
        for other in others:
            if not (first and other):
                first += other
                continue
            talk = answers[0].conversation
            once = Counter({remark: 1 for remark in other if remark.startswith("rows ")})
            with suppress(UserError):  # a template of the user's own may not write a prompt alone
                once |= self._of_texts(replace(talk, turns=talk.turns[: answers[0].prompt]))
            first += other - once
        return first

    def _of_texts(self, talk: Conversation) -> Counter[str]:
        return Counter(self.template.remarks(talk)) + Counter(spelled_tokens(talk, self.tokenizer))

    def _checked(self, ids: np.ndarray, where: str) -> np.ndarray:
        if self._may_exceed:
            check_ids(ids, self.vocab_size, where, lambda token: self.tokenizer.decode([token]))
        return ids.astype(self.dtype)


def _common(all_ids: Sequence[np.ndarray]) -> int:
    """How many ids at the beginning are the same in all of them."""
    first, *others = all_ids
    count = len(first)
    for ids in others:
        count = min(count, len(ids))
        different = np.flatnonzero(first[:count] != ids[:count])
        count = int(different[0]) if len(different) else count
    return count
