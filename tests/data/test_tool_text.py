"""Tools, calls and results as text: the form of upstream's page for G1 models, and Hermes tags."""

import json

import pytest

from rwkv_bone.data.conversations.conversation import Conversation, Turn, conversation, layout_of
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.templates.tools import has_tools, with_tools_as_text
from rwkv_bone.errors import UserError

DIM = {
    "type": "function",
    "function": {
        "name": "dim",
        "description": "Dim a lamp – slowly",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string", "enum": ["hall", "attic"], "description": "Which room"},
                "level": {"type": "integer", "minimum": 0},
            },
            "required": ["room"],
        },
    },
}
CALL = {"name": "dim", "arguments": {"room": "hall", "level": 40}}
TURNS = (
    Turn("user", "Dim the hall"),
    Turn("assistant", "", calls=(CALL,)),
    Turn("tool", '{"ok": true}\n'),
    Turn("assistant", "Done."),
)
LAMP = Conversation("f:1", TURNS, tools=(DIM,))


def texts(name: str, talk: Conversation, tool_format: str = "auto") -> list[str]:
    return [segment.text for segment in load_template(name, "", tool_format).render(talk)]


def one_tool(tool) -> str:
    """The line of a tool in the system turn of g1."""
    begin, line, end = texts("g1", Conversation("f:1", TURNS, tools=(tool,)))[0].partition("]\n")[0].split("\n", 2)
    assert (begin, line) == ("System: Tools:", "[")
    return end.rstrip("\n")


OFFER = (
    'Tools:\n[\n{"name":"dim","description":"Dim a lamp – slowly","arguments":{"room":{"type":"string",'
    '"enum":["hall","attic"],"description":"Which room"},"level":{"type":"integer","minimum":0}},"required":["room"]}'
    "\n]\nReturn only a JSON function call."
)
BLOCK = '```json\n{"name":"dim","arguments":{"room":"hall","level":40}}\n```'
RESULT = 'Function output:\n{"ok": true}'


def test_g1_writes_tools_as_upstreams_page_does():
    opening = "Assistant: <think>\n</think"
    assert texts("g1", LAMP) == [
        f"System: {OFFER}\n\nUser: Dim the hall\n\n{opening}",
        f">\n{BLOCK}\n\n",
        f"User: {RESULT}\n\n{opening}",
        ">\nDone.",
    ]
    # Upstream's page has no think block, which is what world writes.
    assert texts("world", LAMP, "g1") == [
        f"System: {OFFER}\n\nUser: Dim the hall\n\nAssistant:",
        f" {BLOCK}\n\n",
        f"User: {RESULT}\n\nAssistant:",
        " Done.",
    ]


def test_a_thought_stands_before_a_call_and_text_too():
    turn = Turn("assistant", " I look.\n", thinking="which room?", calls=(CALL,))
    talk = Conversation("f:1", (TURNS[0], turn))
    assert texts("g1-think", talk)[1] == f">\nwhich room?\n</think>\nI look.\n{BLOCK}"
    assert texts("g1", talk)[1] == f">\nI look.\n{BLOCK}"


def test_a_system_text_of_the_users_own_stands_before_the_list_and_other_tools_on_lines_of_their_own():
    talk = Conversation("f:1", (Turn("system", "Be\n\nbrief.\n"), *TURNS), tools=({"name": "a"}, {"name": "b"}))
    listed = '[\n{"name":"a","arguments":{}},\n{"name":"b","arguments":{}}\n]'
    assert texts("g1", talk)[0].startswith(
        f"System: Be\nbrief.\nTools:\n{listed}\nReturn only a JSON function call.\n\n"
    )
    # A system turn that comes later is another one.
    later = Conversation("f:1", (TURNS[0], Turn("system", "s"), TURNS[3]), tools=({"name": "a"},))
    assert texts("g1", later)[0].startswith("System: Tools:\n[\n") and "\n\nSystem: s\n\n" in texts("g1", later)[0]


def test_several_calls_are_a_list_in_one_block_and_several_results_a_turn_each():
    other = {"name": "say", "arguments": {"text": 'a\n\nüb "c"'}}
    turns = (TURNS[0], Turn("assistant", "", calls=(CALL, other)), Turn("tool", "1"), Turn("tool", "2"), TURNS[3])
    written = texts("g1", Conversation("f:1", turns, tools=(DIM,)))
    block = written[1].removeprefix(">\n").removesuffix("\n\n")
    lines = block.split("\n")
    assert lines[:2] == ["```json", "["] and lines[-2:] == ["]", "```"] and len(lines) == 6
    assert json.loads("\n".join(lines[1:-1])) == [CALL, other]
    assert lines[3] == r'{"name":"say","arguments":{"text":"a\n\nüb \"c\""}}'
    assert written[2].startswith("User: Function output:\n1\n\nUser: Function output:\n2\n\nAssistant:")


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        (DIM["function"], OFFER.split("\n")[2]),
        ({"type": "function", **DIM["function"]}, OFFER.split("\n")[2]),
        (
            {"name": "f", "input_schema": {"type": "object", "properties": {"a": {}}}},
            '{"name":"f","arguments":{"a":{}}}',
        ),
        ({"name": "f", "arguments": {"a": {"type": "string"}}}, '{"name":"f","arguments":{"a":{"type":"string"}}}'),
        ({"type": "web_search"}, '{"type":"web_search"}'),
        ("f(a: string)", '"f(a: string)"'),
        (
            {"name": "f", "description": None, "parameters": None},
            '{"name":"f","arguments":{},"description":null,"parameters":null}',
        ),
        (
            {
                "type": "function",
                "strict": True,
                "function": {
                    "name": "f",
                    "parameters": {
                        "type": "object",
                        "properties": {"a": {"$ref": "#/$defs/A"}},
                        "$defs": {"A": {}},
                        "description": "d",
                    },
                    "return": {},
                },
            },
            '{"name":"f","arguments":{"a":{"$ref":"#/$defs/A"}},"$defs":{"A":{}},"description":"d","return":{},'
            '"strict":true}',
        ),
        (
            {"name": "f", "description": "x", "parameters": {"type": ["object", "null"], "description": "d"}},
            '{"name":"f","description":"x","arguments":{},"type":["object","null"],"parameters.description":"d"}',
        ),
    ],
)
def test_nothing_of_a_tool_is_lost_but_the_words_that_say_nothing(tool, line):
    assert one_tool(tool) == line


def test_hermes_writes_tags_and_the_tools_as_they_are():
    called = Turn(
        "assistant", " again ", calls=({"name": "add", "arguments": {"a": "ü"}}, {"name": "f", "arguments": 1})
    )
    turns = (Turn("system", "calculate"), Turn("user", "a"), called)
    system = 'calculate\n<tools>\n{"name": "add"}\n{"name": "f"}\n</tools>'
    response = 'again\n<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n</tool_call>\n<tool_call>\n'
    response += '{"name": "f", "arguments": 1}\n</tool_call>'
    for begin in (0, 1):
        talk = Conversation("f:1", turns[begin:], tools=({"name": "add"}, {"name": "f"}))
        offered = system[10 * begin :]
        assert texts("world", talk) == [f"System: {offered}\n\nUser: a\n\nAssistant:", f" {response}"]
    result = '<tool_response>\n{"ok": true}\n</tool_response>'
    assert texts("world", LAMP)[2] == f"User: {result}\n\nAssistant:"
    assert texts("alpaca", LAMP)[2] == f"### Instruction:\n{result}\n\n### Response:"
    assert texts("alpaca", LAMP)[0].startswith("<tools>\n")


@pytest.mark.parametrize(
    ("template", "tool_format", "tags"),
    [
        ("g1", "auto", False),
        ("g1-think", "auto", False),
        ("g1", "hermes", True),
        ("g1-think", "hermes", True),
        ("world", "auto", True),
        ("alpaca", "auto", True),
        ("auto", "auto", True),
        ("alpaca", "g1", False),
    ],
)
def test_g1_templates_have_upstreams_form_and_others_tags_if_nothing_is_said(template, tool_format, tags):
    written = "".join(segment.text for segment in load_template(template, "world", tool_format).render(LAMP))
    assert [mark in written for mark in ("<tools>", "<tool_call>", "<tool_response>")] == [tags] * 3
    assert [mark in written for mark in ("Tools:\n[", "```json\n{", "Function output:\n{")] == [not tags] * 3


def test_the_form_is_part_of_a_templates_identity():
    for name in ("world", "g1", "alpaca", "raw"):
        assert load_template(name, "", "g1").identity() != load_template(name, "", "hermes").identity()
    assert load_template("g1", "", "g1").identity() == load_template("g1", "").identity()


def test_a_template_without_a_place_for_tools_says_so(tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt}>{response}")
    alone = Conversation("f:1", (TURNS[0], TURNS[3]), tools=(DIM,))
    for name in ("raw", str(tmp_path / "mine.txt")):
        with pytest.raises(UserError, match="f:1: .*found system, user, assistant"):
            texts(name, alone)
        assert texts(name, Conversation("f:1", TURNS[:2]))[1].startswith("<tool_call>\n")


def test_a_jinja_template_writes_tools_itself(tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name in ("g1", "hermes"):
        with pytest.raises(
            UserError, match=f"--tool_format {name} has no meaning with --template .*mine.jinja, a Jinja"
        ):
            load_template(str(tmp_path / "mine.jinja"), "world", name)


def test_rows_with_tools_calls_or_results_have_tools():
    assert all(has_tools(Conversation("f:1", turns)) for turns in (TURNS[:2], TURNS[2:]))
    assert has_tools(Conversation("f:1", TURNS[:1], tools=(DIM,)))
    assert not has_tools(Conversation("f:1", (TURNS[0], TURNS[3])))
    assert not has_tools(Conversation("f:1", document="x"))
    as_text = with_tools_as_text(LAMP)
    assert not as_text.tools and not any(turn.calls for turn in as_text.turns)


def test_a_row_of_messages_becomes_upstreams_form_and_loses_nothing():
    call = {"id": "c1", "type": "function", "function": {"name": "dim", "arguments": json.dumps(CALL["arguments"])}}
    row = {
        "messages": [
            {"role": "user", "content": "Dim the hall"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": '{"ok": true}'},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [DIM],
    }
    talk = conversation(row, layout_of(row, (), "auto", "f:1"), "f:1")
    assert texts("g1", talk) == texts("g1", LAMP)
    assert texts("world", talk) == texts("world", LAMP)
