"""The pieces of text that a conversation becomes, and what every template can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from rwkv_bone.data.conversations.conversation import Conversation, Turn

PROMPT, RESPONSE, MASKED, DOCUMENT = "prompt", "response", "masked", "document"


class Segment(NamedTuple):
    text: str
    role: str  # prompt, response or document; masked: a response that its row does not let train


class Template:
    """`render` writes a whole conversation; `response` is its last response, `prompt` all text before that."""

    name: str

    def render(self, conversation: Conversation) -> list[Segment]:
        """Prompts and responses in turn; or a single document. UserError if it cannot be written so."""
        if conversation.document is not None:
            return [Segment(conversation.document, DOCUMENT)]
        return _joined(self._segments(conversation))

    def prompt(self, conversation: Conversation) -> str:
        """The text before the last response that is trained: what a model is given to write it."""
        segments = self.render(_to_last_trained(conversation))
        return "".join(segment.text for segment in segments[: _last_response(segments)])

    def response(self, conversation: Conversation) -> str:
        """The last response that is trained, as it is trained."""
        segments = self.render(_to_last_trained(conversation))
        return segments[_last_response(segments)].text

    def remarks(self, conversation: Conversation) -> Mapping[str, int]:
        """What this template leaves out or changes of the turns: sentences with counts, to be added up over rows."""
        return {}

    def identity(self) -> str:
        """A text that differs between two templates whenever they may write different texts."""
        raise NotImplementedError

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        raise NotImplementedError


def response_role(turn: Turn) -> str:
    return RESPONSE if turn.trained else MASKED


def think_block(turn: Turn) -> str:
    """What stands before the answer of a turn that thinks; "" for others."""
    thinking = turn.thinking.replace("\r\n", "\n").strip()
    return f"<think>\n{thinking}\n</think>\n" if thinking else ""


def _to_last_trained(conversation: Conversation) -> Conversation:
    """Without the turns after the last response that is trained; all of them, if none is."""
    turns = conversation.turns
    trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained]
    return replace(conversation, turns=turns[: trained[-1] + 1]) if trained else conversation


def _last_response(segments: list[Segment]) -> int:
    return max((i for i, segment in enumerate(segments) if segment.role in (RESPONSE, MASKED)), default=-1)


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one role become one segment, so that a prompt is tokenised as a whole."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].role == segment.role:
            joined[-1] = Segment(joined[-1].text + segment.text, segment.role)
        else:
            joined.append(segment)
    return joined
