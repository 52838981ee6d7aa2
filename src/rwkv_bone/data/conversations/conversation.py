"""What a row of data says: a document, or the turns of a conversation.

`layout_of` (layouts.py) looks at one row, the first of a file, and says which fields to read; `conversation` reads them
from every row. What a turn says, what it thinks and which tools it calls are kept apart: `templates` decide how each is
written. A turn of a list (turns.py) is {"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), or {"message"}
alone, where user and assistant take turns. A prompt or a response may also be such a list (TRL's conversational form).

Beside prompt and response, and beside messages, a row may have `system`, `tools`, `history` ([[prompt, response], ...])
and, with a response that is a text, its thinking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rwkv_bone.data.conversations.fields import Fields, find
from rwkv_bone.data.conversations.layouts import CONTEXT, HISTORY, SYSTEM, THINKING, TOOLS, Layout, layout_of
from rwkv_bone.data.conversations.remarks import unused
from rwkv_bone.data.conversations.turns import WEIGHTS, Turn, response, turns_of
from rwkv_bone.data.conversations.values import check_whole, json_type, parse_json, text_of
from rwkv_bone.errors import UserError

__all__ = ["Conversation", "Layout", "Turn", "conversation", "layout_of"]

# Remarks.
UNANSWERED = "turns after the last response, left out"
IN_PROMPT = "responses in a prompt that is a list of turns, read and not trained"
NOTHING_TRAINED = "rows that train nothing, as all their responses are marked as not trained"
MISSING, OF_SEVERAL = "rows without the field ", ", which is one of several in "
BAD_EXAMPLES = "rows whose 'label' is false (preference data: bad responses), trained like the others"


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, the last of which is the assistant's; or a document, and no turns."""

    where: str  # such as "data.jsonl:17", for messages
    turns: tuple[Turn, ...] = ()
    document: str | None = None
    tools: tuple[Any, ...] = ()  # the tools on offer, as the row describes them
    # What was left out, changed or not used: sentences about rows or turns, with counts, to be summed over all rows.
    remarks: Mapping[str, int] = field(default_factory=dict)


def conversation(row: Mapping[str, Any], layout: Layout, where: str) -> Conversation:
    """What a row says. UserError, beginning with `where`, for fields that are missing, of a wrong type or empty."""
    fields, remarks = Fields(row, where, layout.flag), Counter[str]()
    document, turns, tools = None, [], ()
    if layout.kind == "text":
        document = fields.filled(layout.fields[0])
    else:
        turns = with_system(_turns(fields, layout, remarks), fields)
        tools = tools_of(fields, may_be_other=layout.kind != "messages")
        if not any(turn.trained for turn in turns if turn.role == "assistant"):
            remarks[NOTHING_TRAINED] += 1
    count_unused(fields, remarks)
    return Conversation(where, tuple(turns), document, tools, dict(+remarks) if remarks else {})


def with_system(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns after the system text of the row, unless they begin with one or the row has none."""
    if turns[0].role != "system" and (system := fields.optional_text(*SYSTEM)):
        return [Turn("system", system), *turns]
    return turns


def count_unused(fields: Fields, remarks: Counter[str]) -> None:
    """Count what of the row was not read."""
    for name in fields.missing:
        remarks[f"{MISSING}{name!r}{OF_SEVERAL}{fields.flag}"] += 1
    for name in fields.unread():
        remarks[unused(name)] += 1
    for name in fields.usual(WEIGHTS):
        if isinstance(fields.row[name], int | float) and fields.row[name] != 1:
            remarks[unused(name)] += 1


def check_named(remarks: Mapping[str, int], rows: int, where: str) -> None:
    """UserError where one of several fields that the user named is in none of the rows. remarks: of all of them."""
    for remark, count in remarks.items():
        if remark.startswith(MISSING) and count >= rows:
            name, flag = remark.removeprefix(MISSING).split(OF_SEVERAL)
            raise UserError(f"{where}: {flag} names the field {name}, which no row has: correct it or leave it out")


def _turns(fields: Fields, layout: Layout, remarks: Counter[str]) -> list[Turn]:
    if layout.kind == "messages":
        turns = turns_of(fields.get(layout.fields[0]), layout.fields[0], fields.where, remarks)
    else:
        turns = [*prompt_of(fields, layout, remarks), *response_of(fields, layout.fields[1], remarks)]
        for name in fields.usual(("label",)):
            if fields.row[name] is False:
                remarks[BAD_EXAMPLES] += 1
    return to_last_response(turns, layout.fields[-1], fields.where, remarks)


def to_last_response(turns: list[Turn], name: str, where: str, remarks: Counter[str]) -> list[Turn]:
    """Without the turns after the last response, which are counted. UserError if there is none; name: the field's."""
    answered = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role == "assistant"), 0)
    if not answered:
        raise UserError(f"{where}: no turn of the assistant in {name!r}: there is nothing to train on")
    if answered < len(turns):
        remarks[UNANSWERED] += len(turns) - answered
    return turns[:answered]


def prompt_of(fields: Fields, layout: Layout, remarks: Counter[str]) -> list[Turn]:
    """The history and the user's turn; or the turns that the prompt is."""
    name = layout.fields[0]
    if is_turns(fields.row, name):
        turns = turns_of(fields.get(name), name, fields.where, remarks)
        remarks[IN_PROMPT] += sum(turn.role == "assistant" and turn.trained for turn in turns)
        return [replace(turn, trained=turn.role != "assistant") for turn in turns]
    prompt = fields.text(name)
    # The user's own choice of fields is the whole prompt.
    material = fields.optional(*CONTEXT) if layout.kind == "pair" else ""
    return [*_history(fields, remarks), Turn("user", prompt, material=material)]


def response_of(fields: Fields, name: str, remarks: Counter[str]) -> list[Turn]:
    if is_turns(fields.row, name):
        return turns_of(fields.get(name), name, fields.where, remarks)
    text = fields.filled(name)
    thinking = fields.optional_text(*THINKING)
    return [response(text, thinking, fields.where, "", remarks)]


def is_turns(row: Mapping[str, Any], name: str) -> bool:
    found = find(row, name)
    value = found[1] if found else None
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def tools_of(fields: Fields, may_be_other: bool) -> tuple[Any, ...]:
    """The tools on offer, where the row has any. may_be_other: what is no list of objects is another kind of field."""
    for name in fields.usual(TOOLS):
        tools = fields.row[name]
        if isinstance(tools, str) and tools.strip():
            try:
                tools = parse_json(tools)
            except (ValueError, RecursionError) as error:
                if may_be_other:
                    continue
                raise UserError(f"{fields.where}: field {name!r} is not valid JSON ({error})") from error
        tools = [tools] if isinstance(tools, dict) else tools
        tools = [_loaded(tool) for tool in tools] if isinstance(tools, list) else tools
        if not tools or (may_be_other and not _all_objects(tools)):
            continue
        if not _all_objects(tools):
            raise UserError(f"{fields.where}: field {name!r} is {json_type(tools)}, expected a list of objects")
        fields.get(name)
        check_whole(tools, f"{fields.where}: field {name!r}")
        return tuple(tools)
    return ()


def _loaded(tool: Any) -> Any:
    """A tool whose description is a text of JSON, as an object."""
    try:
        return parse_json(tool) if isinstance(tool, str) else tool
    except (ValueError, RecursionError):
        return tool


def _all_objects(tools: Any) -> bool:
    return isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)


def _history(fields: Fields, remarks: Counter[str]) -> list[Turn]:
    """Alpaca's earlier turns, [[prompt, response], ...]."""
    where, turns = fields.where, []
    for name in fields.usual(HISTORY):
        history = fields.row[name]
        if isinstance(history, str) and history.lstrip().startswith("["):
            try:
                history = parse_json(history)
            except (ValueError, RecursionError):
                pass
        if not isinstance(history, list):
            continue  # a text of that name, such as a school subject's
        fields.get(name)
        for i, pair in enumerate(history):
            place = f" ({name}[{i}])"
            if not isinstance(pair, list) or len(pair) != 2:
                raise UserError(f"{where}: not a pair{place}; expected [prompt, response]")
            prompt, answer = (text_of(text, f"{where}: {name}", place) for text in pair)
            turns += [Turn("user", prompt), response(answer, "", where, place, remarks)]
    return turns
