"""Rows of every layout mean the turns their author meant, and what cannot be read is refused with its place."""

import json
import math
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data.conversations.conversation import UNANSWERED, Layout, Turn, conversation, layout_of
from rwkv_bone.errors import UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


PAIRS = ["prompt response", "prompt completion", "question answer", "query response", "input output"]


def talk(row, sft_field=(), data_type="auto"):
    return conversation(row, layout_of(row, sft_field, data_type, "f:1"), "f:1")


def turns(row, sft_field=(), data_type="auto"):
    return talk(row, sft_field, data_type).turns


def error(row, *sft_field):
    with pytest.raises(UserError) as caught:
        turns(row, sft_field)
    assert str(caught.value).startswith("f:1: ")
    return str(caught.value)


@pytest.mark.parametrize("names", PAIRS)
def test_usual_pairs_are_found(names):
    prompt, response = names.split()
    row = {"id": 7, prompt: "one", response: "two"}
    assert layout_of(row, (), "auto", "f:1") == Layout("pair", (prompt, response))
    assert turns(row) == (Turn("user", "one"), Turn("assistant", "two"))


def test_a_text_is_a_document():
    found = conversation({"text": "all of it", "id": 1}, layout_of({"text": ""}, (), "auto", "f:1"), "f:1")
    assert (found.document, found.turns, found.where) == ("all of it", (), "f:1")


def test_alpaca_rows_keep_instruction_and_input_apart_and_may_have_system_and_history():
    row = {"instruction": "sum up", "input": "long text", "output": "short"}
    assert turns(row) == (Turn("user", "sum up", material="long text"), Turn("assistant", "short"))
    row |= {"input": None, "system": "be brief", "history": [["a", "b"], ["c", "d"]]}
    assert turns(row) == (
        Turn("system", "be brief"),
        Turn("user", "a"),
        Turn("assistant", "b"),
        Turn("user", "c"),
        Turn("assistant", "d"),
        Turn("user", "sum up"),
        Turn("assistant", "short"),
    )
    assert turns({"instruction": "no input", "output": "x", "system": ""}) == (
        Turn("user", "no input"),
        Turn("assistant", "x"),
    )


def test_a_later_row_of_alpaca_may_have_an_input_that_the_first_lacks():
    layout = layout_of({"instruction": "a", "output": "b"}, (), "auto", "f:1")
    found = conversation({"instruction": "a", "input": "m", "output": "b"}, layout, "f:2")
    assert found.turns[0] == Turn("user", "a", material="m")


def test_messages_of_openai():
    row = {"messages": [{"role": "developer", "content": "be kind"}, USER, ANSWER], "prompt": "hi"}
    assert turns(row) == (Turn("system", "be kind"), Turn("user", "hi"), Turn("assistant", "yes"))


def test_content_in_parts_is_joined_and_pictures_are_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == Turn("user", "ab")
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "not text (messages[0]: image_url)" in error({"messages": [{"role": "user", "content": picture}, ANSWER]})


def test_tool_calls_and_tools_are_read_and_results_become_tool_turns():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "ü"}'}}
    row = {
        "tools": [{"name": "add"}, {"name": "sub"}],
        "messages": [
            {"role": "system", "content": "calculate"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "again", "function_call": {"name": "sub", "arguments": {}}},
            {"role": "function", "content": "0"},
            {"role": "assistant", "content": "done", "tool_calls": None},
        ],
    }
    add = {"name": "add", "arguments": {"a": "ü"}}
    assert talk(row).tools == ({"name": "add"}, {"name": "sub"})
    assert turns(row) == (
        Turn("system", "calculate"),
        Turn("user", "hi"),
        Turn("assistant", "", calls=(add, add), call_ids=("1", "1")),
        Turn("tool", "2", call_ids=("1",)),
        Turn("assistant", "again", calls=({"name": "sub", "arguments": {}},)),
        Turn("tool", "0"),
        Turn("assistant", "done"),
    )


def test_conversations_of_sharegpt():
    row = {
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three"},
        ],
    }
    assert talk(row).tools == ({"name": "f"},)
    assert turns(row) == (
        Turn("user", "hi"),
        Turn("assistant", "", calls=({"name": "f", "arguments": {}},)),
        Turn("tool", "3"),
        Turn("assistant", "three"),
    )


def test_a_system_turn_beside_the_messages_is_read_and_an_empty_one_is_none():
    assert turns({"system": "S", "messages": [USER, ANSWER]})[0] == Turn("system", "S")
    assert turns({"messages": [{"role": "system", "content": " "}, USER, ANSWER], "tools": "[]"})[0].role == "user"


def test_a_system_turn_of_the_list_comes_before_the_field_beside_it_which_is_counted():
    found = talk({"system": "S", "messages": [{"role": "system", "content": "own"}, USER, ANSWER]})
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"] and found.turns[0].text == "own"
    assert found.remarks == {"field not used: system": 1}


def test_turns_without_roles_alternate():
    messages = [{"message": "你好"}, {"message": "嗯", "attrs": [{"name": "x"}]}, {"message": "?"}, {"message": "!"}]
    found = turns({"name": "x", "messages": messages})
    assert [(turn.role, turn.text) for turn in found] == [
        ("user", "你好"),
        ("assistant", "嗯"),
        ("user", "?"),
        ("assistant", "!"),
    ]


def test_reasoning_in_a_field_of_its_own_is_kept():
    assert turns({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]})[1].thinking == "hm"
    assert turns({"prompt": "a", "response": "b", "reasoning_content": "hm"})[1].thinking == "hm"


def test_turns_after_the_last_response_are_left_out_and_counted():
    row = {"messages": [USER, ANSWER, USER, USER]}
    found = conversation(row, Layout("messages", ("messages",)), "f:1")
    assert found.turns == (Turn("user", "hi"), Turn("assistant", "yes")) and found.remarks == {
        "turns after the last response, left out": 2
    }


def test_sft_field_names_prompt_and_response_or_the_messages():
    row = {"text": "no", "q": "one", "a": "two", "chat": [USER, ANSWER], "as_text": json.dumps([USER, ANSWER])}
    assert turns(row, ("q", "a")) == (Turn("user", "one"), Turn("assistant", "two"))
    expected = (Turn("user", "hi"), Turn("assistant", "yes"))
    assert turns(row, ("chat",)) == turns(row, ("as_text",)) == expected


def test_data_type_chooses_between_text_and_the_rest():
    row = {"text": "whole", "prompt": "one", "response": "two"}
    assert layout_of(row, (), "jsonl", "f:1").kind == "text"
    assert layout_of(row, (), "sft", "f:1").kind == "pair"


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        ({"text": "a", "prompt": "b", "response": "c"}, "text or prompt+response"),
        ({"text": "a", "messages": []}, "text or messages"),
        ({"messages": [], "conversations": []}, "messages or conversations"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "prompt+response or prompt+completion"),
        (
            {"instruction": "a", "output": "b", "question": "c", "answer": "d"},
            "instruction+output or instruction+answer or question+output or question+answer",
        ),
    ],
)
def test_fields_with_two_meanings_need_a_choice(row, choices):
    assert f"the fields could be {choices} (found: " in error(row) and "--sft_field" in error(row)


def test_unknown_fields_are_listed():
    assert "fields found: query, reply. Name prompt and response with --sft_field" in error({"query": "", "reply": ""})
    assert "no field 'q'; found: query, reply" in error({"query": "", "reply": ""}, "q", "reply")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": None, "response": "b"}, "field 'prompt' is null, expected a string"),
        ({"prompt": "b", "response": math.nan}, "field 'response' is not a number (NaN), expected a string"),
        ({"prompt": datetime(2026, 1, 2), "response": "b"}, "field 'prompt' is a datetime, expected a string"),
        ({"prompt": ["a"], "response": "b"}, "field 'prompt' is a list, expected a string: name one inside it with"),
        ({"question": "a", "answer": {"x.y": 1}}, "name one inside it with --sft_field, such as answer.x.y"),
        ({"prompt": "a", "response": " \n"}, "field 'response' is empty"),
        ({"text": ""}, "field 'text' is empty"),
        ({"prompt": "a", "response": "\ud800"}, "half of a surrogate pair at character 0"),
        ({"messages": []}, "no turn of the assistant in 'messages'"),
        ({"messages": [USER]}, "no turn of the assistant in 'messages'"),
        ({"messages": "hello"}, "field 'messages' is a string, expected a list of turns"),
        ({"messages": ["a", "b"]}, "field 'messages' is a list of other things"),
        ({"messages": [USER, {"role": "assistent", "content": "x"}]}, 'unknown role "assistent" (messages[1])'),
        ({"messages": [USER, {"role": ["user"], "content": "x"}]}, 'unknown role ["user"] (messages[1])'),
        ({"messages": [USER, {"content": "x"}]}, "no role (messages[1]); expected one of system"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty response (messages[1])"),
        ({"messages": [USER, {"role": "assistant"}]}, "a turn without text (messages[1])"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "content is null, expected a string (messages[0])"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a name (messages[1])"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "f"}]}, "tool_calls is a string, expected a list"),
        ({"conversations": [{"from": "gpt", "value": {}}]}, "value is an object, expected a string (conversations[0])"),
        ({"conversations": [{"from": "function_call", "value": ""}]}, "empty response (conversations[0])"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "field 'tools' is not valid JSON"),
        ({"instruction": "a", "output": "b", "input": [3]}, "field 'input' is a list, expected a string: name"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "not a pair (history[0])"),
        ({"instruction": "a", "output": "b", "history": [["x", ""]]}, "empty response (history[0])"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(row, expected):
    assert expected in error(row)


KEYS = "role from content value message tool_calls function name text type".split()
FIELDS = "messages conversations instruction input output history system tools text".split()
SCALARS = st.none() | st.booleans() | st.integers() | st.sampled_from(["user", "gpt", "", "x", "[]", "[{}]", "\ud800"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_row_is_either_read_or_refused(row):
    try:
        read = conversation(row, layout_of(row, (), "auto", "f:1"), "f:1")
    except UserError as found:
        assert str(found).startswith("f:1: ")
    else:
        assert read.document or read.turns[-1].role == "assistant"
        assert all(isinstance(turn.text, str) for turn in read.turns)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "responses"),
    [
        ("self-instruct/seed_tasks.json", "pair", 175, 175),
        ("llamafactory/glaive_toolcall_en_demo.json", "messages", 61, 157 + 44),
        ("fastchat/dummy_conversation.json", "messages", 150, None),
        ("kdconv/travel_dev.json", "messages", 26, None),
    ],
)
def test_data_of_others_is_read_whole(shared, name, kind, rows, responses):
    data = json.loads((shared / "data" / name).read_text(encoding="utf-8"))
    layout = layout_of(data[0], (), "auto", name)
    talks = [conversation(row, layout, f"{name}[{i}]") for i, row in enumerate(data)]
    assert (layout.kind, len(talks)) == (kind, rows)
    said = [turn for talk in talks for turn in talk.turns if turn.role == "assistant"]
    if responses:
        assert len(said) == responses and not any(UNANSWERED in talk.remarks for talk in talks)
    else:
        texts = [m.get("value", m.get("message")) for row in data for m in row[layout.fields[0]]]
        kept = [turn.text for talk in talks for turn in talk.turns]
        assert len(kept) + sum(talk.remarks.get(UNANSWERED, 0) for talk in talks) == len(texts)
        assert kept[:50] == texts[:50]
