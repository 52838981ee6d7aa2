"""Thinking in every spelling is one thing: `Turn.thinking`, with the visible text beside it."""

import pytest

from rwkv_bone.data.conversations.conversation import Turn, conversation, layout_of
from rwkv_bone.data.conversations.turns import EMPTY_THOUGHT, LATER_THOUGHT, LONE_END, TWO_FIELDS, TWO_THOUGHTS
from rwkv_bone.errors import UserError

USER = {"role": "user", "content": "3+4?"}
SAID = Turn("assistant", "It is 7.", thinking="Three\n\nand four.")


def read(row):
    return conversation(row, layout_of(row, (), "auto", "f:1"), "f:1")


def of_messages(content, **more):
    return read({"messages": [USER, {"role": "assistant", "content": content, **more}]})


def of_pair(response, **more):
    return read({"prompt": "3+4?", "response": response, **more})


@pytest.mark.parametrize("of", [of_messages, of_pair])
def test_all_spellings_of_thinking_are_one_thing(of):
    inline = ["<think>\nThree\n\nand four.\n</think>\n\nIt is 7.", " <think>Three\r\n\r\nand four.</think>It is 7."]
    for text in inline:
        found = of(text)
        assert found.turns[-1] == SAID and not found.remarks
    for name in ("thinking", "reasoning", "reasoning_content"):
        found = of("It is 7.", **{name: "\nThree\r\n\r\nand four.\n"})
        assert found.turns[-1] == SAID and not found.remarks
    lone = of("Three\n\nand four.\n</think>\n\nIt is 7.")
    assert lone.turns[-1] == SAID and lone.remarks == {LONE_END: 1}


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
@pytest.mark.parametrize("inner", ["Three\n\nand four.", [{"type": "text", "text": "Three\n\nand four."}]])
def test_parts_of_thinking_are_thinking(kind, inner):
    parts = [{"type": kind, kind: inner}, {"type": "text", "text": "It is"}, {"type": "text", "text": " 7."}]
    assert of_messages(parts).turns[-1] == SAID


@pytest.mark.parametrize("of", [of_messages, of_pair])
@pytest.mark.parametrize("text", ["<think>Other.</think>It is 7.", "Other.</think>\nIt is 7."])
def test_thinking_in_a_field_comes_before_that_in_the_text_and_the_other_is_counted(of, text):
    found = of(text, reasoning="Three\n\nand four.")
    assert found.turns[-1] == SAID and found.remarks[TWO_THOUGHTS] == 1
    same = of("<think>\nThree\nand   four.</think>It is 7.", reasoning="Three\n\nand four.")
    assert same.turns[-1] == SAID and not same.remarks


def test_of_two_fields_the_first_by_a_fixed_order_is_taken_and_the_other_counted():
    found = of_messages("It is 7.", thinking="Other.", reasoning_content="Three\n\nand four.")
    assert found.turns[-1] == SAID and found.remarks == {TWO_FIELDS: 1}
    equal = of_messages("It is 7.", reasoning="Three\n\nand four.", reasoning_content="Three\n\nand four.")
    assert equal.turns[-1] == SAID and not equal.remarks
    row = of_pair("It is 7.", thinking="Other.", reasoning_content="Three\n\nand four.")
    assert row.turns[-1] == SAID and row.remarks == {"field not used: thinking": 1}


def test_blocks_one_after_another_are_one_and_a_later_one_stays_text():
    found = of_messages("<think>Three</think>\n<think>\nand four.</think>It is 7.")
    assert found.turns[-1] == SAID and not found.remarks
    later = of_messages("<think>a</think>b <think>c</think> d")
    assert later.turns[-1] == Turn("assistant", "b <think>c</think> d", thinking="a")
    assert later.remarks == {LATER_THOUGHT: 1}
    first = of_messages("Look: <think>c</think> d")
    assert first.turns[-1] == Turn("assistant", "Look: <think>c</think> d") and first.remarks == {LATER_THOUGHT: 1}


def test_a_lone_end_before_a_later_block_ends_the_thinking():
    found = of_messages("a</think>b <think>c</think> d")
    assert found.turns[-1] == Turn("assistant", "b <think>c</think> d", thinking="a")
    assert found.remarks == {LONE_END: 1, LATER_THOUGHT: 1}


def test_an_empty_block_is_no_thinking_and_counted():
    found = of_messages("<think>\n\n</think>\n\nIt is 7.")
    assert found.turns[-1] == Turn("assistant", "It is 7.") and found.remarks == {EMPTY_THOUGHT: 1}


def test_the_first_visible_line_keeps_its_indentation():
    assert of_messages("<think>a</think>\n\n    if x:\n        y").turns[-1].text == "    if x:\n        y"
    assert of_messages("<think>a</think>  b\nc").turns[-1].text == "b\nc"


def test_only_responses_think():
    row = {
        "messages": [
            {"role": "user", "content": "<think>a</think>b", "reasoning": "c"},
            {"role": "assistant", "content": "d"},
        ]
    }
    found = read(row)
    assert found.turns[0] == Turn("user", "<think>a</think>b")
    assert found.remarks == {"field not used: messages[].reasoning": 1}


def test_thinking_before_a_call_needs_no_text():
    found = of_messages("<think>a</think>", tool_calls=[{"name": "f", "arguments": {}}])
    assert found.turns[-1] == Turn("assistant", "", thinking="a", calls=({"name": "f", "arguments": {}},))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<think>\nhm", "a response begins with <think> and has no </think>"),
        ("<think>a</think><think>b", "a response begins with <think> and has no </think>"),
        ("<think>\nhm\n</think>\n ", "a response with nothing after </think>"),
    ],
)
@pytest.mark.parametrize("of", [of_messages, of_pair])
def test_a_block_without_end_or_answer_is_refused(of, text, problem):
    with pytest.raises(UserError, match=f"^f:1: {problem}"):
        of(text)


def test_a_switch_under_a_name_of_thinking_is_no_thinking():
    assert of_messages("It is 7.", thinking=True).turns[-1].thinking == ""
    found = of_pair("It is 7.", reasoning={"effort": "high"})
    assert found.turns[-1].thinking == "" and found.remarks == {"field not used: reasoning": 1}
