"""Templates write what the models know, and the ids of a prompt are those that were trained."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data.conversation import Conversation, Turn
from rwkv_bone.data.masks import encode
from rwkv_bone.data.templates import Segment, load_template
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
CHATML = """\
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


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
        " c\n  d",
    ]


def test_g1_writes_an_empty_think_block_and_leaves_thinking_out():
    assert texts("g1", CHAT) == [
        "System: Be kind.\n\nUser: hi\n\nAssistant: <think>\n</think",
        ">\nHello.\n\n",
        "User: sum up\na\nb\n\nAssistant: <think>\n</think",
        ">\nc\n  d",
    ]
    assert texts("g1", talk("a", "<think>\nhm\n</think>\n\nb"))[1] == ">\nb"


def test_g1_think_writes_the_thinking_with_its_blank_lines():
    assert texts("g1-think", CHAT) == [
        "System: Be kind.\n\nUser: hi\n\nAssistant: <think",
        ">\n</think>\nHello.\n\n",
        "User: sum up\na\nb\n\nAssistant: <think",
        ">\nfirst\n\nsecond\n</think>\nc\n  d",
    ]
    inside = talk("a", " <think>\none\r\n\r\ntwo\n</think>\n\nb\n\n</think> c")
    assert texts("g1-think", inside)[1] == ">\none\n\ntwo\n</think>\nb\n</think> c"


def test_a_think_block_without_end_or_without_answer_is_refused():
    for name in ("g1", "g1-think"):
        with pytest.raises(UserError, match="f:1: a response begins with <think> and has no </think>"):
            texts(name, talk("a", "<think>\nhm"))
        with pytest.raises(UserError, match="f:1: a response has nothing after </think>"):
            texts(name, talk("a", "<think>\nhm\n</think>\n "))
    assert texts("world", talk("a", "<think>\nhm"))[1] == " <think>\nhm"


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
        "c\r\n\r\n  d",
    ]


def test_calls_and_tools_are_written_in_the_form_of_hermes_models():
    called = Turn(
        "assistant", " again ", calls=({"name": "add", "arguments": {"a": "ü"}}, {"name": "f", "arguments": 1})
    )
    turns = (Turn("system", "calculate"), Turn("user", "a"), called)
    system = 'calculate\n<tools>\n{"name": "add"}\n{"name": "f"}\n</tools>'
    response = 'again\n<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n</tool_call>\n<tool_call>\n'
    response += '{"name": "f", "arguments": 1}\n</tool_call>'
    for begin in (0, 1):
        conversation = Conversation("f:1", turns[begin:], tools=({"name": "add"}, {"name": "f"}))
        offered = system[10 * begin :]
        assert texts("world", conversation) == [f"System: {offered}\n\nUser: a\n\nAssistant:", f" {response}"]


def test_what_a_tool_returned_is_a_turn_of_the_user():
    conversation = Conversation(
        "f:1", (Turn("user", "a"), Turn("assistant", "call"), Turn("tool", "3\n"), Turn("assistant", "three"))
    )
    result = "<tool_response>\n3\n</tool_response>"
    assert texts("world", conversation)[2] == f"User: {result}\n\nAssistant:"
    assert texts("alpaca", conversation)[2] == f"### Instruction:\n{result}\n\n### Response:"


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


def test_a_jinja_file_is_read_as_hugging_face_reads_it(tmp_path):
    name = write(tmp_path, CHATML, "chatml.jinja")
    written = texts(name, CHAT)
    assert written == [
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "Hello.<|im_end|>\n",
        "<|im_start|>user\nsum up\na\n\nb<|im_end|>\n<|im_start|>assistant\n",
        "c\r\n\r\n  d<|im_end|>\n",
    ]
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    contents = [f"{turn.text}\n{turn.material}" if turn.material else turn.text for turn in CHAT.turns]
    messages = [{"role": turn.role, "content": text} for turn, text in zip(CHAT.turns, contents, strict=True)]
    whole, _ = utils.render_jinja_template([messages], chat_template=CHATML)
    assert "".join(written) == whole[0]


DATED = """\
{{- '<|system|>\\nToday: ' + strftime_now('%d %B %Y') + '\\n' -}}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}
    {%- generation -%}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{%- endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
{#- #}{{ {'é': ['<', 1]} | tojson(indent=1) if false }}{{ documents or '' }}"""


def test_a_jinja_file_has_what_transformers_gives_it(tmp_path):
    written = texts(write(tmp_path, DATED, "date.jinja"), talk("a", "b", "c", "d"))
    today = datetime.now().strftime("%d %B %Y")
    first = f"<|system|>\nToday: {today}\n<|user|>\na\n<|assistant|>\n"
    assert written == [first, "b\n", "<|user|>\nc\n<|assistant|>\n", "d\n"]
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": turn.role, "content": turn.text} for turn in talk("a", "b", "c", "d").turns]
    whole, _ = utils.render_jinja_template([messages], chat_template=DATED)
    assert "".join(written) == whole[0]


JSON = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ {'é<': [1, {'b': 2, 'a': 1}]} | tojson(OPTIONS) }}"


@pytest.mark.parametrize("options", ["", "indent=2", "ensure_ascii=true", "separators=(',', ':'), sort_keys=true"])
def test_tojson_writes_what_it_writes_in_transformers(tmp_path, options):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    text = JSON.replace("OPTIONS", options)
    ours = load_template(write(tmp_path, text), "")._template.render(messages=[])
    assert ours == utils.render_jinja_template([[]], chat_template=text)[0][0]


@pytest.mark.parametrize("named", [False, True])
def test_the_template_inside_a_tokenizer_config_is_a_template(tmp_path, named):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": template}]
    content = {"chat_template": several if named else template, "eos_token": "<|end|>"}
    name = write(tmp_path, json.dumps(content), "tokenizer_config.json")
    assert texts(name, talk("a", "b")) == ["<|user|>a<|assistant|>", "b"]


def test_a_tokenizer_config_without_a_template_of_that_kind_is_refused(tmp_path):
    for content, words in (
        ({}, "no chat_template in it; choose --template world"),
        ({"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]}, "the templates a, b and"),
        ([], "expected a JSON object"),
    ):
        with pytest.raises(UserError, match=words):
            load_template(write(tmp_path, json.dumps(content), "tokenizer_config.json"), "")


def test_a_template_that_cannot_be_trained_says_how_to_go_on(tmp_path):
    # As many published ones: what an earlier turn thought is dropped when a turn is added.
    drops = (
        "{% for m in messages %}{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}\n{% endfor %}"
    )
    thought = Turn("assistant", "b", thinking="hm")
    name = write(tmp_path, drops, "chat_template.jinja")
    assert texts(name, Conversation("f:1", (Turn("user", "a"), thought))) == ["a\n", "<think>hm</think>b\n"]
    several = Conversation("f:1", (Turn("user", "a"), thought, Turn("user", "c"), thought))
    with pytest.raises(UserError, match="rewrites earlier turns.*To go on, give another --template: world, g1"):
        texts(name, several)
    refuses = write(tmp_path, "{{ raise_exception('roles must alternate') }}", "chat_template.jinja")
    with pytest.raises(UserError, match="roles must alternate. To go on, give another --template: world"):
        texts(refuses, several)


def test_a_jinja_file_gets_the_reasoning(tmp_path):
    thinks = "{% for m in messages %}[{{ m.reasoning_content or '-' }}]{{ m.content }};{% endfor %}"
    assert texts(write(tmp_path, thinks), CHAT)[-1] == "[first\n\nsecond]c\r\n\r\n  d;"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% for m in messages %}", r"not a Jinja template \(line 1: "),
        ("{{ messages[5].content.x.y }}", "f:1: --template .*: "),
        ("{{ raise_exception('no system here') }}", "f:1: --template .*: no system here"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "f:1: --template .*unsafe"),
        ("{{ messages | length }}", "3 messages without add_generation_prompt does not .*'2'"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "nothing for a response"),
        ("{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}", "does not begin with the text"),
    ],
)
def test_a_jinja_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected):
        texts(write(tmp_path, text), CHAT)


def test_an_unknown_template_is_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(UserError, match="--template wrld: expected auto, raw, alpaca, world, g1, g1-think, or"):
        load_template("wrld", "world")
    (tmp_path / "bad").write_bytes(b"\xff{prompt}{response}")
    with pytest.raises(UserError, match="--template .*bad: cannot be read"):
        load_template(str(tmp_path / "bad"), "world")


def test_the_identity_follows_the_texts_and_not_the_path(tmp_path):
    a, b = write(tmp_path, "{prompt}:{response}", "a"), write(tmp_path, "{prompt}:{response}", "b")
    c, d = write(tmp_path, "{prompt}|{response}", "c"), write(tmp_path, CHATML, "d")
    names = {name: load_template(name, "world").identity() for name in (a, b, c, d, "raw", *BUILT_IN)}
    assert names[a] == names[b] and len(set(names.values())) == len(names) - 1


def test_prompt_and_response_are_the_last_of_the_conversation():
    template = load_template("world", "world")
    assert template.prompt(CHAT).endswith("Hello.\n\nUser: sum up\na\nb\n\nAssistant:")
    assert template.response(CHAT) == " c\n  d"
    assert template.prompt(talk("a", "b")) == "User: a\n\nAssistant:"
