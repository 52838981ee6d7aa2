"""Rows of preference data in the forms that people publish become one prompt and its answers."""

import json

import pytest

from rwkv_bone.config import DataConfig
from rwkv_bone.data.conversations.conversation import UNANSWERED, Turn
from rwkv_bone.data.conversations.preference import EARLIER, answers_of, preference_layout
from rwkv_bone.data.conversations.remarks import unused
from rwkv_bone.data.conversations.turns import EMPTY_THOUGHT, MASKED
from rwkv_bone.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


GOOD, POOR = assistant("The Elbe."), assistant("Mount Elbrus.")
ASKED, TOLD, WRONG = Turn("user", "Name a river."), Turn("assistant", "The Elbe."), Turn("assistant", "Mount Elbrus.")
TALK = [user("Hello"), assistant("Hi!"), user("Name a river.")]


def read(row, *names, task="dpo", later=None):
    """The answers of `later`, or of the row itself, by the layout of the row."""
    return answers_of(later or row, preference_layout(row, names, task, "f:1"), "f:1")


def error(row, *names, **more):
    with pytest.raises(UserError, match="^f:1: ") as caught:
        read(row, *names, **more)
    return str(caught.value)


# In the shapes of well-known sets: TRL's explicit form, as texts and as turns; Orca's pairs; UltraFeedback, whose lists
# hold the prompt too, with scores; TRL's implicit form; LLaMA-Factory's, with one turn each, and its Alpaca form; HH;
# the prompts of HH that others have cut out; OpenAI's; answers in a table of text.
HH = "\n\nHuman: Name a river.\n\nAssistant: {}"
FORMS = {
    "texts": {"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "Mount Elbrus."},
    "turns": {"prompt": [user("Name a river.")], "chosen": [GOOD], "rejected": [POOR]},
    "text and turns": {"prompt": "Name a river.", "chosen": [GOOD], "rejected": [POOR]},
    "Orca": {"question": "Name a river.", "chosen": "The Elbe.", "rejected": "Mount Elbrus.", "system": ""},
    "UltraFeedback": {
        "prompt": "Name a river.",
        "chosen": [user("Name a river."), GOOD],
        "rejected": [user("Name a river."), POOR],
    },
    "mix": {
        "prompt": "Name a river.",
        "question": "Which?",
        "chosen": [user("Name a river."), GOOD],
        "rejected": [user("Name a river."), POOR],
    },
    "implicit": {"chosen": [user("Name a river."), GOOD], "rejected": [user("Name a river."), POOR]},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Name a river."}],
        "chosen": {"from": "gpt", "value": "The Elbe."},
        "rejected": {"from": "gpt", "value": "Mount Elbrus."},
    },
    "Alpaca": {"instruction": "Name a river.", "input": "", "chosen": "The Elbe.", "rejected": "Mount Elbrus."},
    "HH": {"chosen": HH.format("The Elbe."), "rejected": HH.format("Mount Elbrus.")},
    "HH with a prompt": {"prompt": HH.format("").rstrip(), "chosen": " The Elbe.", "rejected": " Mount Elbrus."},
    "OpenAI": {
        "input": {"messages": [user("Name a river.")], "tools": []},
        "preferred_output": [GOOD],
        "non_preferred_output": [POOR],
    },
    "JSON": {
        "prompt": "Name a river.",
        "chosen": json.dumps([user("Name a river."), GOOD]),
        "rejected": json.dumps([user("Name a river."), POOR]),
    },
    "a turn without a role": {
        "prompt": "Name a river.",
        "chosen": {"content": "The Elbe."},
        "rejected": {"content": "Mount Elbrus."},
    },
    "upper case": {"Prompt": "Name a river.", "Chosen": "The Elbe.", "Rejected": "Mount Elbrus."},
    "other names": {"Query": "Name a river.", "chosen_response": "The Elbe.", "rejected_response": "Mount Elbrus."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_is_a_prompt_with_a_chosen_and_a_rejected_answer(form):
    chosen, rejected = read(FORMS[form])
    for answer, said, good in ((chosen, TOLD, True), (rejected, WRONG, False)):
        turns = [Turn(turn.role, turn.text.strip(), trained=turn.trained) for turn in answer.conversation.turns]
        assert turns == [ASKED, said]
        assert (answer.prompt, answer.good) == (1, good)


def test_only_fields_that_say_nothing_of_the_answers_are_counted_as_not_used():
    row = FORMS["UltraFeedback"] | {"prompt_id": "7", "messages": [user("Name a river."), GOOD], "score_chosen": 8.5}
    chosen, rejected = read(row)
    assert chosen.conversation.remarks == {unused("prompt_id"): 1, unused("messages"): 1}
    assert not rejected.conversation.remarks
    assert read(FORMS["mix"])[0].conversation.remarks == {unused("question"): 1}
    assert read(FORMS["texts"] | {"reasoning": "why"})[0].conversation.remarks == {unused("reasoning"): 1}


def test_what_is_beside_the_answers_belongs_to_both():
    tool = {"name": "map"}
    row = FORMS["texts"] | {"system": "be brief", "history": [["Hello", "Hi!"]], "tools": [tool], "context": "maps"}
    for answer in read(row):
        roles = [turn.role for turn in answer.conversation.turns]
        assert roles == ["system", "user", "assistant", "user", "assistant"] and answer.prompt == 4
        assert answer.conversation.tools == (tool,) and answer.conversation.turns[3].material == "maps"
    layout = preference_layout(row, (), "dpo", "f:1")
    assert str(layout) == "prompt, chosen and rejected, with context, system, history, tools"
    assert layout.names >= {"prompt", "chosen", "rejected", "system", "tools"}
    # Which of two answers a thought led to is not known; a list of turns has no context.
    assert str(preference_layout(FORMS["texts"] | {"reasoning": "why"}, (), "dpo", "f:1")) == (
        "prompt, chosen and rejected"
    )
    assert str(preference_layout(FORMS["OpenAI"], (), "dpo", "f:1")) == (
        "input.messages, preferred_output and non_preferred_output"
    )


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": TALK, "chosen": [GOOD], "rejected": [POOR]}, ()),
        ({"chosen": [*TALK, GOOD], "rejected": [*TALK, POOR]}, ()),
        ({"prompt": TALK, "chosen": [*TALK, GOOD], "rejected": [*TALK, POOR]}, ()),
        ({"prompt": "Name a river.", "chosen": [*TALK, GOOD], "rejected": [*TALK, POOR]}, ()),
        ({"a": [*TALK, GOOD], "b": [*TALK, POOR]}, ("a", "b")),
        (
            {name: f"\n\nHuman: Hello\n\nAssistant: Hi!{HH.format(text)}" for name, text in (("a", "x"), ("b", "y"))},
            ("a", "b"),
        ),
    ],
)
def test_turns_that_both_answers_come_after_are_the_prompt_and_not_trained(row, names):
    for answer in read(row, *names):
        assert [turn.trained for turn in answer.conversation.turns] == [True, False, True, True]
        assert answer.prompt == 3
    assert read(row, *names)[0].conversation.remarks == {EARLIER: 1}


def test_an_answer_may_be_several_turns_and_one_conversation_longer_than_the_other():
    first, second = assistant("Which land?"), assistant("There are many.")
    more = [first, user("Germany"), GOOD]
    chosen, rejected = read({"prompt": "Name a river.", "chosen": more, "rejected": [second]})
    assert (chosen.prompt, len(chosen.conversation.turns), len(rejected.conversation.turns)) == (1, 4, 2)
    # What both say first is part of the prompt, as long as each has an answer after it.
    chosen, rejected = read({"prompt": "Name a river.", "chosen": more, "rejected": [*more[:2], POOR]})
    assert chosen.prompt == rejected.prompt == 3
    chosen, rejected = read({"prompt": "Name a river.", "chosen": more, "rejected": [first]})
    assert chosen.prompt == 1 and [turn.trained for turn in chosen.conversation.turns] == [True] * 4
    chosen, rejected = read({"prompt": "Name a river.", "chosen": [GOOD], "rejected": [GOOD]})
    assert chosen.prompt == 1 and chosen.conversation.turns == rejected.conversation.turns


def test_remarks_on_turns_that_both_conversations_hold_are_counted_once():
    shared = [user("a"), assistant("<think></think>b"), user("c")]
    ends = [assistant("<think></think>d"), assistant("<think></think>e")]
    first, _ = read({"chosen": [*shared, ends[0], user("bye")], "rejected": [*shared, ends[1]]})
    assert first.conversation.remarks == {EMPTY_THOUGHT: 3, EARLIER: 1, UNANSWERED: 1}
    first, _ = read({"chosen": [*shared, GOOD], "rejected": [*shared, POOR]})
    assert first.conversation.remarks == {EMPTY_THOUGHT: 1, EARLIER: 1}


def test_a_turn_of_an_answer_that_is_not_to_be_trained_is_read_only():
    chosen, _ = read({"prompt": "a", "chosen": [assistant("b", weight=0), user("c"), GOOD], "rejected": [POOR]})
    assert [turn.trained for turn in chosen.conversation.turns] == [True, False, True, True]
    assert chosen.prompt == 1 and chosen.conversation.remarks == {MASKED: 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, True),
        ({"prompt": "a", "completion": "b", "label": 0}, False),
        ({"prompt": "a", "completion": "b", "label": 1.0}, True),
        ({"prompt": "a", "response": "b", "Label": " False "}, False),
        ({"prompt": [user("a")], "completion": [assistant("b")], "label": "good", "rating": 4.5}, True),
        ({"messages": [user("a"), assistant("b")], "label": "bad"}, False),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": True}, True),
        ({"prompt": "a", "completion": [user("a"), assistant("b")], "desirable": "1"}, True),
    ],
)
def test_a_row_with_a_label_is_one_answer_that_is_good_or_bad(row, expected):
    (answer,) = read(row, task="kto")
    assert answer.good is expected and answer.prompt == 1
    assert answer.conversation.turns == (Turn("user", "a"), Turn("assistant", "b"))
    assert not answer.conversation.remarks


def test_a_label_is_about_the_last_response_of_a_chat():
    (answer,) = read({"messages": [*TALK, GOOD], "label": False}, task="kto")
    assert [turn.trained for turn in answer.conversation.turns] == [True, False, True, True]
    assert answer.prompt == 3 and answer.conversation.remarks == {EARLIER: 1}
    (answer,) = read({"prompt": "a", "completion": [GOOD, user("b"), POOR], "label": True}, task="kto")
    assert answer.prompt == 1 and all(turn.trained for turn in answer.conversation.turns)


def test_a_labelled_response_has_its_thinking():
    (answer,) = read({"prompt": "a", "completion": "b", "reasoning": "c", "label": True}, task="kto")
    assert answer.conversation.turns[1].thinking == "c"


def test_a_pair_is_a_good_and_a_bad_answer_for_kto():
    assert [(answer.good, answer.conversation.turns[-1]) for answer in read(FORMS["implicit"], task="kto")] == [
        (True, TOLD),
        (False, WRONG),
    ]


@pytest.mark.parametrize("label", ["maybe", 2, -1, 0.5, None, "", [True], {"good": 1}])
def test_a_label_that_is_no_truth_value_is_refused(label):
    first = {"prompt": "a", "completion": "b", "label": True}
    found = error(first, task="kto", later=first | {"label": label})
    assert "the label 'label' is no truth value" in found and "expected true" in found


def test_fields_of_other_names_are_named_in_the_order_of_their_task():
    row = {"q": "Name a river.", "a": {"text": "The Elbe."}, "b": "Mount Elbrus.", "yes": "true", "p": "more"}
    for answer, said in zip(read(row, "q+p", "a.text", "b"), (TOLD, WRONG), strict=True):
        assert answer.conversation.turns == (Turn("user", "Name a river.\nmore"), said)
    (answer,) = read(row, "q", "b", "yes", task="kto")
    assert answer.good and answer.conversation.turns == (ASKED, WRONG)
    (answer,) = read({"talk": [user("a"), GOOD], "yes": 0}, "talk", "yes", task="kto")
    assert not answer.good and answer.conversation.turns == (Turn("user", "a"), TOLD)
    assert "no field 'c'; found: q, a, b" in error(row, "q", "a.text", "c")


def test_names_of_another_file_give_way_to_usual_ones():
    layout = preference_layout(FORMS["texts"], ("q", "a", "b"), "dpo", "f:1", or_usual=True)
    assert layout.instead and layout.named == ("prompt", "chosen", "rejected")
    with pytest.raises(UserError, match="no field 'q'"):
        preference_layout({"text": "a"}, ("q", "a", "b"), "dpo", "f:1", or_usual=True)


@pytest.mark.parametrize(
    ("row", "task", "expected"),
    [
        ({"text": "a"}, "dpo", ["--task dpo expects two answers", "found: text.", "PROMPT CHOSEN REJECTED", "sft"]),
        ({"prompt": "a", "response": "b"}, "simpo", ["--task simpo expects two", "prompt, response", "--task sft"]),
        ({"prompt": "a", "response": "b", "label": True}, "orpo", ["prompt, response, label", "--task kto for"]),
        ({"prompt": "a", "response": "b"}, "kto", ["--task kto expects an answer and a label", "prompt, response"]),
        ({"a": "b", "label": True}, "kto", ["a field 'label' and no usual pair", "found: a, label", "PROMPT ANSWER"]),
        (
            {"prompt": "a", "completion": "b", "answer": "c", "label": True},
            "kto",
            ["could be prompt+completion or prompt+answer", "--sft_field prompt answer label"],
        ),
        ({"chosen": "a", "rejected": "b"}, "dpo", ["without a prompt", "--sft_field PROMPT chosen rejected"]),
        (
            {"prompt": "a", "query": "x", "chosen": "b", "rejected": "c"},
            "dpo",
            ["could be prompt or query", "--sft_field query chosen rejected"],
        ),
        (
            {"prompt": "x", "chosen": [user("a"), GOOD], "rejected": [user("a"), POOR]},
            "dpo",
            ["'chosen' begins with a turn of role user", "'prompt' is not in it", "--sft_field chosen rejected"],
        ),
        (
            {"chosen": [user("a"), GOOD], "rejected": [user("b"), POOR]},
            "dpo",
            ["'chosen' and 'rejected' are answers to different prompts", "turn 1 of 'chosen' is of role user"],
        ),
        ({"prompt": [user("a"), GOOD], "chosen": "b", "rejected": "c"}, "dpo", ["ends with a turn of the assistant"]),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "dpo", ["field 'rejected' is empty"]),
        ({"prompt": "a", "chosen": [assistant("")], "rejected": "b"}, "dpo", ["empty response (chosen[0])"]),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "dpo", ["field 'chosen' is a list", "expected a string"]),
        ({"prompt": "a", "chosen": [user("a")], "rejected": [POOR]}, "dpo", ["no turn of the assistant in 'chosen'"]),
        (FORMS["HH"] | {"rejected": HH.format("")}, "dpo", ["empty response (rejected[1])"]),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "dpo", ["fields found: prompt, chosen, rejected"]),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_to_do(row, task, expected):
    found = error(row, task=task)
    for text in expected:
        assert text in found


def test_a_text_in_a_later_row_of_conversations_is_refused():
    assert "'chosen' is a text without a prompt: name the prompt too, --sft_field PROMPT chosen rejected" in error(
        FORMS["implicit"], later={"chosen": "The Elbe.", "rejected": "Mount Elbrus."}
    )


@pytest.mark.parametrize(("task", "names"), [("dpo", ("a",)), ("kto", ("a",)), ("orpo", ("a", "b", "c", "d"))])
def test_a_number_of_names_that_does_not_fit_the_task_is_refused(task, names):
    with pytest.raises(UserError, match=f"--task {task}: --sft_field takes the names of prompt, .*got {len(names)}"):
        DataConfig(data_file=("f",), task=task, sft_field=names)
    with pytest.raises(UserError, match="--sft_field takes the names of prompt and response"):
        DataConfig(data_file=("f",), sft_field=("a", "b", "c"))
    DataConfig(data_file=("f",), eval_data=("one=f",), task=task, eval_field=("one=a,b,c",))
