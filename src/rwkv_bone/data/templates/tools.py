"""How tools on offer, calls of them and their results become text.

g1      Upstream's form, for RWKV-7 G1 (RWKV7-G1x-templates.txt of July 2026). JSON is compact. The list of tools stands
        in the system turn, after what that says: "Tools:", one tool a line between "[" and "]", "Return only a JSON
        function call.". A call is a fenced block, a result a user's turn that begins with "Function output:".
        Several calls of one response are a list in one block, one call a line, as the tools are.
hermes  Hermes models' form, which many runtimes read back: <tools>, one tool a line, </tools> after what the system
        turn says; each call in <tool_call>, each result in <tool_response>.

In both, text that a response has besides its calls stands before them, and each result is a turn of its own.

g1 writes a tool as {"name", "description", "arguments"}: `arguments` are the properties of its JSON schema, each whole.
What else the schema or the tool has (`required`, `$defs`, `strict`, ...) follows under its own name; only "type":
"object" and "type": "function", which say nothing, are left out. hermes writes a tool as the data has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rwkv_bone.data.conversations.conversation import Conversation, Turn

SCHEMAS = ("parameters", "input_schema", "inputSchema")  # where a tool has the JSON schema of its arguments


@dataclass(frozen=True)
class ToolFormat:
    """Three functions to text: of the tools on offer, of the calls of one response (name, arguments), of a result."""

    name: str
    offer: Callable[[Iterable[Any]], str]
    calls: Callable[[Sequence[Mapping[str, Any]]], str]
    result: Callable[[str], str]


def has_tools(conversation: Conversation) -> bool:
    """Whether a row has tools, calls of them or results: otherwise --tool_format has nothing to write."""
    return bool(conversation.tools) or any(turn.calls or turn.role == "tool" for turn in conversation.turns)


def with_tools_as_text(conversation: Conversation, form: ToolFormat | None = None) -> Conversation:
    """The same without tools and calls: they stand in the texts of the turns, results in their marks.

    The tools on offer follow the text of the first turn, if that is a system turn; else they are one. form: HERMES, if
    none is given.
    """
    form = form or HERMES
    turns = [_as_text(turn, form) for turn in conversation.turns]
    if conversation.tools:
        offer = form.offer(conversation.tools)
        if turns and turns[0].role == "system":
            turns[0] = replace(turns[0], text=f"{turns[0].text.strip()}\n{offer}")
        else:
            turns = [Turn("system", offer), *turns]
    return replace(conversation, turns=tuple(turns), tools=())


def _as_text(turn: Turn, form: ToolFormat) -> Turn:
    if turn.role == "tool":
        return replace(turn, text=form.result(turn.text))
    if turn.calls:
        text = "\n".join([*filter(None, [turn.text.strip()]), form.calls(turn.calls)])
        return replace(turn, text=text, calls=())
    return turn


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _lines(values: Iterable[Any]) -> str:
    """A JSON list with one value a line."""
    return "[\n" + ",\n".join(map(_compact, values)) + "\n]"


def _g1_offer(tools: Iterable[Any]) -> str:
    return f"Tools:\n{_lines(map(_g1_tool, tools))}\nReturn only a JSON function call."


def _g1_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    return f"```json\n{_compact(calls[0]) if len(calls) == 1 else _lines(calls)}\n```"


def _g1_tool(tool: Any) -> Any:
    """A tool in upstream's form; as it is, if it is no function with a name."""
    if not isinstance(tool, Mapping):
        return tool
    inner = tool.get("function")
    function = dict(inner) if isinstance(inner, Mapping) else dict(tool)
    if not isinstance(function.get("name"), str) or "arguments" in function:
        return tool
    rest = {key: value for key, value in tool.items() if key not in ("type", "function")} if inner is not None else {}
    if function.get("type") == "function":
        del function["type"]
    schema: Mapping[str, Any] = next(
        (function.pop(key) for key in SCHEMAS if isinstance(function.get(key), Mapping)), {}
    )
    written = {key: function.pop(key) for key in ("name", "description") if function.get(key) is not None}
    properties = schema.get("properties")
    written["arguments"] = properties if isinstance(properties, Mapping) else {}
    left = {key: value for key, value in schema.items() if (key, value) != ("type", "object")}
    if isinstance(properties, Mapping):
        del left["properties"]
    for more in (left, function, rest):
        for key, value in more.items():
            # A schema may have a description of its own.
            written[f"parameters.{key}" if key in written else key] = value
    return written


def _hermes_offer(tools: Iterable[Any]) -> str:
    return "\n".join(["<tools>", *(json.dumps(tool, ensure_ascii=False) for tool in tools), "</tools>"])


def _hermes_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)


G1 = ToolFormat("g1", _g1_offer, _g1_calls, lambda text: f"Function output:\n{text.strip()}")
HERMES = ToolFormat(
    "hermes", _hermes_offer, _hermes_calls, lambda text: f"<tool_response>\n{text.strip()}\n</tool_response>"
)
