"""Templates write what the models know, and the ids of a prompt are those that were trained."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data.conversations.conversation import Conversation, Turn
from rwkv_bone.data.masks import encode
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.templates.segments import Segment
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError

BUILT_IN = ("world", "g1", "g1-think", "alpaca")
CHAT = Conversation(
    "f:1",
    (
        Turn("system", "Be kind."),
        Turn("user", "hi"),
        Turn("assistant", "Hello."),
        Turn("user", "sum up", material="a\n\nb"),
        Turn("assistant", "c\r\n\r\n  d", thinking="first\n\nsecond"),
    ),
)
ANSWER = Turn("assistant", "b")


def talk(*texts: str) -> Conversation:
    return Conversation("f:1", tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


def texts(name: str, conversation: Conversation) -> list[str]:
    segments = load_template(name, "").render(conversation)
    assert [segment.role for segment in segments] == ["prompt", "response"] * (len(segments) // 2)
    return [segment.text for segment in segments]


def test_raw_writes_prompt_and_response_as_they_are():
    assert texts("raw", talk(" a\n\nb ", "c\n")) == [" a\n\nb ", "c\n"]


@pytest.mark.parametrize("conversation", [CHAT, talk("a", "b", "c", "d"), Conversation("f:1", (ANSWER,))])
def test_raw_has_no_marks_for_turns_and_says_so(conversation):
    with pytest.raises(UserError, match="f:1: --template raw writes one prompt and one response.*--template world"):
        load_template("raw", "").render(conversation)


def test_world_writes_turns_that_end_with_a_blank_line_and_have_none_inside():
    assert texts("world", CHAT) == [
        "System: Be kind.\n\nUser: hi\n\nAssistant:",
        " Hello.\n\n",
        "User: sum up\na\nb\n\nAssistant:",
        " <think>\nfirst\n\nsecond\n</think>\nc\n  d",
    ]


def test_g1_writes_an_empty_think_block_and_leaves_thinking_out():
    assert texts("g1", CHAT) == [
        "System: Be kind.\n\nUser: hi\n\nAssistant: <think>\n</think",
        ">\nHello.\n\n",
        "User: sum up\na\nb\n\nAssistant: <think>\n</think",
        ">\nc\n  d",
    ]


def test_g1_think_writes_the_thinking_with_its_blank_lines():
    assert texts("g1-think", CHAT) == [
        "System: Be kind.\n\nUser: hi\n\nAssistant: <think",
        ">\n</think>\nHello.\n\n",
        "User: sum up\na\nb\n\nAssistant: <think",
        ">\nfirst\n\nsecond\n</think>\nc\n  d",
    ]


THOUGHT = Conversation("f:1", (Turn("user", "3+4?"), Turn("assistant", "7.", thinking=" three\r\n\r\nfour\n")))


@pytest.mark.parametrize("name", ["raw", *BUILT_IN])
def test_a_response_that_thinks_has_one_think_block_in_every_template(name):
    whole = "".join(texts(name, THOUGHT))
    inside = "" if name == "g1" else "three\n\nfour\n"
    assert whole.endswith(f"<think>\n{inside}</think>\n7.") and whole.count("think>") == 2
    left_out = "responses whose thinking is left out (g1-think writes it), since there is an empty think block in"
    assert load_template(name, "").remarks(THOUGHT) == ({f"{left_out} --template g1": 1} if name == "g1" else {})


def remarks(name: str, *turns: Turn) -> dict[str, int]:
    return dict(load_template(name, "").remarks(Conversation("f:1", turns)))


def like_turns(name: str, marks: str) -> str:
    return (
        f"turns with a line that begins with {marks} (trained as part of the turn, but a program that stops there "
        f"would cut it), as turns do in --template {name}"
    )


@pytest.mark.parametrize("name", ["world", "g1", "g1-think"])
def test_blank_lines_that_go_are_counted(name):
    blank = f"turns whose blank lines became single line breaks, since a blank line ends a turn in --template {name}"
    assert remarks(name, Turn("user", "\n\na\nb\r\nc\n\n"), Turn("assistant", "\n\na\r\n")) == {}
    broken = Turn("user", "a\n \nb", material="c\r\n\r\nd")
    assert remarks(name, broken, Turn("assistant", "a\n\nb"), Turn("tool", "a\n\nb"), ANSWER) == {blank: 3}
    assert remarks(name, Turn("user", "a", material="b\n\nc"), ANSWER) == {blank: 1}
    assert remarks(name, Turn("user", "a"), Turn("assistant", "b", thinking="c\n\nd")).get(blank) is None


@pytest.mark.parametrize("name", ["world", "g1", "g1-think"])
def test_lines_that_look_like_a_turn_are_counted(name):
    marked = like_turns(name, "User:, Assistant: or System:")
    assert remarks(name, Turn("user", "a User: b"), Turn("assistant", "The User: b")) == {}
    assert remarks(name, Turn("user", "User: a"), Turn("assistant", "b\n System: c")) == {marked: 2}
    assert remarks(name, Turn("user", "a", material="Assistant:"), ANSWER) == {marked: 1}
    assert remarks(name, Turn("user", "a\n\nAssistant: b"), ANSWER)[marked] == 1
    assert (marked in remarks(name, ANSWER, Turn("assistant", "b", thinking="c\n\nUser: d"))) == (name != "g1")
    assert remarks("alpaca", Turn("user", "a\n### Response: b"), ANSWER) == {
        like_turns("alpaca", "### Instruction:, ### Input: or ### Response:"): 1
    }


def test_an_indentation_that_goes_is_counted():
    lost = "responses whose first line lost its indentation, since white space around a turn goes in --template world"
    for text, count in (("\n    return x\n  y", 1), ("\treturn", 1), (" Hello", 0), ("a\n    b", 0), ("\n\nb", 0)):
        assert remarks("world", Turn("user", "    a"), Turn("assistant", text)).get(lost, 0) == count


def test_texts_that_are_written_as_they_are_have_no_remarks():
    for name in ("raw", "alpaca"):
        assert load_template(name, "").remarks(talk("User: a\n\nb", "  c\n\nUser: d")) == {}
    for name in ("raw", *BUILT_IN):
        assert load_template(name, "").remarks(Conversation("f:1", document="User: a\n\nb")) == {}


def test_a_response_that_is_not_to_be_trained_is_written_and_masked(tmp_path):
    file = write(tmp_path, "{prompt}>{response}.")
    for name in (*BUILT_IN, file):
        both = [talk("a", "b", "c", "d"), talk("a", "b", "c", "d")]
        both[1] = replace(both[1], turns=tuple(replace(turn, trained=turn.text != "b") for turn in both[1].turns))
        trained, masked = (load_template(name, "").render(one) for one in both)
        assert [segment.text for segment in trained] == [segment.text for segment in masked]
        assert [segment.role for segment in masked] == ["prompt", "masked", "prompt", "response"]
    only = Conversation("f:1", (Turn("user", "a"), replace(ANSWER, trained=False)))
    assert [segment.role for segment in load_template("raw", "").render(only)] == ["prompt", "masked"]


def test_alpaca_writes_instruction_and_input_under_headings():
    task, request = "Below is an instruction that describes a task", "appropriately completes the request."
    assert texts("alpaca", talk("a", "b")) == [
        f"{task}. Write a response that {request}\n\n### Instruction:\na\n\n### Response:",
        "b",
    ]
    task += ", paired with an input that provides further context"
    assert texts("alpaca", Conversation("f:1", (Turn("user", "a", material="m"), ANSWER))) == [
        f"{task}. Write a response that {request}\n\n### Instruction:\na\n\n### Input:\nm\n\n### Response:",
        "b",
    ]
    assert texts("alpaca", CHAT) == [
        "Be kind.\n\n### Instruction:\nhi\n\n### Response:",
        "Hello.\n\n",
        "### Instruction:\nsum up\n\n### Input:\na\n\nb\n\n### Response:",
        "<think>\nfirst\n\nsecond\n</think>\nc\r\n\r\n  d",
    ]


def test_a_system_turn_may_stand_anywhere():
    turns = (Turn("user", "a"), ANSWER, Turn("system", "be brief"), Turn("user", "c"), ANSWER)
    between = "System: be brief\n\nUser: c\n\nAssistant:"
    assert texts("world", Conversation("f:1", turns)) == ["User: a\n\nAssistant:", " b\n\n", between, " b"]
    assert texts("alpaca", Conversation("f:1", turns))[2] == "be brief\n\n### Instruction:\nc\n\n### Response:"


@pytest.mark.parametrize("line", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_other_line_separators_are_text(line):
    assert texts("world", talk(f"a{line}b", f"c{line}{line}d"))[1] == f" c{line}{line}d"
    assert texts("world", talk("a", f"c\n{line}\nd"))[1] == " c\nd"  # seen as a blank line, it would end the turn


def test_an_empty_prompt_leaves_no_space_behind():
    assert texts("world", talk("", "b")) == ["User:\n\nAssistant:", " b"]


def test_a_document_is_written_as_it_is():
    document = Conversation("f:1", document="User: a\n\n\nb ")
    for name in ("raw", *BUILT_IN):
        assert load_template(name, "").render(document) == [Segment("User: a\n\n\nb ", "document")]


def test_auto_is_world_for_the_world_tokenizer_and_raw_for_others():
    assert load_template("auto", "world").name == "world"
    assert load_template("auto", "bytes").name == load_template("auto", "/x/tokenizer.json").name == "raw"


# Ids checked by hand against rwkv_vocab_v20230424: 24281 "User", 59 ":", 4571 " hi", 261 "\n\n", 5585 "Ass",
# 41693 "istant", 36786 " Hello", 47 ".", 295 " <", 35762 "think", 63 ">", 11 "\n", 754 "</", 33155 "Hello", 355 " x".
@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        ("world", [24281, 59, 4571, 261, 5585, 41693, 59], [36786, 47, 0]),
        ("g1", [24281, 59, 4571, 261, 5585, 41693, 59, 295, 35762, 63, 11, 754, 35762], [63, 11, 33155, 47, 0]),
        (
            "g1-think",
            [24281, 59, 4571, 261, 5585, 41693, 59, 295, 35762],
            [63, 11, 754, 35762, 63, 11, 33155, 47, 0],
        ),
    ],
)
def test_ids_and_targets_of_a_single_turn_are_these(name, prompt, response):
    segments = load_template(name, "world").render(talk("hi", "Hello."))
    ids, trained = encode(segments, load_tokenizer("world", 65536), "response")
    assert ids.tolist() == prompt + response
    assert trained.tolist() == [False] * len(prompt) + [True] * len(response)


def test_ids_and_targets_of_several_turns_are_these():
    tokenizer = load_tokenizer("world", 65536)
    ids, trained = encode(load_template("world", "world").render(talk("hi", "Hello.", "x", "x")), tokenizer, "response")
    first, second = [24281, 59, 4571, 261, 5585, 41693, 59], [24281, 59, 355, 261, 5585, 41693, 59]
    assert ids.tolist() == [*first, 36786, 47, 261, *second, 355, 0]
    assert trained.tolist() == [False] * 7 + [True] * 3 + [False] * 7 + [True] * 2


def test_the_independent_tokenizer_of_the_rwkv_package_gives_the_same_ids():
    package = pytest.importorskip("rwkv.rwkv_tokenizer")
    trie = package.TRIE_TOKENIZER(package.__file__.replace("rwkv_tokenizer.py", "rwkv_vocab_v20230424.txt"))
    for name in BUILT_IN:
        segments = load_template(name, "world").render(CHAT)
        ids, _ = encode(segments, load_tokenizer("world", 65536), "response")
        assert ids.tolist() == trie.encode("".join(segment.text for segment in segments)) + [0]


MARKS = ["User:", "Assistant:", "System: x", "<think>", "</think>"]
SPACES = ["\n", "\n\n", "\r\n", " ", "\t"]
NASTY = st.lists(
    st.sampled_from([*MARKS, *SPACES, "x", "é", "你好", "。"]) | st.characters(exclude_categories=["Cs"]), max_size=8
).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(BUILT_IN[:2]), st.lists(st.tuples(NASTY, NASTY.map("a{}".format)), min_size=1, max_size=3))
def test_whatever_the_turns_hold_a_prompt_has_the_ids_it_was_trained_with(name, pairs):
    tokenizer, template = load_tokenizer("world", 65536), load_template(name, "world")
    conversation = talk(*(text for pair in pairs for text in pair))
    segments = template.render(conversation)
    ids, trained = encode(segments, tokenizer, "response")

    prompt = tokenizer.encode(template.prompt(conversation))
    assert ids[: len(prompt)].tolist() == prompt and trained[len(prompt) :].all()
    assert tokenizer.encode(template.response(conversation)) + [0] == ids[len(prompt) :].tolist()

    # As many turns can be read off the text as there are: what a turn holds never looks like another turn.
    text = "".join(segment.text for segment in segments)
    assert text.count("\n\n") == 2 * len(pairs) - 1
    assert [part.split(":")[0] for part in text.split("\n\n")] == ["User", "Assistant"] * len(pairs)


def write(folder: Path, text: str, name: str = "mine.txt") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_format_file_says_what_stands_around_prompt_and_response(tmp_path):
    name = write(tmp_path, "<q>{prompt}</q>\n{keep}<a>{response}</a>\n")
    assert texts(name, talk("a\n\n{response}", "b", "c", "d")) == [
        "<q>a\n\n{response}</q>\n{keep}<a>",
        "b</a>",
        "<q>c</q>\n{keep}<a>",
        "d</a>",
    ]
    with pytest.raises(UserError, match="f:1: the format of --template .* found system, user.*Jinja"):
        texts(name, CHAT)


@pytest.mark.parametrize("text", ["", "P", "RP", "PPR", "PRR", "RPR"])
def test_a_format_file_has_each_place_once_and_in_order(tmp_path, text):
    name = write(tmp_path, text.replace("P", "{prompt}").replace("R", "{response}"))
    with pytest.raises(UserError, match=r"mine.txt: expected \{prompt\} and, after it, \{response\}, each exactly"):
        load_template(name, "world")


def test_an_unknown_template_is_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(UserError, match="--template wrld: expected auto, raw, alpaca, world, g1, g1-think, or"):
        load_template("wrld", "world")
    (tmp_path / "bad").write_bytes(b"\xff{prompt}{response}")
    with pytest.raises(UserError, match="--template .*bad: cannot be read"):
        load_template(str(tmp_path / "bad"), "world")


def test_the_identity_follows_the_texts_and_not_the_path(tmp_path):
    a, b = write(tmp_path, "{prompt}:{response}", "a"), write(tmp_path, "{prompt}:{response}", "b")
    c, d = write(tmp_path, "{prompt}:{response}|", "c"), write(tmp_path, "{{ messages }}", "d")
    e = write(tmp_path, "{{ messages }}.", "e")
    names = {name: load_template(name, "world").identity() for name in (a, b, c, d, e, "raw", *BUILT_IN)}
    assert names[a] == names[b] and len(set(names.values())) == len(names) - 1


def test_prompt_and_response_are_the_last_of_the_conversation():
    template = load_template("world", "world")
    assert template.prompt(CHAT).endswith("Hello.\n\nUser: sum up\na\nb\n\nAssistant:")
    assert template.response(CHAT).endswith("</think>\nc\n  d")
    assert template.prompt(talk("a", "b")) == "User: a\n\nAssistant:"


def test_prompt_and_response_are_those_of_the_last_response_that_is_trained():
    turns = talk("a", "b", "c", "d").turns
    template = load_template("world", "world")
    masked = Conversation("f:1", (*turns[:3], replace(turns[3], trained=False)))
    assert (template.prompt(masked), template.response(masked)) == ("User: a\n\nAssistant:", " b")
    masked = Conversation("f:1", (turns[0], replace(turns[1], trained=False), *turns[2:]))
    assert template.prompt(masked) == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert template.response(masked) == " d"
