"""What train_hf.py makes of rows: the same turns as train.py, written by the tokenizer's chat template."""

import json

import pytest

from rwkv_bone.data.conversations.conversation import NOTHING_TRAINED
from rwkv_bone.data.conversations.turns import MASKED
from rwkv_bone.errors import UserError
from tests.hf.conftest import CHAT

pytest.importorskip("transformers")

from rwkv_bone.hf.data import IGNORED_LABEL, THINKING_AS_TEXT, TOOLS_AS_TEXT, RowsOf, load_samples  # noqa: E402

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
# It writes all that a message may hold, as templates of models for tools do.
EVERYTHING = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>
{%- if m.tool_call_id %}({{ m.tool_call_id }}, {{ m.name }}){% endif %}
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.id }}: {{ call.function | tojson }}{% endfor %}{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture
def samples_of(tokenizer, monkeypatch):
    """Factory: (samples, the whole text of each, its trained texts) of rows, with this chat template."""

    def make(*rows, template=CHAT, fields=(), **more):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        found = load_samples([(f"rows:{i}", row) for i, row in enumerate(rows, 1)], fields, tokenizer, 999, **more)
        texts, trained = [], []
        for row in found.rows:
            texts.append(tokenizer.decode(row["input_ids"]))
            pieces = "".join(
                tokenizer.decode([token]) if label != IGNORED_LABEL else "\0"
                for token, label in zip(row["input_ids"], row["labels"], strict=True)
            )
            trained.append([piece for piece in pieces.split("\0") if piece])
        return found, texts, trained

    return make


@pytest.mark.parametrize(
    "row",
    [
        {"query": "hi", "response": "yes"},
        {"Question": "hi", "Answer": "yes"},
        {"instruction": "hi", "output": "yes"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ],
)
def test_rows_of_every_usual_form_give_the_same_sample(samples_of, row):
    found, texts, trained = samples_of(row)
    assert texts == ["<bos><user>hi<eos><assistant>yes<eos>"] and trained == [["yes<eos>"]]
    assert found.lines() == []


def test_numbers_material_and_several_fields_are_read_as_in_train(samples_of):
    rows = [{"instruction": "sum", "context": "long", "response": 52.0}]
    assert samples_of(*rows)[1] == ["<bos><user>sum\nlong<eos><assistant>52.0<eos>"]
    found, texts, _ = samples_of({"a": 1, "b": "two", "r": True, "id": "x"}, fields=("a+b", "r"))
    assert texts == ["<bos><user>1\ntwo<eos><assistant>true<eos>"] and found.lines() == ["fields not used: id (1 row)"]


def test_responses_of_weight_0_are_read_and_not_trained(samples_of):
    masked = ANSWER | {"content": "wrong", "weight": 0}
    found, texts, trained = samples_of(
        {"messages": [USER, masked, USER, ANSWER]},
        {"messages": [USER, ANSWER, USER, masked]},
        {"messages": [USER, masked]},
    )
    assert texts[0] == "<bos><user>hi<eos><assistant>wrong<eos><user>hi<eos><assistant>yes<eos>"
    assert trained == [["yes<eos>"], ["yes<eos>"]] and "wrong" not in texts[1]
    assert found.remarks.counts == {MASKED: 3, NOTHING_TRAINED: 1} and found.dropped == 0
    with pytest.raises(UserError, match="^rows:1: up to here .* row that train nothing"):
        samples_of({"messages": [USER, masked]})


def test_without_a_chat_template_a_masked_response_trains_nothing(samples_of):
    pair = {"prompt": [USER], "completion": [ANSWER | {"train": False}]}
    trained = {"prompt": [USER], "completion": [ANSWER]}
    found, texts, _ = samples_of(pair, trained, template=None)
    assert texts == ["hiyes<eos>"] and found.remarks.counts[NOTHING_TRAINED] == 1


def test_thinking_reaches_a_template_that_writes_it(samples_of):
    rows = [
        {"messages": [USER, ANSWER | {"thinking": "hm"}]},
        {"messages": [USER, ANSWER | {"content": "<think>\nhm\n</think>\n\nyes"}]},
        {"prompt": "hi", "response": "yes", "reasoning": "hm"},
    ]
    for row in rows:
        found, texts, trained = samples_of(row, template=EVERYTHING)
        assert texts == ["<user>hi<eos><assistant>[hm]yes<eos>"] and trained == [["[hm]yes<eos>"]]
        assert found.lines() == []


@pytest.mark.parametrize("template", [CHAT, None])
def test_thinking_that_the_template_has_no_place_for_is_written_in_the_text(samples_of, template):
    found, _, trained = samples_of({"prompt": "hi", "response": "yes", "reasoning": "hm"}, template=template)
    assert trained == [["<think>\nhm\n</think>\nyes<eos>"]]
    assert found.lines() == ([f"1 {THINKING_AS_TEXT}".replace("rows", "row", 1)] if template else [])


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "messages": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "sub", "arguments": {}}]},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": '{"sum": "2"}'},
        ANSWER,
    ],
}


def test_tools_calls_and_results_reach_a_template_that_writes_them(samples_of):
    found, texts, trained = samples_of(TOOLS, template=EVERYTHING)
    calls = 'c1: {"name": "add", "arguments": {"a": 1}}: {"name": "sub", "arguments": {}}<eos>'
    assert texts == [
        '<tools>[{"type": "function", "function": {"name": "add"}}]</tools><user>hi<eos><assistant>'
        + calls
        + '<tool>(c1, add){"sum": "2"}<eos><assistant>yes<eos>'
    ]
    assert trained == [[calls, "yes<eos>"]] and found.lines() == []


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        EVERYTHING.replace("{{ tools | tojson }}", "").replace("<tools></tools>", ""),
        EVERYTHING.replace("{{ call.id }}: {{ call.function | tojson }}", ""),
        EVERYTHING.replace("<{{ m.role }}>", "<{{ m.role if m.role != 'tool' else raise_exception('no tools') }}>"),
    ],
)
def test_tools_that_the_template_does_not_write_are_text_of_the_turns(samples_of, template):
    found, texts, trained = samples_of(TOOLS, template=template)
    assert "<tools>" in texts[0] and '"name": "add"' in texts[0] and "<user><tool_response>" in texts[0]
    assert '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call><eos>' in trained[0][0]
    assert trained[0][1] == "yes<eos>" and found.lines() == [f"1 {TOOLS_AS_TEXT}".replace("rows", "row", 1)]


def test_a_template_that_escapes_results_writes_them(samples_of):
    found, texts, _ = samples_of(TOOLS, template=EVERYTHING.replace("{{ m.content }}", "{{ m.content | tojson }}"))
    assert r"{\"sum\": \"2\"}" in texts[0] and found.lines() == []


def test_fields_that_are_not_used_are_said_for_each_file(samples_of):
    rows = [{"instruction": "a", "input": str(i), "output": "b", "id": "x"} for i in range(3)]
    found, _, _ = samples_of(*rows, fields=("instruction", "output"))
    assert found.lines() == ["fields not used: input (3 rows), id (3 rows)"]
    assert samples_of(*rows)[0].lines() == ["fields not used: id (3 rows)"]


def test_held_out_rows_have_fields_of_their_own(samples_of):
    row = {"prompt": "hi", "response": "yes"}
    found, texts, _ = samples_of(row, fields=("question", "answer"), flag="--eval_field", or_usual=True)
    assert texts == ["<bos><user>hi<eos><assistant>yes<eos>"]
    assert found.lines() == [
        "not the fields of --dataset_field question answer, so that usual names are read: prompt and response"
    ]
    with pytest.raises(UserError, match="no field 'question'.* --eval_field"):
        samples_of(row, fields=("question", "answer"), flag="--eval_field")


def test_a_table_without_a_header_is_read_by_the_names_of_its_columns(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("one,two\nthree,four\n")
    rows = [row for _, row in RowsOf(str(path), columns=("prompt", "response"))]
    assert [list(row.values()) for row in rows] == [["one", "two"], ["three", "four"]]
    assert json.loads(json.dumps(rows[0])) == {"prompt": "one", "response": "two"}
