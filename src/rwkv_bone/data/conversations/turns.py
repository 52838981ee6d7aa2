"""One element of a list of messages as a turn: its role, text, thinking, tool calls, and whether it is trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_bone.data.conversations.layouts import THINKING
from rwkv_bone.data.conversations.remarks import unused
from rwkv_bone.data.conversations.thinking import BEGIN, END, split_thinking
from rwkv_bone.data.conversations.values import check_whole, json_type, parse_json, text_of
from rwkv_bone.errors import UserError

ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "message")
# Keys that say whether a turn is trained. The first say yes with 1 or true, the second no with true.
WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_weight", "loss_mask")
MASKS = ("mask", "masked")
PARTLY = "train_detail"  # axolotl's: parts of a turn
MARKS = {*WEIGHTS, *MASKS, PARTLY}
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
CALL_TAGS = ("<tool_call>", "</tool_call>")

# Remarks.
MASKED = "responses that the data marks as not trained (weight 0, train false), read and not trained"
WEIGHT_OF_OTHERS = "turns of others than the assistant with a weight of 1, which only responses can have: not trained"
TWO_THOUGHTS = "responses with thinking in a field and in their text: that of the field is taken, the other left out"
TWO_FIELDS = "responses with different thinking in two fields: the first is taken"
EMPTY_THOUGHT = "responses with an empty think block, read as responses without thinking"
LONE_END = f"responses with {END} and no {BEGIN}: what stands before it is read as thinking"
LATER_THOUGHT = f"responses with {BEGIN} or {END} further on, which stays in their text"
CALLS_AS_TEXT = f"responses with {CALL_TAGS[0]} in their text, which stays there as it is"


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


def turns_of(value: Any, name: str, where: str, remarks: Counter[str]) -> list[Turn]:
    """The turns of a list of messages, the value of the field `name`. What is not used is counted in `remarks`."""
    if isinstance(value, str):  # tables of text, such as CSV, hold the list as JSON
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            pass
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        found = "a list of other things" if isinstance(value, list) else json_type(value)
        raise UserError(f"{where}: field {name!r} is {found}, expected a list of turns such as {{role, content}}")
    alternating = not any(key in message for message in value for key in ROLE_KEYS)
    turns = []
    for i, message in enumerate(value):
        place = f"{name}[{i}]"
        role = ("user", "assistant")[i % 2] if alternating else _role(message, where, place)
        turns.append(_Message(message, where, f" ({place})", f"{name}[].", remarks).turn(role))
    return [turn for turn in turns if turn.role != "system" or turn.text.strip()]


def response(text: str, thinking: str, where: str, place: str, remarks: Counter[str], **more: Any) -> Turn:
    """An assistant's turn with this text. thinking: that of a field of its own, which comes before the text's.

    more: the turn's other fields. UserError for a response that says nothing and calls no tool.
    """
    thought = split_thinking(text, where, place)
    if thought.found:
        if not thought.thinking:
            remarks[EMPTY_THOUGHT] += 1
        elif thinking.strip() and thinking.split() != thought.thinking.split():
            remarks[TWO_THOUGHTS] += 1
        if thought.lone:
            remarks[LONE_END] += 1
    if BEGIN in thought.text or END in thought.text:
        remarks[LATER_THOUGHT] += 1
    if CALL_TAGS[0] in thought.text:
        remarks[CALLS_AS_TEXT] += 1
    if not (thought.text.strip() or more.get("calls")):
        found = f"a response with nothing after {END}" if thought.thinking else "empty response"
        raise UserError(f"{where}: {found}{place}: fill it or remove the row")
    own = thinking.replace("\r\n", "\n").strip() if thinking else ""
    return Turn("assistant", thought.text, own or thought.thinking, **more)


def _role(message: dict, where: str, place: str) -> str:
    role = next((message[key] for key in ROLE_KEYS if key in message), None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        found = "no role" if role is None else f"unknown role {json.dumps(role, ensure_ascii=False)}"
        raise UserError(f"{where}: {found} ({place}); expected one of {', '.join(ROLES)}")
    return role.lower()


class _Message:
    """An element of the list while it is read. place: " (messages[0])"."""

    def __init__(self, message: dict, where: str, place: str, prefix: str, remarks: Counter[str]):
        self.message, self.where, self.place, self.prefix, self.remarks = message, where, place, prefix, remarks
        self._read: set[str] = set(ROLE_KEYS)

    def turn(self, named: str) -> Turn:
        """named: the role as it is called there."""
        role = ROLES[named]
        key = next((key for key in TEXT_KEYS if key in self.message), None)
        content = self._get(key) if key else None
        text, parts_thinking = self._parts(content, role) if isinstance(content, list) else (content, "")
        found = self._calls() if role == "assistant" else []
        if text is None and (found or (key and role == "system")):
            text = ""
        if key is None and text is None:
            keys = ", ".join(map(str, self.message)) or "nothing"
            raise self._error(f"a turn without text{self.place}; expected one of {', '.join(TEXT_KEYS)}, found {keys}")
        text = text_of(text, f"{self.where}: {key}", self.place)
        if named == "function_call" and text.strip():  # ShareGPT's: the calls are the text
            found, text = [*self._loaded(text), *found], ""
        if role == "assistant":
            more: dict[str, Any] = {}
            if found:
                ids = tuple(map(self._id, found))
                more = {"calls": tuple(map(self._call, found)), "call_ids": ids if any(ids) else ()}
                check_whole(more, f"{self.where}: a tool call{self.place}")
            if not self._trained(role):
                more["trained"] = False
                self.remarks[MASKED] += 1
            thinking = self._thinking() or parts_thinking
            turn = response(text, thinking, self.where, self.place, self.remarks, **more)
        else:
            self._trained(role)
            more = (
                {"call_ids": self._texts("tool_call_id"), "name": "".join(self._texts("name"))}
                if role == "tool"
                else {}
            )
            turn = Turn(role, text, **more)
        for other, value in self.message.items():
            if other not in self._read and value is not None and value not in ("", [], {}):
                self.remarks[unused(f"{self.prefix}{other}")] += 1
        return turn

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def _get(self, key: str) -> Any:
        self._read.add(key)
        return self.message.get(key)

    def _texts(self, key: str) -> tuple[str, ...]:
        """The text of a key, or none."""
        value = self._get(key)
        return () if value in (None, "") else (text_of(value, f"{self.where}: field {key!r}", self.place),)

    def _thinking(self) -> str:
        """The first text under a usual name of thinking. Other things there (a switch) are not used."""
        found = [key for key in THINKING if isinstance(self.message.get(key), str) and self.message[key].strip()]
        if not found:
            return ""
        self._read.update(found)
        texts = [text_of(self.message[key], f"{self.where}: field {key!r}", self.place) for key in found]
        if any(text.split() != texts[0].split() for text in texts):
            self.remarks[TWO_FIELDS] += 1
        return texts[0]

    def _trained(self, role: str) -> bool:
        if MARKS.isdisjoint(self.message):
            return True
        said: dict[str, bool] = {}
        for key in (*WEIGHTS, *MASKS):
            value = self._get(key)
            if value is None:
                continue
            number = {"true": 1, "1": 1, "false": 0, "0": 0}.get(str(value).lower(), value)
            if key == "mask" and not isinstance(value, bool):
                raise self._error(
                    f"mask {json.dumps(value)} may mean trained or not{self.place}: call it weight (1 = trained) or "
                    "masked (true = not trained)"
                )
            if not isinstance(number, int | float) or number not in (0, 1):
                raise self._error(
                    f"{key} {json.dumps(value, ensure_ascii=False)}{self.place}: a turn is trained or not, so expected "
                    "0 or 1, false or true"
                )
            said[key] = bool(number) == (key in WEIGHTS)
        if len(set(said.values())) > 1:
            raise self._error(f"{' and '.join(said)} say different things{self.place}: leave one of them")
        if self._get(PARTLY):
            raise self._error(f"{PARTLY} trains parts of a turn, which is not possible{self.place}: give weight 0 or 1")
        if role != "assistant":
            if any(said.values()):
                self.remarks[WEIGHT_OF_OTHERS] += 1
            return True
        return all(said.values())

    def _parts(self, content: list, role: str) -> tuple[str, str]:
        """(text, thinking) of a list of parts, {"type": "text", "text": ...} each."""
        texts, thinking = [], []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            if kind in ("thinking", "reasoning") and role == "assistant":
                thinking.append(self._thought(part, kind))
            elif isinstance(part, dict) and kind in ("text", "input_text", "output_text", None) and "text" in part:
                texts.append(text_of(part["text"], f"{self.where}: text", self.place))
            else:
                raise self._error(
                    f'a part that is not text ({self.place[2:-1]}: {kind}); expected {{"type": "text", "text": ...}}'
                )
        return "".join(texts), "\n\n".join(thinking)

    def _thought(self, part: dict, kind: str) -> str:
        value = next((part[key] for key in (kind, "text", "content") if part.get(key) is not None), None)
        if isinstance(value, list):
            return self._parts(value, "")[0]
        return text_of(value, f"{self.where}: {kind}", self.place)

    def _calls(self) -> list:
        calls = self._get("tool_calls") or []
        if not isinstance(calls, list):
            raise self._error(f"tool_calls is {json_type(calls)}, expected a list{self.place}")
        if not calls and self.message.get("function_call"):
            calls = [self._get("function_call")]
        return calls

    def _loaded(self, text: str) -> list:
        """The calls that a text holds: JSON of one or of a list of them, inside of Hermes tags or not."""
        calls = []
        for piece in text.split(CALL_TAGS[0]):
            piece = piece.strip().removesuffix(CALL_TAGS[1])
            try:
                found = parse_json(piece) if piece.strip() else []
            except (ValueError, RecursionError) as error:
                raise self._error(f"a tool call that is not JSON{self.place}; expected {{name, arguments}}") from error
            calls += found if isinstance(found, list) else [found]
        return calls

    def _id(self, call: Any) -> str:
        return str(call.get("id") or "") if isinstance(call, dict) else ""

    def _call(self, call: Any) -> dict[str, Any]:
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise self._error(f"a tool call without a name{self.place}; expected {{name, arguments}}")
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except (ValueError, RecursionError):
                pass  # arguments that are not valid JSON stay as they are
        return {"name": call["name"], "arguments": arguments}
