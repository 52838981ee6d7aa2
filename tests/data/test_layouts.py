"""Fields are found under the names that people use, never guessed between two readings, and all unused ones counted."""

import pytest

from rwkv_bone.data.conversations.conversation import BAD_EXAMPLES, IN_PROMPT, Layout, Turn, conversation, layout_of
from rwkv_bone.data.conversations.preference import preference_layout
from rwkv_bone.data.conversations.remarks import unused
from rwkv_bone.data.load import load_dataset
from rwkv_bone.errors import UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
WORSE = {"role": "assistant", "content": "worse"}


def read(row, *sft_field, later=None):
    """The conversation of `later`, or of the row itself, by the layout of the row."""
    return conversation(later or row, layout_of(row, sft_field, "auto", "f:1"), "f:1")


def error(row, *sft_field, later=None, **more):
    with pytest.raises(UserError, match="^f:1: ") as caught:
        layout = layout_of(row, sft_field, "auto", "f:1", **more)
        conversation(later or row, layout, "f:1")
    return str(caught.value)


PAIRS = """prompt response|prompt completion|prompt output|prompt answer|question answer|question response
query response|query answer|problem solution|problem answer|instruction output|instruction response
instruction completion|input output|inputs targets|input target|human assistant|user assistant"""


@pytest.mark.parametrize("names", PAIRS.replace("\n", "|").split("|"))
@pytest.mark.parametrize("case", [str.lower, str.title, str.upper])
def test_usual_names_are_found_in_any_case(names, case):
    prompt, response = map(case, names.split())
    row = {"id": "7", prompt: "one", response: "two"}
    assert layout_of(row, (), "auto", "f:1") == Layout("pair", (prompt, response))
    found = read(row)
    assert found.turns == (Turn("user", "one"), Turn("assistant", "two")) and found.remarks == {unused("id"): 1}


@pytest.mark.parametrize("response", ["output", "response"])
@pytest.mark.parametrize("about", ["input", "context", "Context"])
def test_what_an_instruction_is_about_is_read_with_it(about, response):
    row = {"instruction": "sum up", about: "long", response: "short", "category": "x"}
    found = read(row)
    assert found.turns == (Turn("user", "sum up", material="long"), Turn("assistant", "short"))
    assert found.remarks == {unused("category"): 1}
    assert read({"question": "who?", "context": "c", "answer": "a"}).turns[0] == Turn("user", "who?", material="c")


def test_the_layout_says_what_is_read_beside_its_fields():
    row = {
        "system_prompt": "s",
        "question": "q",
        "context": "c",
        "answer": "a",
        "reasoning": "r",
        "thinking": 1,
        "tools": [],
    }
    assert str(layout_of(row, (), "auto", "f:1")) == "question and answer, with context, system_prompt, reasoning"
    assert str(layout_of({"text": "a", "system": "s"}, (), "auto", "f:1")) == "text"


def test_a_word_problem_in_two_fields_is_read_whole():
    row = {"Body": "4 rows of 13.", "Question": "How many?", "Answer": 52.0, "Type": "mul"}
    assert read(row).turns == (Turn("user", "4 rows of 13.\nHow many?"), Turn("assistant", "52.0"))


def test_a_system_text_beside_prompt_and_response_is_a_system_turn():
    for name in ("system", "system_prompt", "System"):
        row = {"id": "x", name: "be kind", "question": "q", "response": "r"}
        assert read(row).turns[0] == read(row, "question", "response").turns[0] == Turn("system", "be kind")
        assert read(row).remarks == {unused("id"): 1}
    assert [
        turn.role for turn in read({"system": "s", "question": "q", "answer": "a"}, "system+question", "answer").turns
    ] == [
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        ({"problem": "a", "solution": "b", "answer": "c"}, "problem+answer or problem+solution"),
        ({"Answer": "a", "answer": "b", "question": "c"}, "question+Answer or question+answer"),
        ({"instruction": "a", "output": "b", "conversations": [USER]}, "conversations or instruction+output"),
        ({"prompt": "a", "input": "b", "output": "c"}, "prompt+output or input+output"),
    ],
)
def test_two_readings_are_both_named(row, choices):
    found = error(row)
    assert f"the fields could be {choices} (found: " in found
    for choice in choices.split(" or "):
        assert f"--sft_field {choice.replace('+', ' ')}" in found


def test_several_fields_are_joined_by_a_line_break():
    row = {"a": "one", "b": 2, "c": "three", "r": "four", "s": True}
    assert read(row, "a+b+c", "r+s").turns == (Turn("user", "one\n2\nthree"), Turn("assistant", "four\ntrue"))
    assert not read(row, "a+b+c", "r+s").remarks
    assert read(row | {"b": " "}, "a+b+c", "r").turns[0].text == "one\nthree"


def test_one_of_several_fields_may_be_missing_or_null_in_a_later_row_and_is_counted():
    first = {"a": "one", "b": "two", "r": "x"}
    for later in ({"a": "one", "r": "x"}, {"a": "one", "b": None, "r": "x"}):
        found = read(first, "a+b", "r", later=later)
        assert found.turns[0].text == "one"
        assert found.remarks == {"rows without the field 'b', which is one of several in --sft_field": 1}
    assert "no field 'b'; found: a, r" in error({"a": "one", "r": "x"}, "b+c", "r")
    assert "no field 'a'" in error(first, "a+b", "r", later={"r": "x"})


def test_one_of_several_fields_that_no_row_has_is_refused(write_jsonl, config):
    rows = [{"a": "one", "r": "x"}, {"a": "two", "b": None, "r": "y"}]
    with pytest.raises(UserError, match=r"jsonl: --sft_field names the field 'b', which no row has: correct it"):
        load_dataset(config(write_jsonl(*rows), sft_field=("a+b", "r")), 256)
    data = load_dataset(config(write_jsonl(*rows, {"a": "three", "b": "4", "r": "z"}), sft_field=("a+b", "r")), 256)
    assert any(
        "2 rows without the field 'b', which is one of several in --sft_field" in line for line in data.note_lines()
    )


def test_what_is_null_in_the_first_row_is_not_a_second_reading():
    row = {"text": None, "prompt": "a", "response": "b", "completion": None, "messages": None}
    assert layout_of(row, (), "auto", "f:1") == Layout("pair", ("prompt", "response"))


def test_a_dotted_path_goes_into_objects_and_lists():
    row = {"d": {"q": {"text": "one"}, "a": ["two", "three"]}, "id": "i"}
    found = read(row, "d.q.text", "d.a.0")
    assert found.turns == (Turn("user", "one"), Turn("assistant", "two"))
    assert found.remarks == {unused("d.a.1"): 1, unused("id"): 1}
    assert read({"d": {"m": [USER, ANSWER]}}, "d.m").turns == (Turn("user", "hi"), Turn("assistant", "yes"))
    assert "no field 'd.x'; found: d" in error({"d": {"q": "a"}, "r": "b"} | {"d": {"q": "a"}}, "d.x", "d.q")


def test_a_field_whose_own_name_has_a_dot_or_a_plus_comes_first():
    row = {"a.b": "dot", "a": {"b": "inner"}, "c+d": "plus", "c": "x", "d": "y"}
    assert read(row, "a.b", "c+d").turns == (Turn("user", "dot"), Turn("assistant", "plus"))
    assert read({"a": {"b.c": "deep"}, "r": "x"}, "a.b.c", "r").turns[0].text == "deep"


def test_the_names_to_keep_are_all_that_is_read():
    row = {"a.b": "1", "a": {"b": "2"}, "c": "3", "r": "4"}
    layout = layout_of(row, ("a.b+c", "r"), "auto", "f:1")
    assert {"a.b", "a", "c", "r", "system", "tools", "history", "reasoning"} <= layout.names
    assert "input" not in layout.names and "input" in layout_of({"prompt": "", "response": ""}, (), "auto", "f").names
    assert layout_of({"text": ""}, (), "auto", "f:1").names == {"text"}


def test_every_field_that_says_something_and_is_not_read_is_counted():
    row = {
        "instruction": "a", "input": "material", "response": "b", "meta": {"source": "x"}, "tags": ["t"], "url": "u",
        "score": 3, "ok": True, "empty": " ", "nothing": None, "none": [], "weight": 0.5,
    }  # fmt: skip
    expected = dict.fromkeys(map(unused, ("input", "meta", "tags", "url", "weight")), 1)
    assert read(row, "instruction", "response").remarks == expected
    del expected[unused("input")]
    assert read(row).remarks == expected
    assert read({"text": "a", "title": "b"}).remarks == {unused("title"): 1}
    assert read({"messages": [USER, ANSWER | {"note": "n", "n": 1, "no": None}], "id": "i"}).remarks == {
        unused("messages[].note"): 1,
        unused("messages[].n"): 1,
        unused("id"): 1,
    }


def test_a_prompt_and_a_completion_may_be_lists_of_turns():
    row = {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [ANSWER], "tools": [{"name": "f"}]}
    found = read(row)
    assert found.turns == (Turn("system", "s"), Turn("user", "hi"), Turn("assistant", "yes"))
    assert found.tools == ({"name": "f"},) and not found.remarks
    assert read({"prompt": [USER], "completion": "yes"}).turns == found.turns[1:]
    assert read({"p": "hi", "c": [ANSWER]}, "p", "c").turns == found.turns[1:]
    talk = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [turn.trained for turn in talk.turns if turn.role == "assistant"] == [False, True]
    assert talk.remarks == {IN_PROMPT: 1}
    assert "no turn of the assistant in 'completion'" in error({"prompt": [USER], "completion": [USER]})


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt chosen"),
        ({"Question": "a", "Chosen": "b", "Rejected": "c"}, "Question Chosen"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, "prompt chosen"),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "messages": [USER]}, "chosen"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "chosen"),
        ({"prompt": "a", "completion": "b", "label": True}, "prompt completion"),
        ({"prompt": [USER], "completion": [ANSWER], "label": False}, "prompt completion"),
    ],
)
def test_preference_data_says_what_it_is_and_the_advice_works(row, advice):
    found = error(row)
    assert "preference data" in found and f"--sft_field {advice}" in found
    task = "kto" if "label" in row else "dpo"
    assert f"train.py --task {task}" in found and preference_layout(row, (), task, "f:1").compares
    turns = read(row, *advice.split()).turns
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[1].text in ("b", "yes")


def test_bad_examples_of_preference_data_are_counted_when_they_are_trained():
    row = {"prompt": "a", "completion": "b", "label": False}
    assert read(row, "prompt", "completion").remarks == {BAD_EXAMPLES: 1}
    assert not read(row | {"label": True}, "prompt", "completion").remarks


def test_one_name_is_of_messages_or_of_a_documents_text():
    assert layout_of({"content": "all of it"}, ("content",), "auto", "f:1") == Layout("text", ("content",))
    assert read({"content": "all of it"}, "content").document == "all of it"
    assert layout_of({"chat": " [..."}, ("chat",), "auto", "f:1").kind == "messages"


def test_names_of_another_file_fall_back_to_usual_names_only_where_that_is_asked_for():
    row = {"prompt": "a", "response": "b"}
    layout = layout_of(row, ("question", "answer"), "auto", "f:1", or_usual=True)
    assert layout == Layout("pair", ("prompt", "response")) and layout.instead
    assert not layout_of(row, ("response", "prompt"), "auto", "f:1", or_usual=True).instead
    assert "no field 'question'; found: prompt, response" in error(row, "question", "answer")
    assert "no field 'q'; found: x. Name the fields with --eval_field" in error(
        {"x": "1"}, "q", "a", flag="--eval_field", or_usual=True
    )


@pytest.mark.parametrize("flag", ["--sft_field", "--eval_field", "--dataset_field"])
@pytest.mark.parametrize(
    "row",
    [
        {"q": "a", "r": "b"},
        {"prompt": "a", "response": "b", "answer": "c"},
        {"chosen": "a", "rejected": "b", "prompt": "c"},
        {"prompt": "a", "completion": "b", "label": True},
        {"question": "a", "answer": {"text": "b"}},
    ],
)
def test_messages_advise_the_flag_that_names_the_fields_of_this_file(row, flag):
    found = error(row, flag=flag)
    assert flag in found and (flag == "--sft_field" or "--sft_field" not in found)
