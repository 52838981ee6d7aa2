"""Which turns of a list are trained, and how their calls are read."""

import pytest

from rwkv_bone.data.conversations.conversation import NOTHING_TRAINED, Turn, conversation, layout_of
from rwkv_bone.data.conversations.turns import CALLS_AS_TEXT, MASKED, WEIGHT_OF_OTHERS
from rwkv_bone.errors import UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def read(*messages, **more):
    row = {"messages": list(messages), **more}
    return conversation(row, layout_of(row, (), "auto", "f:1"), "f:1")


def error(*messages):
    with pytest.raises(UserError, match="^f:1: ") as caught:
        read(*messages)
    return str(caught.value)


OFF = [("weight", 0), ("weight", 0.0), ("train", False), ("trainable", False), ("training", "false"), ("loss", 0),
       ("loss", "0"), ("loss_weight", 0), ("loss_mask", 0), ("mask", True), ("masked", 1)]  # fmt: skip
ON = [("weight", 1), ("weight", 1.0), ("train", True), ("loss", "1"), ("loss_mask", 1), ("mask", False),
      ("masked", 0), ("weight", None)]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OFF)
def test_a_response_that_is_marked_as_not_trained_is_read_and_counted(key, value):
    found = read(USER, ANSWER | {key: value}, USER, ANSWER)
    assert [turn.trained for turn in found.turns if turn.role == "assistant"] == [False, True]
    assert found.remarks == {MASKED: 1}


@pytest.mark.parametrize(("key", "value"), ON)
def test_a_response_that_is_marked_as_trained_is(key, value):
    found = read(USER, ANSWER | {key: value})
    assert found.turns[-1].trained and not found.remarks


@pytest.mark.parametrize(
    ("marks", "problem"),
    [
        ({"weight": 0.5}, "weight 0.5 (messages[1]): a turn is trained or not, so expected 0 or 1"),
        ({"loss": "half"}, 'loss "half" (messages[1])'),
        ({"weight": 2}, "weight 2 (messages[1])"),
        ({"train": [True]}, "train [true] (messages[1])"),
        ({"mask": 1}, "mask 1 may mean trained or not (messages[1]): call it weight (1 = trained) or masked"),
        ({"weight": 1, "train": False}, "weight and train say different things (messages[1])"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail trains parts of a turn, which is not possible"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused_by_name(marks, problem):
    assert problem in error(USER, ANSWER | marks)


def test_a_weight_of_another_turn_than_the_assistants_is_said_if_it_asks_for_training():
    assert not read(USER | {"weight": 0, "train": False}, ANSWER).remarks
    found = read({"role": "system", "content": "s", "train": True}, USER | {"weight": 1}, ANSWER)
    assert found.remarks == {WEIGHT_OF_OTHERS: 2} and all(turn.trained for turn in found.turns)


def test_a_row_in_which_nothing_is_trained_is_counted():
    found = read(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 0})
    assert found.remarks == {MASKED: 2, NOTHING_TRAINED: 1}


def test_calls_are_parsed_with_their_ids_in_order():
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2.50]}'}},
        {"function": {"name": "now", "arguments": None}},
        {"id": 3, "name": "say", "arguments": "not {json"},
    ]
    found = read(
        USER,
        ANSWER | {"tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        {"role": "function", "content": 4.0, "name": "now"},
        ANSWER,
    )
    assert found.turns[1:4] == (
        Turn(
            "assistant",
            "yes",
            calls=(
                {"name": "add", "arguments": {"a": [1, 2.5]}},
                {"name": "now", "arguments": {}},
                {"name": "say", "arguments": "not {json"},
            ),
            call_ids=("c1", "", "3"),
        ),
        Turn("tool", "3", call_ids=("c1",), name="add"),
        Turn("tool", "4.0", name="now"),
    )
    assert not found.remarks


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f\ud800"},
        {"name": "f", "arguments": {"\udfff": 1}},
        {"name": "f", "arguments": '{"a": ["\\ud800"]}'},
        {"name": "f", "id": "\ud800"},
    ],
)
def test_half_of_a_surrogate_pair_in_a_call_or_a_tool_is_refused(call):
    with pytest.raises(UserError, match=r"a tool call \(messages\[1\]\) has half of a surrogate pair"):
        read(USER, ANSWER | {"tool_calls": [call]})
    with pytest.raises(UserError, match="field 'tools' has half of a surrogate pair"):
        read(USER, ANSWER, tools=[{"name": "f", "description": ["\ud800"]}])
    whole = {"name": "f", "arguments": '{"a": "\\ud83d\\ude00"}'}
    assert read(USER, ANSWER | {"tool_calls": [whole]}).turns[1].calls[0]["arguments"] == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "f", "arguments": "{\\"a\\": 1}"}]',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    ],
)
def test_a_turn_that_is_a_call_is_parsed(text):
    found = read(USER, {"role": "function_call", "content": text})
    assert found.turns[1] == Turn("assistant", "", calls=({"name": "f", "arguments": {"a": 1}},))
    two = read(
        USER,
        {
            "role": "function_call",
            "content": '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>',
        },
    )
    assert [call["name"] for call in two.turns[1].calls] == ["f", "g"]
    assert "a tool call that is not JSON (messages[1])" in error(USER, {"role": "function_call", "content": "f(1)"})


def test_calls_in_the_text_of_a_response_stay_there_and_are_counted():
    text = '<tool_call>\n{"name": "f"}\n</tool_call>'
    found = read(USER, {"role": "assistant", "content": text})
    assert found.turns[1] == Turn("assistant", text) and found.remarks == {CALLS_AS_TEXT: 1}


def test_calls_of_others_are_not_used_and_counted():
    found = read(USER | {"tool_calls": [{"name": "f"}]}, ANSWER)
    assert found.turns[0] == Turn("user", "hi") and found.remarks == {"field not used: messages[].tool_calls": 1}
    both = read(USER, ANSWER | {"tool_calls": [{"name": "f"}], "function_call": {"name": "g"}})
    assert [call["name"] for call in both.turns[1].calls] == ["f"]
    assert both.remarks == {"field not used: messages[].function_call": 1}


@pytest.mark.parametrize(
    "tools", [[{"name": "f"}], {"name": "f"}, '[{"name": "f"}]', ['{"name": "f"}'], '{"name": "f"}']
)
def test_tools_are_objects_or_json(tools):
    assert read(USER, ANSWER, tools=tools).tools == ({"name": "f"},)
    pair = {"prompt": "a", "response": "b", "tools": tools}
    assert conversation(pair, layout_of(pair, (), "auto", "f:1"), "f:1").tools == ({"name": "f"},)


@pytest.mark.parametrize("tools", ["hammer and saw", ["hammer"], "[1]"])
def test_tools_of_another_kind_are_refused_beside_messages_and_not_used_beside_a_pair(tools):
    with pytest.raises(UserError, match="f:1: field 'tools' is "):
        read(USER, ANSWER, tools=tools)
    pair = {"prompt": "a", "response": "b", "tools": tools}
    found = conversation(pair, layout_of(pair, (), "auto", "f:1"), "f:1")
    assert found.tools == () and found.remarks == {"field not used: tools": 1}
