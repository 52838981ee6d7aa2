"""Jinja templates against transformers' own rendering and its mask of what the assistant says."""

import json
from pathlib import Path

import numpy as np
import pytest

from rwkv_bone.data.conversations.conversation import Conversation, Turn, conversation, layout_of
from rwkv_bone.data.masks import encode
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.tokenizer import byte_letters, load_tokenizer
from rwkv_bone.errors import UserError
from tests.data.test_templates import CHAT, talk, texts, write

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("transformers.utils.chat_template_utils")

PLAIN = """\
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
# Tools before the system text, calls in tags, results joined to one turn, thinking in a block of its own.
TAGS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% OPEN %}
        {%- set thought = message.reasoning_content %}
        {%- if thought %}{{- "<think>\\n" + thought + "\\n</think>\\n" }}{%- endif %}
        {{- message.content or '' }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% CLOSE %}{{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# A date, tools indented in the first user's turn, calls as JSON with sorted keys, a macro, a namespace.
DATED = """\
{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- macro turn(role) %}{{ '<|head|>' ~ role ~ '<|/head|>\\n\\n' }}{% endmacro %}
{{- turn('system') }}Today: {{ strftime_now('%d %b %Y') }}
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}<|eot|>
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' and ns.first and tools %}
        {%- set ns.first = false %}
        {{- turn('user') }}{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{{ message.content | trim }}<|eot|>
    {%- elif message.role == 'assistant' %}
        {{- turn('assistant') }}{% OPEN %}
        {%- for call in message.tool_calls or [] %}
            {{- {'name': call.function.name, 'parameters': call.function.arguments} | tojson(sort_keys=true) }}
            {%- if loop.index0 == 1 %}{% break %}{% endif %}
        {%- else %}{{- message['content'] | trim }}{%- endfor %}
        {{- '<|eot|>' }}{% CLOSE %}
    {%- else %}
        {{- turn('ipython' if message.role == 'tool' else message.role) }}
        {{- message.content | tojson(ensure_ascii=true, separators=(',', ':')) }}<|eot|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ turn('assistant') }}{% endif %}"""
# Roles that must alternate, and names of tools and calls.
STRICT = """\
{{- bos_token -}}
{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for m in loop_messages -%}
    {%- if m.role == 'user' -%}[INST]{{ ' ' ~ m.content ~ '[/INST]' }}
    {%- elif m.role == 'tool' -%}[R]{"name": {{ (m.name or '') | tojson }}, "id": {{ (m.tool_call_id or '') | tojson }},
        "content": {{ m.content | tojson }}}[/R]
    {%- elif m.role == 'assistant' -%}{% OPEN %}
        {%- if m.tool_calls -%}[C]{%- for c in m.tool_calls -%}
            {{- c.function.name ~ ' ' ~ (c.id or '-') ~ ' ' ~ c.function.arguments | tojson -}}{%- endfor -%}[/C]
        {%- else -%}{{ ' ' ~ m.content }}{%- endif -%}{{ eos_token }}{% CLOSE %}
    {%- else -%}{{ raise_exception('no role ' + m.role) }}{%- endif -%}
{%- endfor -%}"""
DIM = {
    "type": "function",
    "function": {"name": "dim", "description": "é <b>", "parameters": {"properties": {"room": {"type": "string"}}}},
}


def called(number: str, **arguments) -> dict:
    return {"id": number, "type": "function", "function": {"name": "dim", "arguments": arguments}}


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


ROWS = {
    "one turn": {"messages": [said("user", "hi"), said("assistant", "Hello – 你好.")]},
    "several": {
        "messages": [
            said("system", "Be\n\nkind."),
            said("user", " a\n\nb "),
            said("assistant", "c\n"),
            said("user", "<|im_end|>?"),
            said("assistant", "d"),
        ]
    },
    "thinking": {
        "messages": [
            said("user", "3+4?"),
            said("assistant", "7", reasoning_content="three\n\nfour"),
            said("user", "5+6?"),
            said("assistant", "11", reasoning_content="five"),
        ]
    },
    "tools": {
        "messages": [
            said("system", "Call."),
            said("user", "dim two"),
            said("assistant", "", tool_calls=[called("c1", room="hall", level=4), called("c2", level=None, room="é")]),
            said("tool", '{"ok": true}', tool_call_id="c1", name="dim"),
            said("tool", "no\n", tool_call_id="c2", name="dim"),
            said("assistant", "Done."),
        ],
        "tools": [DIM],
    },
}
FILES = {"plain": PLAIN, "tags": TAGS, "dated": DATED, "strict": STRICT}
MARKED = ("tags", "dated", "strict")


def template(kind: str, marked: bool) -> str:
    opened, closed = ("generation", "endgeneration") if marked else ("if true", "endif")
    return FILES[kind].replace("OPEN", opened).replace("CLOSE", closed)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer, whose special tokens the templates write."""
    letters = {letter: number for number, letter in enumerate(byte_letters())}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"])
    folder = tmp_path_factory.mktemp("model")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ours(model: Path, text: str, row: dict, loss_mask: str = "response"):
    """(ids, trained, segments) of a row, with a template of this text in the model's folder."""
    path = write(model, text, "chat_template.jinja")
    tokenizer = load_tokenizer(str(model / "tokenizer.json"), 300)
    found = conversation(row, layout_of(row, (), "auto", "f:1"), "f:1")
    segments = load_template(path, tokenizer.name).render(found)
    return *encode(segments, tokenizer, loss_mask), segments


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_text_and_mask_are_those_of_transformers(model, kind, marked, row):
    text = template(kind, marked)
    ids, trained, segments = ours(model, text, row)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    messages = row["messages"]
    if kind != "tags":  # a template that knows no reasoning gets it with the content
        messages = [said(**{**m, "content": written(m)}) for m in messages]
    made = theirs.apply_chat_template(
        messages,
        tools=row.get("tools"),
        chat_template=text,
        return_dict=True,
        return_assistant_tokens_mask=marked and kind in MARKED,
    )
    expected, mask = made["input_ids"], made.get("assistant_masks", [])
    ended = expected[: len(ids)] == ids.tolist()  # by the template; else the end of the document is ours
    count = len(ids) - (not ended)
    assert ids[:count].tolist() == expected[:count] and ids[-1] == theirs.eos_token_id and trained[-1]
    # White space that a template writes after the last response trains nothing, so it may be missing.
    assert theirs.decode(expected[count:]).strip() == "" and not any(mask[count:])
    if mask:
        assert sum(mask) > 3 and trained[:count].tolist() == list(map(bool, mask[:count]))
    assert [segment.role for segment in segments][-1] == "response"


def written(message: dict) -> str:
    thinking = message.get("reasoning_content")
    return f"<think>\n{thinking}\n</think>\n{message['content']}" if thinking else message["content"]


def masked(*trained: bool) -> dict:
    """A row of as many responses, of which some are not to be trained."""
    pairs = [(said("user", f"q{i}"), said("assistant", f"a{i}", train=yes)) for i, yes in enumerate(trained)]
    return {"messages": [message for pair in pairs for message in pair]}


@pytest.mark.parametrize("marked", [False, True])
def test_a_response_that_is_not_to_be_trained_trains_nothing_with_any_mask(model, marked):
    text = template("tags", marked)
    whole, _, _ = ours(model, text, masked(True, True, True))
    tokenizer = load_tokenizer(str(model / "tokenizer.json"), 300)
    kinds = {
        "response": ["a0<|im_end|>", "a2<|im_end|></s>"],
        "last": ["a2<|im_end|></s>"],
        "qa": ["a0<|im_end|>", "a2<|im_end|></s>"],
    }
    for loss_mask, expected in kinds.items():
        ids, trained, _ = ours(model, text, masked(True, False, True), loss_mask)
        assert ids.tolist() == whole.tolist()
        bounds = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        runs = [tokenizer.decode(ids[begin:end].tolist()).replace("\n", "") for begin, end in bounds]
        assert runs == expected
    ids, trained, _ = ours(model, text, masked(True, False, True), "none")
    assert tokenizer.decode(ids[~trained].tolist()).replace("\n", "") == "<|im_start|>a1<|im_end|>"


def test_marks_that_do_not_say_which_response_they_are_of_are_refused_with_masked_turns(model):
    twice = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ids, trained, _ = ours(model, twice, masked(True, True))
    assert trained[1:].all()  # as transformers does: what is marked is trained, whoever says it
    with pytest.raises(UserError, match="f:1: .* has 4 {% generation %} blocks for 2 responses, so which of them"):
        ours(model, twice, masked(True, False))


def test_marks_with_nothing_in_them_are_refused(model):
    block = "{% generation %}{% endgeneration %}"
    for text in (f"{block}x", "x{% if false %}" + block + "{% endif %}"):
        with pytest.raises(UserError, match="f:1: .*nothing is in its {% generation %} blocks. To go on"):
            ours(model, text, ROWS["one turn"])


def test_marks_hold_in_a_macro_and_a_template_that_rewrites_earlier_turns_can_have_them(tmp_path):
    # transformers tells a wrong place there: it counts what is written before the macro is done.
    macro = (
        "{% macro say(m) %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }};"
        "{% endgeneration %}{% endif %}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    both = "[user][assistant]"
    assert texts(write(tmp_path, macro), talk("a", "b", "c", "d")) == [both, "b;", both, "d;"]
    drops = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}{% generation %}"
        "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    thought = Turn("assistant", "b", thinking="hm"), Turn("assistant", "d", thinking="ha")
    conversation = Conversation("f:1", (Turn("user", "a"), thought[0], Turn("user", "c"), thought[1]))
    name = write(tmp_path, drops)
    assert texts(name, conversation) == ["a\n", "b\n", "c\n", "<think>ha</think>d\n"]
    assert load_template(name, "").remarks(conversation) == {"responses whose thinking the template leaves out": 1}


def test_marks_that_leave_out_the_end_of_the_turn_are_said(tmp_path):
    def remarks(end: str) -> dict:
        text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}" + end + "{% endfor %}"
        return dict(load_template(write(tmp_path, text), "").remarks(talk("a", "b")))

    assert remarks("") == remarks(" \n") == {}
    assert list(remarks("<|im_end|>\n").values()) == [1]
    assert "does not learn to stop" in next(iter(remarks("<|im_end|>\n")))


def test_of_several_templates_the_one_for_tools_writes_rows_with_tools(tmp_path):
    base = "{% for m in messages %}{{ m.content }};{% endfor %}"
    content = [{"name": "default", "template": base}, {"name": "tool_use", "template": "{{ tools | tojson }}" + base}]
    name = write(tmp_path, json.dumps({"chat_template": content}), "tokenizer_config.json")
    assert texts(name, talk("a", "b")) == ["a;", "b;"]
    offered = Conversation("f:1", talk("a", "b").turns, tools=(DIM,))
    assert texts(name, offered) == [f"[{json.dumps(DIM, ensure_ascii=False)}]a;", "b;"]
    one = write(tmp_path, base)
    assert texts(one, offered) == ["a;", "b;"]


def test_a_template_that_reads_no_reasoning_gets_it_with_the_content(tmp_path):
    plain = "{% for m in messages %}{{ m.content }};{% endfor %}"
    assert texts(write(tmp_path, plain), CHAT)[-1] == "<think>\nfirst\n\nsecond\n</think>\nc\r\n\r\n  d;"
    for name in ("reasoning_content", "thinking"):
        thinks = "{% for m in messages %}[{{ m.NAME or '-' }}]{{ m.content }};{% endfor %}".replace("NAME", name)
        assert texts(write(tmp_path, thinks), CHAT)[-1] == "[first\n\nsecond]c\r\n\r\n  d;"
        assert load_template(str(tmp_path / "mine.txt"), "").remarks(CHAT) == {}


JSON = "{{ {'é<': [1, {'b': 2, 'a': 1}]} | tojson(OPTIONS) }}{% for m in messages %}{{ m.content }}|{% endfor %}"
OPTIONS = ["", "indent=2", "ensure_ascii=true", "separators=(',', ':'), sort_keys=true", "true", "false, 2, none, true"]


@pytest.mark.parametrize("options", OPTIONS)
def test_tojson_writes_what_it_writes_in_transformers(tmp_path, options):
    text = JSON.replace("OPTIONS", options)
    messages = [said("user", "a"), said("assistant", "b")]
    expected = utils.render_jinja_template([messages], chat_template=text)[0][0]
    assert "".join(texts(write(tmp_path, text), talk("a", "b"))) == expected


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
