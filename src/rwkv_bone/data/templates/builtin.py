"""How the turns of a conversation become the texts that are tokenised.

A template writes a conversation as segments, `prompt` and `response` in turn, that are tokenised apart and their ids
joined. So the mask is exact, and the model is trained on the very ids it meets at generation, where the prompt is
tokenised alone. A document is one segment, as it is.

raw       "{prompt}" and "{response}", as they are; one prompt and one response only, since nothing marks turns.
world     "User: {prompt}\\n\\nAssistant:" and " {response}", what RWKV World models are trained on. The space belongs
          to the response, since World tokens begin with theirs.
g1        RWKV-7 G1's quick form, an empty think block: "User: {prompt}\\n\\nAssistant: <think>\\n</think" and
          ">\\n{response}". The prompt stops before ">", as upstream's published prompts do. (G1's other form without
          thinking is world's.)
g1-think  "User: {prompt}\\n\\nAssistant: <think" and ">\\n{thinking}\\n</think>\\n{response}": one think block,
          also without thinking, which is written ">\\n</think>\\n{response}".
alpaca    Stanford Alpaca's instruction (and input) under headings; texts as they are. A system turn takes the place of
          the preamble.
A file    of the user's own: see `FormatTemplate` and `jinja_template`.

System turns are "System: {text}\\n\\n". Tools, calls and results are written as `tool_text` says; a result is a user's
turn. A response that thinks begins with "<think>\\n{thinking}\\n</think>\\n", except in g1, which leaves its thinking
out. All but raw write several turns: after a response that is not the
last, the blank line that ends its turn belongs to it and is trained; after the last one the end-of-document id is
(`masks.encode` appends it). So a model learns both ways to stop.

world, g1 and g1-think write no blank line inside a turn: white space around a turn goes, and blank lines in it become
single line breaks. Upstream's data separate turns by blank lines, and the published page cleans prompts so. Responses
are cleaned too, since ChatRWKV's API_DEMO_CHAT.py stops a G1 model at the first blank line, as servers do whose usual
stop tokens are 0, 261 ("\\n\\n") and 24281 ("User"): a longer answer would be cut there. Only thinking keeps its blank
lines, as in upstream's data: what ends it is </think>.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.templates.segments import PROMPT, Segment, Template, response_role, think_block
from rwkv_bone.data.templates.tools import G1, HERMES, ToolFormat, with_tools_as_text
from rwkv_bone.data.tokenizer import END_MARK, special_tokens
from rwkv_bone.errors import UserError

END_OF_TURN = "\n\n"
VERSION = 3  # part of `identity`: raise it when the same row is written as another text than before
BLANK_LINES = re.compile(r"\n\s*\n")


class TextTemplate(Template):
    """A template that writes tools, their calls and results as text of the turns."""

    marks: tuple[str, ...] = ()  # what a turn begins with

    def __init__(self, name: str, tools: ToolFormat = HERMES):
        self.name, self.tools = name, tools

    def identity(self) -> str:
        return f"{self.name} {VERSION} {self.tools.name}"

    def turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        return with_tools_as_text(conversation, self.tools).turns

    @cached_property
    def _like_a_turn(self) -> re.Pattern:
        return re.compile(rf"^[^\S\n]*(?:{'|'.join(map(re.escape, self.marks))})", re.MULTILINE)

    def remarks(self, conversation: Conversation) -> Mapping[str, int]:
        changes = (change for turn in self.turns(conversation) for change in self._changes(turn))
        return Counter(f"{change} --template {self.name}" for change in changes)

    def _changes(self, turn: Turn) -> Iterator[str]:
        """What is changed of a turn or may be misread: sentences that end before the template's name."""
        if self.marks and self._like_a_turn.search(f"{turn.thinking}\n{_with_material(turn)}"):
            yield (
                f"turns with a line that begins with {', '.join(self.marks[:-1])} or {self.marks[-1]} (trained as part "
                "of the turn, but a program that stops there would cut it), as turns do in"
            )


class RawTemplate(TextTemplate):
    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = self.turns(conversation)
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise UserError(
                f"{conversation.where}: --template raw writes one prompt and one response, with nothing to mark turns; "
                f"found {', '.join(turn.role for turn in turns)}. Choose --template world, g1, alpaca or a file"
            )
        return Segment(_with_material(turns[0]), PROMPT), Segment(_with_thinking(turns[1]), response_role(turns[1]))


class WorldTemplate(TextTemplate):
    """world, g1 and g1-think: they differ in how a response begins."""

    marks = ("User:", "Assistant:", "System:")

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = self.turns(conversation)
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                opening, response = self._answer(turn)
                yield Segment(f"Assistant:{opening}", PROMPT)
                yield Segment(response if i == len(turns) - 1 else response + END_OF_TURN, response_role(turn))
            else:
                label = "System" if turn.role == "system" else "User"
                yield Segment(f"{label}: {_one_turn(_with_material(turn))}".rstrip() + END_OF_TURN, PROMPT)

    def _answer(self, turn: Turn) -> tuple[str, str]:
        answer = _one_turn(turn.text)
        if self.name == "world":
            return "", f" {think_block(turn)}{answer}"
        if self.name == "g1":
            return " <think>\n</think", f">\n{answer}"
        block = think_block(turn) or "<think>\n</think>\n"
        return " <think", f"{block.removeprefix('<think')}{answer}"

    def _changes(self, turn: Turn) -> Iterator[str]:
        text = _unix_lines(_with_material(turn))
        if BLANK_LINES.search(text.strip()):
            yield "turns whose blank lines became single line breaks, since a blank line ends a turn in"
        if turn.role == "assistant" and re.match(r"\s*(?:\t| {2})\S", text):
            yield "responses whose first line lost its indentation, since white space around a turn goes in"
        if turn.thinking and self.name == "g1":
            yield "responses whose thinking is left out (g1-think writes it), since there is an empty think block in"
            turn = replace(turn, thinking="")
        yield from super()._changes(turn)


class AlpacaTemplate(TextTemplate):
    marks = ("### Instruction:", "### Input:", "### Response:")
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    preamble_with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = self.turns(conversation)
        if turns[0].role != "system":
            yield Segment(self.preamble_with_input if any(t.material for t in turns) else self.preamble, PROMPT)
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                yield Segment("### Response:", PROMPT)
                response = _with_thinking(turn)
                yield Segment(response if i == len(turns) - 1 else response + END_OF_TURN, response_role(turn))
            elif turn.role == "system":
                yield Segment(turn.text + END_OF_TURN, PROMPT)
            else:
                material = f"### Input:\n{turn.material}\n\n" if turn.material else ""
                yield Segment(f"### Instruction:\n{turn.text}\n\n{material}", PROMPT)


class FormatTemplate(TextTemplate):
    """A text file with {prompt} and, after it, {response}: each exactly once, all else as it is (one line break at the
    end of the file does not count). What follows {response} ends every response and is trained. Several turns are
    written one after another. There is no place for system and tool turns.
    """

    def __init__(self, name: str, text: str, tools: ToolFormat = HERMES):
        super().__init__(name, tools)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        before, found_prompt, rest = text.removesuffix("\n").partition("{prompt}")
        between, found_response, after = rest.partition("{response}")
        if not (found_prompt and found_response) or "{prompt}" in rest or "{response}" in before + after:
            raise UserError(
                f"--template {name}: expected {{prompt}} and, after it, {{response}}, each exactly once; "
                "or a Jinja template, which loops over `messages`"
            )
        self._before, self._between, self._after = before, between, after

    def identity(self) -> str:
        return f"format {VERSION} {self._digest} {self.tools.name}"

    def _segments(self, conversation: Conversation) -> Iterable[Segment]:
        turns = self.turns(conversation)
        roles = [turn.role for turn in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError(
                f"{conversation.where}: the format of --template {self.name} has {{prompt}} and {{response}} in turn; "
                f"found {', '.join(roles)}. Write it as a Jinja template, which sees every role"
            )
        for turn in turns:
            if turn.role == "user":
                yield Segment(self._before + _with_material(turn) + self._between, PROMPT)
            else:
                yield Segment(_with_thinking(turn) + self._after, response_role(turn))


def load_template(name: str, tokenizer_name: str, tool_format: str = "auto") -> Template:
    """The template of that name, file or folder. auto: world for the World tokenizer, whose models know it; else raw.

    tool_format: g1, hermes or auto, which is g1 for g1 and g1-think, else hermes.
    """
    if name == "auto":
        name = "world" if tokenizer_name == "world" else "raw"
    tools = {"auto": G1 if name in ("g1", "g1-think") else HERMES, "g1": G1, "hermes": HERMES}[tool_format]
    if name in BUILT_IN:
        return BUILT_IN[name](name, tools)
    path = Path(name)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"--template {name}: expected auto, {', '.join(BUILT_IN)}, or the path of a template file")
    # Jinja takes a while to import.
    from rwkv_bone.data.templates.files import read_templates
    from rwkv_bone.data.templates.jinja import JinjaTemplate

    texts = read_templates(path)
    if not any(re.search(r"\{\{|\{%", text) for text in texts.values()):
        return FormatTemplate(name, texts["default"], tools)
    if tool_format != "auto":
        raise UserError(
            f"--tool_format {tool_format} has no meaning with --template {name}, a Jinja template, which writes tools "
            "itself: remove one"
        )
    specials = special_tokens(path if path.is_dir() else path.parent)
    if tokenizer_name in ("bytes", "world"):
        # Their only token of that kind, whatever its name is where the template comes from.
        specials = {name: END_MARK if text else "" for name, text in specials.items()}
    return JinjaTemplate(name, texts, specials)


BUILT_IN: dict[str, type[TextTemplate]] = {
    "raw": RawTemplate,
    "alpaca": AlpacaTemplate,
    **dict.fromkeys(("world", "g1", "g1-think"), WorldTemplate),
}


def _with_material(turn: Turn) -> str:
    return f"{turn.text}\n{turn.material}" if turn.material else turn.text


def _with_thinking(turn: Turn) -> str:
    return think_block(turn) + turn.text


def _one_turn(text: str) -> str:
    return BLANK_LINES.sub("\n", _unix_lines(text).strip())


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n")
