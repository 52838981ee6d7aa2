"""What a row of data means: a document, or the turns of a conversation.

`layout_of` looks at one row, the first of a file, and says which fields to read; `conversation` reads them from every
row. The layouts, and how each is recognised:

text        {"text": ...}: a document, trained as it is
pair        prompt and response under the names of USUAL_PAIRS, or two names in --sft_field
alpaca      {"instruction", "output"}, with "input", "system" and "history" where a row has them
messages    a list of turns, {"messages": ...} or {"conversations": ...}, or one name in --sft_field. A turn is
            {"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), or {"message"} alone, where user and assistant
            take turns. "system" and "tools" beside the list are read too.

What a turn says, what it thinks and which tools it calls are kept apart: `templates` decide how each is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkv_bone.errors import UserError

USUAL_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
ALPACA = ("instruction", "output")
MESSAGES = ("messages", "conversations")
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "message")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
UNANSWERED = "turns after the last response, left out"
REMEDY = "Name prompt and response with --sft_field"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    text: str  # what is visible: without its think block and its calls
    thinking: str = ""  # the reasoning of an assistant's turn
    material: str = ""  # the text that a user's instruction is about (alpaca's `input`)
    calls: tuple[Mapping[str, Any], ...] = ()  # of an assistant's turn: {"name", "arguments"} each
    trained: bool = True  # False: an assistant's turn that is read and not trained (`weight: 0`, `train: false`)
    call_ids: tuple[str, ...] = ()  # of `calls`, "" for a call without one; of a tool's turn: that of the call answered
    name: str = ""  # of a tool's turn: the tool


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, the last of which is the assistant's; or a document, and no turns."""

    where: str  # such as "data.jsonl:17", for messages
    turns: tuple[Turn, ...] = ()
    document: str | None = None
    tools: tuple[Any, ...] = ()  # the tools on offer, as the row describes them
    # What was left out, changed or not used: sentences about rows or turns, with counts, to be summed over all rows.
    remarks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Which fields of a row are read, and as what."""

    kind: str  # text, pair, alpaca or messages
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(self.fields)

    @property
    def names(self) -> frozenset[str]:
        """The top-level names that are read, where a row has them."""
        return frozenset(self.fields) | {"input", "system", "history", "tools", "reasoning_content"}


def layout_of(row: Mapping[str, Any], sft_field: tuple[str, ...], data_type: str, where: str) -> Layout:
    """The layout of a row: as --sft_field or --data_type say (jsonl: text; sft: not text), else by its fields.

    UserError if its fields fit no layout, or more than one.
    """
    if sft_field:
        return Layout("pair" if len(sft_field) == 2 else "messages", sft_field)
    if data_type == "jsonl":
        return Layout("text", ("text",))
    candidates = []
    if "text" in row and data_type != "sft":
        candidates.append(Layout("text", ("text",)))
    candidates += [Layout("messages", (name,)) for name in MESSAGES if isinstance(row.get(name), list | str)]
    alpaca = set(ALPACA) <= set(row)
    if alpaca:
        candidates.append(Layout("alpaca", ALPACA))
    for names in USUAL_PAIRS:
        if set(names) <= set(row) and not (alpaca and names[1] in ALPACA):
            candidates.append(Layout("pair", names))
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(row) or "none"
    if not candidates:
        raise UserError(
            f"{where}: neither 'text' nor 'messages' nor a usual pair such as prompt and response; "
            f"fields found: {found}. {REMEDY}, or the list of messages"
        )
    choices = " or ".join("+".join(layout.fields) for layout in candidates)
    raise UserError(
        f"{where}: the fields could be {choices} (found: {found}). "
        "Choose with --sft_field PROMPT RESPONSE, with --sft_field MESSAGES, or --data_type jsonl for 'text'"
    )


def conversation(row: Mapping[str, Any], layout: Layout, where: str) -> Conversation:
    """What a row says. UserError, beginning with `where`, for fields that are missing, of a wrong type or empty."""
    if layout.kind == "text":
        return Conversation(where, document=_filled(row, layout.fields[0], where))
    if layout.kind == "messages":
        return _of_messages(row, layout.fields[0], where)
    prompt, response = layout.fields
    before: tuple[Turn, ...] = ()
    material = ""
    tools: tuple[Any, ...] = ()
    if layout.kind == "alpaca":
        material, tools = _optional(row, "input", where), _tools(row, where)
        before = (*_system(row, where), *_history(row, where))
    user = Turn("user", _field(row, prompt, where), material=material)
    answer = Turn("assistant", _filled(row, response, where), thinking=_optional(row, "reasoning_content", where))
    return Conversation(where, (*before, user, answer), tools=tools)


def _of_messages(row: Mapping[str, Any], name: str, where: str) -> Conversation:
    messages = _messages(row, name, where)
    alternating = not any(key in message for message in messages for key in ROLE_KEYS)
    turns = []
    for i, message in enumerate(messages):
        place = f"{name}[{i}]"
        role = ("user", "assistant")[i % 2] if alternating else _role(message, where, place)
        turns.append(_turn(message, role, where, place))
    turns = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    if not turns or turns[0].role != "system":
        turns = [*_system(row, where), *turns]
    answered = max((i + 1 for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    if not answered:
        raise UserError(f"{where}: no turn of the assistant in {name!r}: there is nothing to train on")
    left_out = len(turns) - answered
    remarks = {UNANSWERED: left_out} if left_out else {}
    return Conversation(where, tuple(turns[:answered]), tools=_tools(row, where), remarks=remarks)


def _messages(row: Mapping[str, Any], name: str, where: str) -> list[dict]:
    value = _present(row, name, where)
    if isinstance(value, str):  # tables of text, such as CSV, hold the list as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        found = "a list of other things" if isinstance(value, list) else json_type(row[name])
        raise UserError(f"{where}: field {name!r} is {found}, expected a list of turns such as {{role, content}}")
    return value


def _role(message: dict, where: str, place: str) -> str:
    role = next((message[key] for key in ROLE_KEYS if key in message), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        found = "no role" if role is None else f"unknown role {json.dumps(role, ensure_ascii=False)}"
        raise UserError(f"{where}: {found} ({place}); expected one of {', '.join(ROLES)}")
    return role.lower()


def _turn(message: dict, role: str, where: str, place: str) -> Turn:
    """The turn that one element of the list holds. role: as it is named there."""
    key = next((key for key in TEXT_KEYS if key in message), None)
    value = message.get(key)
    if isinstance(value, list):
        value = "".join(_part(part, where, place) for part in value)
    found = message.get("tool_calls") or [call for call in [message.get("function_call")] if call]
    if not isinstance(found, list):
        raise UserError(f"{where}: tool_calls is {json_type(found)}, expected a list ({place})")
    if value is None and (found or (key and role == "system")):
        value = ""
    if key is None and value is None:
        names = ", ".join(message) or "nothing"
        keys = ", ".join(TEXT_KEYS)
        raise UserError(f"{where}: a turn without text ({place}); expected one of {keys}, found {names}")
    text = _checked(value, f"{where}: {key}", f" ({place})")
    if role == "function_call" and text.strip():  # ShareGPT's: the call is the text
        found, text = [*_loaded(text, where, place), *found], ""
    calls = tuple(_call(call, where, place) for call in found)
    if ROLES[role] == "assistant" and not text.strip() and not calls:
        raise UserError(f"{where}: empty response ({place}): fill it or remove the row")
    thinking = _optional(message, "reasoning_content", where, f" ({place})")
    ids, name = tuple(str(call.get("id") or "") for call in found), ""
    if ROLES[role] == "tool":
        ids, name = (_optional(message, "tool_call_id", where, f" ({place})"),), _optional(message, "name", where)
    return Turn(ROLES[role], text, thinking, calls=calls, call_ids=ids if any(ids) else (), name=name)


def _loaded(text: str, where: str, place: str) -> list:
    """The calls that a text of JSON holds: one, or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a tool call that is not JSON ({place}); expected {{name, arguments}}") from error
    return calls if isinstance(calls, list) else [calls]


def _part(part: Any, where: str, place: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    found = part.get("type") if isinstance(part, dict) else json_type(part)
    raise UserError(f'{where}: a part that is not text ({place}: {found}); expected {{"type": "text", "text": ...}}')


def _call(call: Any, where: str, place: str) -> dict[str, Any]:
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"{where}: a tool call without a name ({place}); expected {{name, arguments}}")
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass  # arguments that are not valid JSON stay as they are
    return {"name": call["name"], "arguments": arguments}


def _system(row: Mapping[str, Any], where: str) -> list[Turn]:
    """The system turn that the row's field "system" holds."""
    text = _optional(row, "system", where)
    return [Turn("system", text)] if text.strip() else []


def _tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: field 'tools' is not valid JSON ({error})") from error
    if not tools or isinstance(tools, str):
        return ()
    return tuple(tools) if isinstance(tools, list) else (tools,)


def _history(row: Mapping[str, Any], where: str) -> list[Turn]:
    """Alpaca's earlier turns, [[prompt, response], ...]."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{where}: field 'history' is {json_type(history)}, expected a list of [prompt, response]")
    turns = []
    for i, pair in enumerate(history):
        place = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}: not a pair ({place}); expected [prompt, response]")
        prompt, response = (_checked(text, f"{where}: history", f" ({place})") for text in pair)
        if not response.strip():
            raise UserError(f"{where}: empty response ({place}): fill it or remove the row")
        turns += [Turn("user", prompt), Turn("assistant", response)]
    return turns


def _present(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        found = ", ".join(row) or "none"
        raise UserError(f"{where}: no field {name!r}; found: {found}. {REMEDY}")
    return row[name]


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    return _checked(_present(row, name, where), f"{where}: field {name!r}")


def _filled(row: Mapping[str, Any], name: str, where: str) -> str:
    text = _field(row, name, where)
    if not text.strip():
        raise UserError(f"{where}: field {name!r} is empty: fill it or remove the row")
    return text


def _optional(row: Mapping[str, Any], name: str, where: str, place: str = "") -> str:
    value = row.get(name)
    return "" if value is None else _checked(value, f"{where}: field {name!r}", place)


def _checked(value: Any, what: str, place: str = "") -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {json_type(value)}, expected a string{place}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has half of a surrogate pair at character {error.start}{place}") from error
    return value


def json_type(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
