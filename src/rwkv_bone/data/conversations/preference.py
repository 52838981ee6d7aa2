"""Rows whose answers are compared: one that was chosen and one that was rejected, or one with a label.

A row has a prompt, under the usual names or as a list of turns, and two answers; or two whole conversations, whose
prompt is what both begin with (TRL's implicit form, UltraFeedback's lists, HH's texts of `Human:` and `Assistant:`). An
answer is a text, a list of turns, or one turn alone. For KTO a row has one answer and says whether it is good; a row
with two becomes two of these.

The prompt ends where the two conversations differ first: at a turn of the assistant, of which at least the last one is
no part of it. Turns of the prompt are read and not trained.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

from rwkv_bone.config.preferences import PAIRED
from rwkv_bone.data.conversations.conversation import (
    IN_PROMPT,
    Conversation,
    count_unused,
    is_turns,
    prompt_of,
    response_of,
    to_last_response,
    tools_of,
    with_system,
)
from rwkv_bone.data.conversations.fields import Fields, find
from rwkv_bone.data.conversations.layouts import MESSAGES, Layout, check_there, usual_pairs, usual_prompts, with_beside
from rwkv_bone.data.conversations.turns import ROLE_KEYS, ROLES, TEXT_KEYS, Turn, response, turns_of
from rwkv_bone.data.conversations.values import json_type, parse_json
from rwkv_bone.errors import UserError

# Names of the answer that was chosen, and of the one that was rejected. The last are OpenAI's.
ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
)
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "inputs", "input", "human", "user")
LABELS = ("label", "kto_tag", "desirable")
TRUTH = {
    **dict.fromkeys(("true", "1", "1.0", "good", "desirable", "chosen"), True),
    **dict.fromkeys(("false", "0", "0.0", "bad", "undesirable", "rejected"), False),
}
# HH's texts begin with a person's turn, and every turn stands after a blank line.
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")

EARLIER = "responses before the answers that are compared, read and not trained"  # a remark


class Answer(NamedTuple):
    """One answer to a prompt."""

    conversation: Conversation  # the prompt and the answer, of which only the answer's turns are trained
    prompt: int  # how many of the turns are the prompt
    good: bool  # whether it was chosen, or is labelled as good


def preference_layout(
    row: Mapping[str, Any],
    names: tuple[str, ...],
    task: str,
    where: str,
    flag: str = "--sft_field",
    or_usual: bool = False,
) -> Layout:
    """The layout of a row for `task`, dpo, orpo, simpo or kto. names, flag and or_usual: as `layout_of` takes them.

    names: of prompt, chosen and rejected answer, or of the last two, which are whole conversations then; for kto of
    prompt, answer and label, or of a list of messages and the label. UserError for a row without such fields.
    """
    fields = Fields(row, where, flag)
    if not names:
        return with_beside(_usual(row, task, where, flag), fields)
    try:
        check_there(fields, names)
    except UserError:
        if not or_usual:
            raise
        try:
            return with_beside(replace(_usual(row, task, where, flag), instead=True), Fields(row, where, flag))
        except UserError:
            pass
        raise
    rejected, label = (names[-1], "") if task in PAIRED else ("", names[-1])
    kind = "named" if len(names) > 2 else "messages"
    return with_beside(Layout(kind, names[:-1], flag, rejected=rejected, label=label), fields)


def _usual(row: Mapping[str, Any], task: str, where: str, flag: str) -> Layout:
    """The layout by usual names."""
    # Tables have every field in every row: one that is null here is not meant.
    fields = Fields({name: value for name, value in row.items() if value is not None}, where, flag)
    labels = fields.usual(LABELS)
    pair = next(((*a, *b) for a, b in ((fields.usual((x,)), fields.usual((y,))) for x, y in ANSWERS) if a and b), None)
    if pair:
        return _pair(fields, pair[0], pair[-1])
    if labels and task == "kto":
        return _labelled(fields, labels[0])
    found = ", ".join(map(str, row)) or "none"
    if task == "kto":
        raise UserError(
            f"{where}: --task kto expects an answer and a label that says whether it is good, such as the fields "
            f"prompt, completion and label; fields found: {found}. Name them with {flag} PROMPT ANSWER LABEL, or give "
            "--task sft, which trains every answer"
        )
    more = (
        "--task kto for answers that are labelled as good or bad" if labels else "--task sft, which trains one answer"
    )
    raise UserError(
        f"{where}: --task {task} expects two answers to a prompt, such as the fields prompt, chosen and rejected; "
        f"fields found: {found}. Name them with {flag} PROMPT CHOSEN REJECTED, or give {more}"
    )


def _pair(fields: Fields, chosen: str, rejected: str) -> Layout:
    row, flag = fields.row, fields.flag
    prompts = [*dict.fromkeys(_prompt_names(fields))]
    whole = _is_whole(row[chosen])
    # With a prompt a text is an answer, unless it is the JSON of a conversation, as tables of text hold one.
    if (whole and isinstance(row[chosen], str)) or (not prompts and (whole or _speaks(row[chosen]))):
        return Layout("messages", (chosen,), flag, rejected=rejected)
    if not prompts:
        raise UserError(
            f"{fields.where}: {chosen!r} and {rejected!r} without a prompt; fields found: {', '.join(row)}. Name the "
            f"prompt too, {flag} PROMPT {chosen} {rejected}, or give whole conversations, lists of turns"
        )
    if len(prompts) > 1 and not whole and len({str(row.get(name)).strip() for name in prompts}) > 1:
        ways = " or ".join(f"{flag} {name} {chosen} {rejected}" for name in prompts)
        raise UserError(f"{fields.where}: the prompt could be {' or '.join(prompts)}. Choose with {ways}")
    kind = "pair" if "+" in prompts[0] or isinstance(row.get(prompts[0]), str) else "named"
    return Layout(kind, (prompts[0], chosen), flag, rejected=rejected)


def _prompt_names(fields: Fields) -> list[str]:
    """The fields that may be the prompt; a list of messages only where there is no other."""
    row = fields.row
    names = [name for name in usual_prompts(fields, PROMPTS) if "+" in name or isinstance(row[name], str | list)]
    inside = [f"{name}.messages" for name in fields.usual(("input",)) if find(row, f"{name}.messages")]
    return names or inside or [name for name in fields.usual(MESSAGES) if isinstance(row[name], list | str)]


def _labelled(fields: Fields, label: str) -> Layout:
    row, flag = fields.row, fields.flag
    rest = Fields({name: value for name, value in row.items() if name != label}, fields.where, flag)
    lists = [name for name in rest.usual(MESSAGES) if isinstance(row[name], list | str)]
    found = [Layout("pair", pair, flag, label=label) for pair in usual_pairs(rest)]
    found = found or [Layout("messages", (name,), flag, label=label) for name in lists]
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(str, row))
    if not found:
        raise UserError(
            f"{fields.where}: a field {label!r} and no usual pair such as prompt and completion; fields found: "
            f"{names}. Name them with {flag} PROMPT ANSWER {label}, or the list of messages, {flag} MESSAGES {label}"
        )
    ways = " or ".join(f"{flag} {' '.join(layout.fields)} {label}" for layout in found)
    choices = " or ".join("+".join(layout.fields) for layout in found)
    raise UserError(f"{fields.where}: the fields could be {choices} (found: {names}). Choose with {ways}")


def answers_of(row: Mapping[str, Any], layout: Layout, where: str) -> tuple[Answer, ...]:
    """The answers of a row: the chosen one and the rejected one, or one alone. The first has the row's remarks.

    UserError, beginning with `where`, for what `conversation` refuses, and for answers to different prompts.
    """
    fields, remarks = Fields(row, where, layout.flag), Counter[str]()
    good = _truth(fields.get(layout.label), layout.label, where) if layout.label else True
    prompt = [] if layout.kind == "messages" else _prompt(fields, layout, remarks)
    names = [layout.fields[-1], *filter(None, (layout.rejected,))]
    counts = [Counter[str]() for _ in names]
    talks = [_whole(fields, name, layout, prompt, count) for name, count in zip(names, counts, strict=True)]
    remarks += sum(counts, Counter())
    if len(talks) == 2:
        shared = _shared(talks, names, where)
        if all(counts) and (items := _items(fields.get(names[0]))):
            turns_of(items[: max(shared - len(prompt), 0)], "", where, again := Counter[str]())
            remarks -= again  # of the turns that both have
    else:
        last = max(i for i, turn in enumerate(talks[0]) if turn.role == "assistant")
        shared = len(prompt) if _same(prompt, talks[0][: len(prompt)]) and prompt else last
    del remarks[IN_PROMPT]
    remarks[EARLIER] += sum(turn.role == "assistant" for turn in talks[0][:shared])
    before = with_system([replace(turn, trained=turn.role != "assistant") for turn in talks[0][:shared]], fields)
    tools = tools_of(fields, may_be_other=layout.kind != "messages")
    count_unused(fields, remarks)
    found = []
    for number, turns in enumerate(talks):
        said = dict(+remarks) if number == 0 else {}
        talk = Conversation(where, (*before, *turns[shared:]), None, tools, said)
        found.append(Answer(talk, len(before), good if number == 0 else False))
    return tuple(found)


def _prompt(fields: Fields, layout: Layout, remarks: Counter[str]) -> list[Turn]:
    name = layout.fields[0]
    value = found[1] if (found := find(fields.row, name)) else None
    if _speaks(value):
        fields.get(name)
        items = _spoken(value)
        if items[-1]["from"] == "assistant" and not items[-1]["value"]:
            items.pop()  # where the answer goes on
        turns = turns_of(items, name, fields.where, remarks)
        return [replace(turn, trained=turn.role != "assistant") for turn in turns]
    turns = prompt_of(fields, layout, remarks)
    if turns and turns[-1].role == "assistant":
        raise UserError(
            f"{fields.where}: the prompt {name!r} ends with a turn of the assistant, and {layout.fields[1]!r} is "
            f"another: leave that turn out; for whole conversations give {layout.flag} with their names alone"
        )
    return turns


def _whole(fields: Fields, name: str, layout: Layout, prompt: list[Turn], remarks: Counter[str]) -> list[Turn]:
    """The whole conversation that ends with the answer in the field `name`."""
    where, value = fields.where, fields.get(name)
    if isinstance(value, dict) and any(key in value for key in TEXT_KEYS):
        value = [value if any(key in value for key in ROLE_KEYS) else {"role": "assistant"} | value]
    if layout.kind == "messages" or is_turns({name: value}, name):
        items = _items(value)
        if not items and isinstance(value, str):
            raise UserError(
                f"{where}: {name!r} is a text without a prompt: name the prompt too, {layout.flag} PROMPT "
                f"{' '.join(filter(None, (*layout.fields, layout.rejected, layout.label)))}"
            )
        turns = turns_of(items or value, name, where, remarks)
        if not turns:
            raise UserError(f"{where}: field {name!r} is empty: fill it or remove the row")
    elif layout.rejected:
        turns = [response(fields.filled(name), "", where, "", remarks)]
    else:
        turns = response_of(fields, name, remarks)
    if layout.kind != "messages" and turns[0].role != "assistant":
        if not _contains(turns, prompt):
            raise UserError(
                f"{where}: {name!r} begins with a turn of role {turns[0].role}, so it is a whole conversation, and "
                f"the prompt {layout.fields[0]!r} is not in it: give {layout.flag} "
                f"{' '.join((*layout.fields[1:], layout.rejected or layout.label))}, which leaves the prompt unread"
            )
    elif layout.kind != "messages":
        turns = [*prompt, *turns]
    return to_last_response(turns, name, where, remarks)


def _shared(talks: Sequence[list[Turn]], names: Sequence[str], where: str) -> int:
    """How many turns both conversations have at their beginning; at least one is left of each."""
    first, second = talks
    most = min(map(len, talks)) - 1
    shared = next((i for i in range(most) if not _same(first[i : i + 1], second[i : i + 1])), most)
    for turns, name in zip(talks, names, strict=True):
        if turns[shared].role != "assistant":
            raise UserError(
                f"{where}: {names[0]!r} and {names[1]!r} are answers to different prompts: turn {shared + 1} of "
                f"{name!r} is of role {turns[shared].role}, and the other's differs"
            )
    return shared


def _same(turns: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether these turns say the same, whichever are trained."""
    return [replace(turn, trained=True) for turn in turns] == [replace(turn, trained=True) for turn in others]


def _contains(turns: list[Turn], prompt: list[Turn]) -> bool:
    """Whether a conversation begins with the turns of a prompt, or a person says its text in it."""
    if _same(turns[: len(prompt)], prompt):
        return True
    wanted = prompt[-1].text.split()
    return len(prompt) == 1 and any(turn.role == "user" and turn.text.split() == wanted for turn in turns)


def _items(value: Any) -> list[dict]:
    """The messages of a whole conversation: a list, JSON of one, or HH's text; empty if it is none of these."""
    if isinstance(value, str):
        if _speaks(value):
            return _spoken(value)
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []


def _is_whole(value: Any) -> bool:
    """Whether this is a list of turns that begins with another's than the assistant's."""
    items = _items(value) if not _speaks(value) else []
    role = next((items[0][key] for key in ROLE_KEYS if key in items[0]), "user") if items else ""
    return bool(items) and ROLES.get(str(role).lower()) != "assistant"


def _speaks(value: Any) -> TypeGuard[str]:
    """Whether this is a text in HH's form."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _spoken(text: str) -> list[dict]:
    _, *pieces = SPEAKER.split(text)
    return [
        {"from": speaker.lower(), "value": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _truth(value: Any, name: str, where: str) -> bool:
    if isinstance(value, bool | int | float | str):
        said = TRUTH.get(str(value).strip().lower())
        if said is not None:
            return said
    found = json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float) else json_type(value)
    raise UserError(
        f"{where}: the label {name!r} is no truth value ({found}); expected true for a good answer and false for a bad "
        "one (or 1 and 0, good and bad)"
    )
