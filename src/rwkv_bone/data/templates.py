"""How the turns of a conversation become the texts that are tokenised.

A template writes a conversation as segments, `prompt` and `response` in turn, that are tokenised apart and their ids
joined. So the mask is exact, and the model is trained on the very ids it meets at generation, where the prompt is
tokenised alone. A document is one segment, as it is.

raw       "{prompt}" and "{response}", as they are; one prompt and one response only, since nothing marks turns.
world     "User: {prompt}\\n\\nAssistant:" and " {response}", what RWKV World models are trained on. The space belongs
          to the response, since World tokens begin with theirs. A blank line ends a turn: inside a turn blank lines
          become single line breaks.
g1        RWKV-7 G1's quick form, an empty think block: "User: {prompt}\\n\\nAssistant: <think>\\n</think" and
          ">\\n{response}". The prompt stops before ">", as upstream's published prompts do. Thinking in the data is
          left out. Turns end as in world. (G1's other form without thinking is world's.)
g1-think  "User: {prompt}\\n\\nAssistant: <think" and ">\\n{thinking}\\n</think>\\n{response}". The thinking is a
          response's leading <think>...</think>, or its field `reasoning_content`; its blank lines stay, as in
          upstream's data. A response without thinking is written ">\\n</think>\\n{response}".
alpaca    Stanford Alpaca's instruction (and input) under headings; texts as they are. A system turn takes the place of
          the preamble.
A file    of the user's own: see `FormatTemplate` and `JinjaTemplate`.

System turns are "System: {text}\\n\\n". What a tool returned is a user's turn, as in upstream's examples, inside
<tool_response>. Only g1-think and Jinja files write `reasoning_content`. All but raw write several turns: after a
response that is not the last, the blank line that ends its turn belongs to it and is trained; after the last one the
end-of-document id is (`masks.encode` appends it). So a model learns both ways to stop.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_bone.data.conversation import Conversation, Turn
from rwkv_bone.data.tokenizer import END_MARK, TOKENIZER_CONFIG, read_tokenizer_config, special_tokens
from rwkv_bone.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.parser import Parser

PROMPT, RESPONSE, DOCUMENT = "prompt", "response", "document"
END_OF_TURN = "\n\n"
GO_ON = "To go on, give another --template: world, g1, g1-think, alpaca, or a copy of this file that you change"
VERSION = 2  # part of `identity`: raise it when the same row is written as another text than before


class Segment(NamedTuple):
    text: str
    role: str  # prompt, response or document


class Template:
    """`render` writes a whole conversation; `response` is its last response, `prompt` all text before that."""

    name: str

    def render(self, conversation: Conversation) -> list[Segment]:
        """Prompt, response, prompt, ..., response; or a single document. UserError if it cannot be written so."""
        if conversation.document is not None:
            return [Segment(conversation.document, DOCUMENT)]
        return _joined(self._segments(with_tools_as_text(conversation)))

    def prompt(self, conversation: Conversation) -> str:
        """The text before the last response: what a model is given to write it."""
        return "".join(segment.text for segment in self.render(conversation)[:-1])

    def response(self, conversation: Conversation) -> str:
        """The last response, as it is trained."""
        return self.render(conversation)[-1].text

    def identity(self) -> str:
        """A text that differs between two templates whenever they may write different texts."""
        return f"{self.name} {VERSION}"

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        raise NotImplementedError


class RawTemplate(Template):
    name = "raw"

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = conversation.turns
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise UserError(
                f"{conversation.where}: --template raw writes one prompt and one response, with nothing to mark turns; "
                f"found {', '.join(turn.role for turn in turns)}. Choose --template world, g1, alpaca or a file"
            )
        return Segment(_with_material(turns[0]), PROMPT), Segment(turns[1].text, RESPONSE)


class WorldTemplate(Template):
    """world, g1 and g1-think: they differ in how a response begins."""

    def __init__(self, name: str):
        self.name = name

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        last = len(conversation.turns) - 1
        for i, turn in enumerate(conversation.turns):
            if turn.role == "assistant":
                opening, response = self._answer(turn, conversation.where)
                yield Segment(f"Assistant:{opening}", PROMPT)
                yield Segment(response if i == last else response + END_OF_TURN, RESPONSE)
            else:
                label = "System" if turn.role == "system" else "User"
                yield Segment(f"{label}: {_one_turn(_with_material(turn))}".rstrip() + END_OF_TURN, PROMPT)

    def _answer(self, turn: Turn, where: str) -> tuple[str, str]:
        if self.name == "world":
            return "", f" {_one_turn(turn.text)}"
        thinking, answer = _split_thinking(turn, where)
        answer = _one_turn(answer)
        if self.name == "g1":
            return " <think>\n</think", f">\n{answer}"
        return " <think", f">\n{thinking}\n</think>\n{answer}" if thinking else f">\n</think>\n{answer}"


class AlpacaTemplate(Template):
    name = "alpaca"
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    preamble_with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = conversation.turns
        if turns[0].role != "system":
            yield Segment(self.preamble_with_input if any(t.material for t in turns) else self.preamble, PROMPT)
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                yield Segment("### Response:", PROMPT)
                yield Segment(turn.text if i == len(turns) - 1 else turn.text + END_OF_TURN, RESPONSE)
            elif turn.role == "system":
                yield Segment(turn.text + END_OF_TURN, PROMPT)
            else:
                material = f"### Input:\n{turn.material}\n\n" if turn.material else ""
                yield Segment(f"### Instruction:\n{_tool_marked(turn)}\n\n{material}", PROMPT)


class FormatTemplate(Template):
    """A text file with {prompt} and, after it, {response}: each exactly once, all else as it is (one line break at the
    end of the file does not count). What follows {response} ends every response and is trained. Several turns are
    written one after another. There is no place for system and tool turns.
    """

    def __init__(self, name: str, text: str):
        self.name, self._digest = name, _digest(text)
        before, found_prompt, rest = text.removesuffix("\n").partition("{prompt}")
        between, found_response, after = rest.partition("{response}")
        if not (found_prompt and found_response) or "{prompt}" in rest or "{response}" in before + after:
            raise UserError(
                f"--template {name}: expected {{prompt}} and, after it, {{response}}, each exactly once; "
                "or a Jinja template, which loops over `messages`"
            )
        self._before, self._between, self._after = before, between, after

    def identity(self) -> str:
        return f"format {VERSION} {self._digest}"

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        roles = [turn.role for turn in conversation.turns]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError(
                f"{conversation.where}: the format of --template {self.name} has {{prompt}} and {{response}} in turn; "
                f"found {', '.join(roles)}. Write it as a Jinja template, which sees every role"
            )
        for turn in conversation.turns:
            if turn.role == "user":
                yield Segment(self._before + _with_material(turn) + self._between, PROMPT)
            else:
                yield Segment(turn.text + self._after, RESPONSE)


class JinjaTemplate(Template):
    """A Jinja file in Hugging Face's convention for chat templates, in the environment of transformers.

    It loops over `messages`, each with `role` (system, user, assistant, tool), `content` and, if it has any,
    `reasoning_content`; with `add_generation_prompt` it ends where a response begins. `strftime_now` tells the day of
    tokenising.

    `specials` are the texts of `bos_token`, `eos_token` and the like. Where there are none they are empty: the
    end-of-document id is appended after tokenising.

    A response is what is added by rendering one message more: the text up to it is rendered with
    `add_generation_prompt`, the text with it without, and each text must begin with the one before. A template that
    rewrites what it wrote earlier (some leave out the thinking of earlier turns) is refused.
    """

    def __init__(self, name: str, text: str, specials: Mapping[str, str]):
        from jinja2 import TemplateError

        self.name, self._specials = name, dict.fromkeys(("bos_token", "eos_token"), "") | dict(specials)
        self._digest = _digest(json.dumps([text, self._specials]))
        try:
            self._template = _jinja().from_string(text)
        except TemplateError as error:
            number = getattr(error, "lineno", None)  # of its subclass for errors of syntax
            line = f"line {number}: " if number else ""
            raise UserError(f"--template {name}: not a Jinja template ({line}{error})") from error

    def identity(self) -> str:
        return f"jinja {VERSION} {self._digest}"

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        messages = [_message(turn) for turn in conversation.turns]
        written = ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._write(messages[:i], True, written, conversation.where)
                yield Segment(prompt[len(written) :], PROMPT)
                written = self._write(messages[: i + 1], False, prompt, conversation.where)
                if written == prompt:
                    raise UserError(
                        f"{conversation.where}: --template {self.name} writes nothing for a response. {GO_ON}"
                    )
                yield Segment(written[len(prompt) :], RESPONSE)

    def _write(self, messages: list[dict], add_generation_prompt: bool, before: str, where: str) -> str:
        """The template's text, which must begin with `before`."""
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._specials,
            )
        except Exception as error:  # whatever the template's own expressions raise
            raise UserError(f"{where}: --template {self.name}: {error}. {GO_ON}") from error
        if not text.startswith(before):
            common = next(i for i, (a, b) in enumerate(zip(text + "\0", before, strict=False)) if a != b)
            with_prompt = "with" if add_generation_prompt else "without"
            raise UserError(
                f"{where}: --template {self.name}: the text of {len(messages)} messages {with_prompt} "
                f"add_generation_prompt does not begin with the text up to there: expected {before[common:][:40]!r} "
                f"at character {common}, found {text[common:][:40]!r}. So it rewrites earlier turns, and what of its "
                f"text is the response cannot be told. {GO_ON}"
            )
        return text


def load_template(name: str, tokenizer_name: str) -> Template:
    """The template of that name or file. auto: world for the World tokenizer, whose models know it; else raw."""
    if name == "auto":
        name = "world" if tokenizer_name == "world" else "raw"
    built_in: dict[str, Template] = {
        template.name: template
        for template in (RawTemplate(), AlpacaTemplate(), *map(WorldTemplate, ("world", "g1", "g1-think")))
    }
    if name in built_in:
        return built_in[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--template {name}: expected auto, {', '.join(built_in)}, or the path of a template file")
    if path.name == TOKENIZER_CONFIG:
        text = _of_tokenizer_config(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template {name}: cannot be read ({error})") from error
        if not re.search(r"\{\{|\{%", text):
            return FormatTemplate(name, text)
    specials = special_tokens(path.parent)
    if tokenizer_name in ("bytes", "world"):
        # Their only token of that kind, whatever its name is where the template comes from.
        specials = {name: END_MARK if text else "" for name, text in specials.items()}
    return JinjaTemplate(name, text, specials)


def _of_tokenizer_config(path: Path) -> str:
    """The chat template inside a tokenizer_config.json; of several, the one named default."""
    found = read_tokenizer_config(path.parent).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default") or (named.popitem()[1] if len(named) == 1 else None)
        if not found and named:
            raise UserError(
                f"--template {path}: it has the templates {', '.join(map(str, named))} and none named default: "
                "write the one you mean to a file and name that"
            )
    if not isinstance(found, str):
        raise UserError(f"--template {path}: no chat_template in it; choose --template world, g1, alpaca or a file")
    return found


def _jinja() -> Environment:
    """The environment that transformers gives chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained. Its text is that of its body: we know the responses anyway."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Callable[[], str]) -> str:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def with_tools_as_text(conversation: Conversation) -> Conversation:
    """The same with calls and tools in its turns' texts, in the form of Hermes models, which runtimes read back.

    Each call of a response is <tool_call>, its JSON on a line of its own, </tool_call>; the tools on offer stand in the
    system turn inside <tools>.
    """
    turns = [_called(turn) for turn in conversation.turns]
    if conversation.tools:
        offered = "\n".join(["<tools>", *map(_to_json, conversation.tools), "</tools>"])
        if turns and turns[0].role == "system":
            turns[0] = replace(turns[0], text=f"{turns[0].text.strip()}\n{offered}")
        else:
            turns = [Turn("system", offered), *turns]
    return replace(conversation, turns=tuple(turns), tools=())


def _called(turn: Turn) -> Turn:
    if not turn.calls:
        return turn
    calls = [f"<tool_call>\n{_to_json(call)}\n</tool_call>" for call in turn.calls]
    return replace(turn, text="\n".join([*filter(None, [turn.text.strip()]), *calls]), calls=())


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one role become one segment, so that a prompt is tokenised as a whole."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].role == segment.role:
            joined[-1] = Segment(joined[-1].text + segment.text, segment.role)
        else:
            joined.append(segment)
    return joined


def _tool_marked(turn: Turn) -> str:
    return f"<tool_response>\n{turn.text.strip()}\n</tool_response>" if turn.role == "tool" else turn.text


def _with_material(turn: Turn) -> str:
    text = _tool_marked(turn)
    return f"{text}\n{turn.material}" if turn.material else text


def _one_turn(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.replace("\r\n", "\n").strip())


def _split_thinking(turn: Turn, where: str) -> tuple[str, str]:
    """(thinking, answer) of a response."""
    inside, answer = "", turn.text
    if answer.lstrip().startswith("<think>"):
        inside, end, answer = answer.lstrip().removeprefix("<think>").partition("</think>")
        if not end:
            raise UserError(f"{where}: a response begins with <think> and has no </think>")
        if not answer.strip():
            raise UserError(f"{where}: a response has nothing after </think>: fill it or remove the row")
    return (turn.thinking or inside).replace("\r\n", "\n").strip(), answer


def _message(turn: Turn) -> dict[str, str]:
    message = {"role": turn.role, "content": f"{turn.text}\n{turn.material}" if turn.material else turn.text}
    # Under both names that templates for transformers read.
    return message | dict.fromkeys(("reasoning_content", "thinking"), turn.thinking) if turn.thinking else message


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _raise(message: str) -> None:
    raise UserError(message)
