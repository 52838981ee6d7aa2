"""Chat templates in Jinja, written as transformers writes them.

A template loops over `messages`, each with `role` (system, user, assistant, tool) and `content` and, where the turn has
them, `reasoning_content` (also as `thinking`), `tool_calls`, `tool_call_id` and `name`. It gets `tools` as the data has
them, `documents` (none) and the special tokens. With `add_generation_prompt` it ends where a response begins.

What is trained is the text inside {% generation %} and nothing else, if the template has such blocks: transformers'
assistant mask. In any other template a response is what is added by rendering one message more: the text up to it is
rendered with `add_generation_prompt`, the text with it without, and each text must begin with the one before. Then a
template that rewrites what it wrote earlier (some leave out the thinking of earlier turns) is refused.

A template that reads neither `reasoning_content` nor `thinking` gets the thinking in `content`, as a think block.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.templates.segments import PROMPT, RESPONSE, Segment, Template, response_role, think_block
from rwkv_bone.errors import UserError

GO_ON = "To go on, give another --template: world, g1, g1-think, alpaca, or a copy of this file that you change"
# Around the text of a {% generation %} block: no text in data looks like this.
BEGIN, END = "\ufdd2<generation>\ufdd3", "\ufdd2</generation>\ufdd3"
UNWRITTEN = "responses whose thinking the template leaves out"
# Where the mark that ends a turn is outside, nothing teaches the model to stop.
UNMARKED = (
    "rows in which the template writes more after its last {% generation %} block: what ends the response is not "
    "trained, so the model does not learn to stop"
)
DEFAULT, WITH_TOOLS = "default", "tool_use"


class JinjaTemplate(Template):
    """One template, or several by name: then `tool_use` writes the rows that have tools, `default` all others.

    `specials` are the texts of `bos_token`, `eos_token` and the like. Where there are none they are empty: the
    end-of-document id is appended after tokenising.
    """

    def __init__(self, name: str, texts: Mapping[str, str], specials: Mapping[str, str]):
        self.name, self._specials = name, dict.fromkeys(("bos_token", "eos_token"), "") | dict(specials)
        self._digest = hashlib.sha256(json.dumps([texts, self._specials], sort_keys=True).encode()).hexdigest()[:16]
        self._templates = {key: Chat(text, name) for key, text in texts.items()}

    def identity(self) -> str:
        return f"jinja 3 {self._digest}"

    def remarks(self, conversation: Conversation) -> Mapping[str, int]:
        found = {}
        thoughts = [turn.thinking.replace("\r\n", "\n").strip() for turn in conversation.turns if turn.thinking]
        if thoughts:
            text = self._write(conversation).replace("\r\n", "\n")
            found[UNWRITTEN] = sum(thought not in text for thought in thoughts)
        if conversation.turns and self._of(conversation).has_marks:
            *_, last = self._marked(conversation)
            found[UNMARKED] = int(last.role == PROMPT)
        return {remark: count for remark, count in found.items() if count}

    def _of(self, conversation: Conversation) -> Chat:
        """The template of a row."""
        named = self._templates.get(WITH_TOOLS) if conversation.tools else None
        return named or self._templates[DEFAULT]

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        return self._marked(conversation) if self._of(conversation).has_marks else self._continued(conversation)

    def _marked(self, conversation: Conversation) -> Iterator[Segment]:
        """By the template's own {% generation %} blocks."""
        before, *parts = self._write(conversation).split(BEGIN)
        answers = [turn for turn in conversation.turns if turn.role == "assistant"]
        roles = [RESPONSE] * len(parts)
        if not all(turn.trained for turn in answers):
            if len(parts) != len(answers):
                raise UserError(
                    f"{conversation.where}: --template {self.name} has {len(parts)} {{% generation %}} blocks for "
                    f"{len(answers)} responses, so which of them are not to be trained cannot be told. {GO_ON}"
                )
            roles = [response_role(turn) for turn in answers]
        if not any(part.partition(END)[0] for part in parts):
            raise UserError(
                f"{conversation.where}: --template {self.name}: nothing is in its {{% generation %}} blocks. {GO_ON}"
            )
        segments = [Segment(before, PROMPT)]
        for part, role in zip(parts, roles, strict=True):
            inside, _, after = part.partition(END)
            segments += [Segment(inside, role), Segment(after, PROMPT)]
        if not segments[-1].text.strip():
            # So the end-of-document id follows the response, and is trained with it.
            segments.pop()
        # An empty piece would cut the text around it in two, and so its tokens.
        yield from (segment for segment in segments if segment.text)

    def _continued(self, conversation: Conversation) -> Iterator[Segment]:
        """A response is what is added to the text before it."""
        written = ""
        for i, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                prompt = self._continue(conversation, i, True, written)
                yield Segment(prompt[len(written) :], PROMPT)
                written = self._continue(conversation, i + 1, False, prompt)
                if written == prompt:
                    raise UserError(
                        f"{conversation.where}: --template {self.name} writes nothing for a response. {GO_ON}"
                    )
                yield Segment(written[len(prompt) :], response_role(turn))

    def _continue(self, conversation: Conversation, count: int, add_generation_prompt: bool, before: str) -> str:
        """The text of the first `count` turns, which must begin with `before`."""
        text = self._write(conversation, count, add_generation_prompt)
        if not text.startswith(before):
            common = next(i for i, (a, b) in enumerate(zip(text + "\0", before, strict=False)) if a != b)
            with_prompt = "with" if add_generation_prompt else "without"
            raise UserError(
                f"{conversation.where}: --template {self.name}: the text of {count} messages {with_prompt} "
                f"add_generation_prompt does not begin with the text up to there: expected {before[common:][:40]!r} "
                f"at character {common}, found {text[common:][:40]!r}. So it rewrites earlier turns, and what of its "
                f"text is the response cannot be told. {GO_ON}"
            )
        return text

    def _write(self, conversation: Conversation, count: int | None = None, add_generation_prompt: bool = False) -> str:
        """The template's text of the first `count` turns; of all, without it."""
        template = self._of(conversation)
        try:
            return template.render(
                messages=[_message(turn, template.reads_thinking) for turn in conversation.turns[:count]],
                add_generation_prompt=add_generation_prompt,
                tools=list(conversation.tools) or None,
                documents=None,
                **self._specials,
            )
        except Exception as error:  # whatever the template's own expressions raise
            raise UserError(f"{conversation.where}: --template {self.name}: {error}. {GO_ON}") from error


def _message(turn: Turn, apart: bool) -> dict[str, Any]:
    """A turn as transformers has it. apart: its thinking is in a field of its own, not in its content."""
    content = f"{turn.text}\n{turn.material}" if turn.material else turn.text
    message: dict[str, Any] = {"role": turn.role, "content": content if apart else think_block(turn) + content}
    if turn.thinking and apart:
        # Under both names that templates for transformers read.
        message |= dict.fromkeys(("reasoning_content", "thinking"), turn.thinking)
    ids = turn.call_ids or ("",) * max(len(turn.calls), 1)
    if turn.calls:
        calls = [{"type": "function", "function": dict(call)} for call in turn.calls]
        message["tool_calls"] = [
            {"id": number} | call if number else call for number, call in zip(ids, calls, strict=True)
        ]
    if turn.role == "tool":
        found = {"tool_call_id": ids[0], "name": turn.name}
        message |= {key: value for key, value in found.items() if value}
    return message


class Chat:
    """A compiled template, with what transformers gives it, and whether it has {% generation %} blocks."""

    def __init__(self, text: str, name: str):
        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self.render = environment.from_string(text).render
        except TemplateError as error:
            number = getattr(error, "lineno", None)  # of its subclass for errors of syntax
            line = f"line {number}: " if number else ""
            raise UserError(f"--template {name}: not a Jinja template ({line}{error})") from error
        self.has_marks = environment.has_marks
        self.reads_thinking = re.search(r"\b(?:reasoning_content|thinking)\b", text) is not None


class Environment(ImmutableSandboxedEnvironment):
    has_marks = False


class Generation(Extension):
    """{% generation %}: its text is that of its body, with marks around it."""

    tags = {"generation"}
    environment: Environment

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_marks = True
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter, with the names and the order that transformers gives its arguments."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise UserError(message)
