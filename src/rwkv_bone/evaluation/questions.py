"""What the model reads for an item: worked examples and the question, written by the template or, with raw, as a text
to complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.tokenizer import END_MARK, decode_marked, encode_marked
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.items import Item
from rwkv_bone.evaluation.tasks import Task, check_prompt, put
from rwkv_bone.inference.wording import Wording

BETWEEN = "\n\n"  # worked examples of raw
PLACEHOLDER = "?"  # a response, where a template needs one


@dataclass(frozen=True)
class Asked:
    """An item as the model meets it. answers: of choice, each choice; of exact, the response."""

    item: Item
    prompt: str
    answers: tuple[str, ...] = ()


class Questions:
    """Puts the items of a task. shots: worked examples. UserError for a --prompt that does not fit the task."""

    def __init__(self, cfg: EvaluateConfig, task: Task, wording: Wording, shots: Sequence[Item]):
        self._cfg, self._task, self._wording = cfg, task, wording
        self._template, self._raw = wording.template, not wording.several
        if cfg.prompt:
            check_prompt(cfg.prompt, task)
        self._form = cfg.prompt.replace("\\n", "\n") or (task.completion if self._raw else task.message)
        # A question that ends with a space, or a line, needs no other before its answer.
        self._joint = "" if self._form[-1:].isspace() else task.joint
        self._shots = [(self._turns(shot), self._worked(shot), shot.where) for shot in shots]

    def ask(self, item: Item) -> Asked:
        """UserError, beginning with the item's place, where the template cannot write it."""
        if self._task.name == "perplexity":
            return Asked(item, item.values["text"])
        if self._task.name == "choice":
            written = [self._written(item, Turn("assistant", text)) for text in item.values["choices"]]
            return Asked(item, written[0][0], tuple(response for _, response in written))
        if item.talk is None:
            return Asked(item, self._written(item, Turn("assistant", PLACEHOLDER))[0])
        prompt, response = self._written(item, item.talk.turns[-1])
        # What is trained ends a document; what a model writes ends before that.
        tokenizer = self._wording.tokenizer
        response = decode_marked(tokenizer, encode_marked(tokenizer, response)).partition(END_MARK)[0]
        return Asked(item, prompt, (response,))

    def _written(self, item: Item, answer: Turn) -> tuple[str, str]:
        """(prompt, response) of an item with this answer, after the worked examples."""
        turns = self._turns(item)
        system = [Turn("system", self._cfg.system)] if self._cfg.system and turns[0].role != "system" else []
        if not self._raw:
            earlier = [turn for shot, worked, _ in self._shots for turn in (*shot, worked)]
            return self._of_template([*system, *earlier, *turns], answer, item)
        before = ""
        for shot, worked, where in self._shots:
            question, solved = self._of_template(shot, worked, item, where)
            before += question + self._joint + solved + BETWEEN
        prompt, response = self._of_template([*system, *turns], answer, item)
        return before + prompt, self._joint + response

    def _of_template(self, turns: list[Turn], answer: Turn, item: Item, where: str = "") -> tuple[str, str]:
        """(prompt, response) as the template of training writes them."""
        talk = Conversation(where or item.where, (*turns, answer), tools=item.talk.tools if item.talk else ())
        return self._template.prompt(talk), self._template.response(talk)

    def _turns(self, item: Item) -> list[Turn]:
        """The turns before the answer."""
        if item.talk is None:
            return [Turn("user", put(self._form, item.values))]
        turns = list(item.talk.turns[:-1])
        if self._cfg.shots and [turn.role for turn in turns] != ["user"]:
            raise UserError(
                f"{item.where}: several turns, or a system turn, cannot stand among worked examples: leave out --shots"
            )
        return turns

    def _worked(self, item: Item) -> Turn:
        """The answer of a worked example."""
        if item.talk is not None:
            return item.talk.turns[-1]
        if self._task.name == "choice":
            return Turn("assistant", item.expected)
        worked = put(self._task.worked, item.values)
        if worked == self._task.worked:
            raise UserError(f"{item.where}: it has no {worked.strip('{}')!r}, which a worked example shows")
        return Turn("assistant", worked)
