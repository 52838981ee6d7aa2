"""Answers that are compared become the very ids that each would be as a row of its own, after one prompt."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.config import DataConfig
from rwkv_bone.data import tokenise
from rwkv_bone.data.conversations.conversation import Layout
from rwkv_bone.data.conversations.preference import preference_layout
from rwkv_bone.data.encode import RowEncoder
from rwkv_bone.data.load import balance_line, load_pairs
from rwkv_bone.data.part import Part
from rwkv_bone.data.samples import Documents
from rwkv_bone.data.templates.builtin import load_template
from rwkv_bone.data.templates.jinja import JinjaTemplate
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError

SIZES = {"bytes": 256, "world": 65536}
TOKENIZERS = {name: load_tokenizer(name, size) for name, size in SIZES.items()}
ROWS = [{"prompt": f"{i} + 1?", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(7)]
LABELLED = [{"prompt": f"{i} + 1?", "completion": str(i + 1 + i % 2), "label": i % 2 == 0} for i in range(7)]
JINJA = (
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
FILES = {
    "marked.jinja": JINJA,
    "continued.jinja": JINJA.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "format.txt": "Q: {prompt}\nA:{response}\n",
}


@pytest.fixture(scope="module")
def template_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return lambda name: str(folder / name) if name in FILES else name


def encoder(layout, template, tokenizer="bytes", loss_mask="response"):
    loaded = load_template(template, tokenizer)
    return RowEncoder(layout, loaded, TOKENIZERS[tokenizer], SIZES[tokenizer], loss_mask, "")


def parts(documents: Documents) -> list[tuple]:
    """(row, ids, targets, ids before the answer, hash of the prompt) of each document."""
    found = []
    for i, (start, length) in enumerate(zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True)):
        mask = documents.trained
        trained = np.arange(length) > 0 if mask is None else np.asarray(mask[start : start + length])
        ids = documents.tokens[start : start + length]
        answer = int(documents.answers[i])
        row = int(documents.origin_numbers[i])
        found.append((row, ids.tolist(), trained.tolist(), answer, int(documents.prompts[i])))
    return found


def documents_of(cfg: DataConfig, vocab_size: int = 256, **more) -> Documents:
    return Part(cfg, vocab_size, cfg.data_file[0], False, **more).documents()


def text_of(ids) -> str:
    return bytes(map(int, ids)).decode()


SAID = st.text(st.sampled_from("ab yz.\né:<3"), min_size=1, max_size=12).filter(str.strip)
ANSWER = st.lists(SAID, min_size=1, max_size=2).map(lambda texts: [*texts[:1], *texts[1:] * 2])  # 1 or 3 turns


def turns(texts, first="user") -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", ["raw", "world", "g1", "g1-think", "alpaca", *FILES])
@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(SAID, min_size=1, max_size=2).map(lambda texts: [*texts[:1], *texts[1:] * 2]),
    answers=st.tuples(ANSWER, ANSWER),
    form=st.sampled_from(["explicit", "whole", "implicit", "texts", "labelled"]),
    loss_mask=st.sampled_from(["response", "last"]),
)
def test_each_half_is_what_training_on_it_alone_reads(
    template_of, template, tokenizer, prompt, answers, form, loss_mask
):
    """The path of --task sft tokenises prompt and answer of each; what both begin with is found here by the texts."""
    if template == "raw" or form == "texts":
        prompt, answers = prompt[:1], tuple(answer[:1] for answer in answers)
    asked, said = turns(prompt), [turns(answer, "assistant") for answer in answers]
    chosen, rejected = said
    row = {
        "explicit": {"prompt": asked, "chosen": chosen, "rejected": rejected},
        "whole": {"prompt": prompt[-1], "chosen": asked + chosen, "rejected": asked + rejected},
        "implicit": {"chosen": asked + chosen, "rejected": asked + rejected},
        "texts": {"prompt": prompt[0], "chosen": answers[0][0], "rejected": answers[1][0]},
        "labelled": {"prompt": asked, "completion": chosen, "label": True},
    }[form]
    same = 0
    while form != "labelled" and same < min(map(len, said)) - 1 and chosen[same] == rejected[same]:
        same += 1
    same -= same % 2  # an answer begins with the assistant's turn
    if form != "labelled" and chosen[same]["content"] == rejected[same]["content"] and min(map(len, said)) - same > 1:
        same = None  # they differ first in a turn of the user
    template, task = template_of(template), "kto" if form == "labelled" else "dpo"
    compare = encoder(preference_layout(row, (), task, "f:1"), template, tokenizer, loss_mask)
    if same is None:
        with pytest.raises(UserError, match="answers to different prompts"):
            compare(row, "f:1")
        return
    train = encoder(Layout("named", ("prompt", "completion")), template, tokenizer, loss_mask)
    whole = encoder(Layout("named", ("prompt", "completion")), template, tokenizer)
    expected, borders = [], []
    for half in said[:1] if form == "labelled" else said:
        alone = {"prompt": [*asked, *half[:same]], "completion": half[same:]}
        expected.append(train(alone, "f:1").documents[0])
        borders.append(whole(alone, "f:1").documents[0].prompt)
    found = compare(row, "f:1").documents
    if len(expected) == 2 and expected[0].ids.tolist() == expected[1].ids.tolist():
        assert not found
        return
    assert [one.ids.tolist() for one in found] == [one.ids.tolist() for one in expected]
    assert [one.trained.tolist() for one in found] == [one.trained.tolist() for one in expected]
    assert len(set(borders)) == 1 and [one.prompt for one in found] == borders
    assert [one.good for one in found] == [True, False][: len(found)]


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo"])
def test_a_pair_is_two_documents_with_one_prompt(write_jsonl, config, task):
    documents = documents_of(config(write_jsonl(*ROWS), task=task))
    found = parts(documents)
    assert documents.members == 2 and documents.good is None and documents.turns
    assert [one[0] for one in found] == [i // 2 + 1 for i in range(14)]
    assert [text_of(one[1]) for one in found[:4]] == ["0 + 1?1\0", "0 + 1?2\0", "1 + 1?2\0", "1 + 1?3\0"]
    assert all(one[3] == 6 and one[2] == [False] * 6 + [True] * 2 for one in found)
    assert len({one[4] for one in found}) == 7 and all(
        a[4] == b[4] for a, b in zip(found[::2], found[1::2], strict=True)
    )
    assert "trained on the chosen answer against the rejected one" in documents.kind


def test_a_labelled_row_is_a_document_with_its_label(write_jsonl, config):
    documents = documents_of(config(write_jsonl(*LABELLED), task="kto"))
    assert documents.members == 1 and documents.good.tolist() == [True, False, True, False, True, False, True]
    assert [one[3] for one in parts(documents)] == [6] * 7
    pairs = documents_of(config(write_jsonl(*ROWS), task="kto"))
    assert pairs.members == 1 and pairs.good.tolist() == [True, False] * 7
    assert parts(pairs) == parts(documents_of(config(write_jsonl(*ROWS), task="dpo")))


def test_rows_of_plain_training_have_no_answers(write_jsonl, config):
    documents = documents_of(config(write_jsonl({"prompt": "a", "response": "b"})))
    assert documents.members == 1 and documents.answers is None and documents.good is None


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_prompts_of_one_token_are_equal_if_their_token_is(write_jsonl, config, task):
    rows = [{"prompt": p, "chosen": c, "rejected": "z"} for p, c in ("ax", "ay", "bx")]
    hashes = [one[4] for one in parts(documents_of(config(write_jsonl(*rows), task=task)))]
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3] != hashes[4] == hashes[5]


def test_a_prompt_ends_where_the_ids_of_the_answers_begin_to_differ():
    """A template that rewrites its prompt by what follows: what both have is less than the text before the answer."""
    row = {"chosen": turns("ab"), "rejected": turns("acde")}
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ messages|length }}{{ m.content }}{% else %}"
    source += "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    template = JinjaTemplate("t", {"default": "x" + source}, {})
    layout = preference_layout(row, (), "dpo", "f:1")
    chosen, rejected = RowEncoder(layout, template, TOKENIZERS["bytes"], 256, "response", "")(row, "f:1").documents
    assert (text_of(chosen.ids), text_of(rejected.ids)) == ("x2ab\0", "x4ac4de\0")
    assert chosen.prompt == rejected.prompt == 1


def test_a_pair_of_the_same_answers_is_left_out_and_counted(write_jsonl, config):
    same = {"prompt": "a", "chosen": "b\n\nc", "rejected": "b\nc"}  # world writes no blank line inside a turn
    for task, each in (("dpo", 2), ("kto", 2)):
        documents = documents_of(config(write_jsonl(same, *ROWS, same), task=task, template="world"))
        assert len(documents.lengths) == 7 * each
        (lost,) = documents.lost
        assert "left out, chosen and rejected are the same: 2 rows (" in lost.what and "jsonl:1, " in lost.what
        assert (lost.share, lost.unit) == (pytest.approx(2 / 9), "rows") and "skip" not in lost.what
    assert len(documents_of(config(write_jsonl(same), task="dpo", template="raw")).lengths) == 2
    with pytest.raises(UserError, match="no row can be used: left out, chosen and rejected are the same: 1 row"):
        documents_of(config(write_jsonl(same), task="dpo", template="world"))


def test_bad_rows_stop_the_run_or_are_skipped_and_counted(write_jsonl, config):
    rows = [{**ROWS[0], "rejected": ""}, ROWS[1], {**ROWS[2], "chosen": None}, {**ROWS[3], "prompt": ""}, ROWS[4]]
    with pytest.raises(UserError, match=r"jsonl:1: field 'rejected' is empty.*\(--bad_rows skip"):
        documents_of(config(write_jsonl(*rows), task="dpo"))
    documents = documents_of(config(write_jsonl(*rows), task="dpo", bad_rows="skip"))
    assert [one[0] for one in parts(documents)] == [2, 2, 5, 5]
    assert [lost.share for lost in documents.lost] == [0.2] * 3
    reasons = [lost.what.split("skip), ")[1].split(":")[0] for lost in documents.lost]
    assert reasons[0] == "field 'rejected' is empty" and reasons[2] == "nothing before the answers"


def test_an_answer_that_trains_nothing_is_a_bad_row(write_jsonl, config):
    masked = {"role": "assistant", "content": "b", "weight": 0}
    row = {"prompt": "a", "chosen": [masked], "rejected": [{"role": "assistant", "content": "c"}]}
    with pytest.raises(UserError, match="an answer of which nothing is trained"):
        documents_of(config(write_jsonl(row), task="dpo", template="world"))


@pytest.mark.parametrize("skip", ["stop", "skip"])
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_data_without_answers_is_refused_with_what_is_expected(tmp_path, write_jsonl, config, task, skip):
    (tmp_path / "book.txt").write_text("long ago")
    np.save(tmp_path / "ids.npy", np.arange(1, 9, dtype=np.uint16))
    expected = f"--task {task} reads rows with (a prompt, a chosen and a rejected|answers and labels)"
    for name, found in (("book.txt", "text"), ("ids.npy", "token ids")):
        with pytest.raises(UserError, match=f"{name}: {expected}.*and this is {found}: give such rows, or --task sft"):
            documents_of(config(str(tmp_path / name), task=task, bad_rows=skip))
    with pytest.raises(UserError, match=f"--task {task} expects .*fields found: text"):
        documents_of(config(write_jsonl({"text": "a"}, {"text": "b"}), task=task, bad_rows=skip))


def test_changes_of_the_prompt_are_counted_once_a_row(write_jsonl, config):
    rows = [
        {"prompt": "a\n\nb", "chosen": "c\n\nd", "rejected": "e"},
        {"prompt": "f\n\ng", "chosen": "h", "rejected": "i"},
    ]
    documents = documents_of(config(write_jsonl(*rows), task="dpo", template="world"))
    (note,) = [note for note in documents.notes if "blank lines" in note]
    assert note.split(": ")[1].startswith("3 turns whose blank lines became")


@pytest.fixture
def made(monkeypatch):
    calls = []
    run = tokenise.run

    def counting(*args):
        calls.append(args)
        return run(*args)

    monkeypatch.setattr("rwkv_bone.data.part.run", counting)
    return calls


def test_an_entry_of_the_cache_holds_all_and_is_of_its_task(write_jsonl, config, made):
    path = write_jsonl(*ROWS)
    fresh = {task: documents_of(config(path, task=task)) for task in ("dpo", "kto")}
    assert len(made) == 2
    for task in ("dpo", "kto", "simpo"):
        kept = documents_of(config(path, task=task))
        expected = fresh["kto" if task == "kto" else "dpo"]
        assert parts(kept) == parts(expected) and kept.members == expected.members and kept.notes != ()
        assert (kept.good is None) == (task != "kto")
    assert len(made) == 2, "tasks that compare pairs read the same entry"
    assert fresh["kto"].good.tolist() == documents_of(config(path, task="kto")).good.tolist()
    documents_of(config(path, sft_field=("prompt", "chosen")))
    documents_of(config(path, task="dpo", sft_field=("prompt", "rejected", "chosen")))
    assert len(made) == 4


def test_several_processes_give_what_one_gives(write_jsonl, config):
    rows = [*ROWS, ROWS[0] | {"rejected": "1"}] * 3
    cfg = config(write_jsonl(*rows), task="kto", template="world")
    part = Part(cfg, 256, cfg.data_file[0], False)
    settings = tokenise.RowSettings(
        tokenise.RowReader(part.source.parse, part.source.places, False),
        part.layout(part.source),
        *("world", "bytes", 256, "response", ""),
    )
    items = list(part.split.items(part.source))
    blocks = [([(number, raw) for number, raw, _ in items[i : i + 5]], 5) for i in range(0, len(items), 5)]
    one, two = (list(tokenise.run(settings, blocks, 0, processes=count)) for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        for name in ("tokens", "lengths", "trained", "prompts", "numbers", "answers", "good"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist()
        assert a.skipped == b.skipped
    assert sum(len(one.skipped) for one in two) == 3


def labelled(good, bad) -> Documents:
    none = np.empty(0, dtype=np.int64)
    return Documents("f", "", none, none, none, None, str, none, good=np.array([True] * good + [False] * bad))


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        (10, 10, ""),
        (40, 30, ""),
        (30, 10, "30 good and 10 bad answers: --undesirable_weight 2.25 to 3 balances them"),
        (10, 40, "10 good and 40 bad answers: --desirable_weight 4 to 5.33 balances them"),
        (5, 0, "warning: --task kto learns from good and bad answers, and all are good (5 answers): add bad ones"),
        (0, 1, "warning: --task kto learns from good and bad answers, and all are bad (1 answer): add good ones"),
    ],
)
def test_numbers_of_good_and_bad_answers_that_do_not_balance_are_said(good, bad, expected):
    line = balance_line([labelled(good, bad)])
    assert line.startswith(expected) and bool(line) == bool(expected)
    assert balance_line([labelled(good, 0), labelled(0, bad)]) == line


@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        (ROWS[:2], "dpo", [("0 + 1?", "1"), ("1 + 1?", "2")]),
        (LABELLED[:4], "kto", [("0 + 1?", "1"), ("2 + 1?", "3")]),
        (ROWS[:2], "kto", [("0 + 1?", "1"), ("1 + 1?", "2")]),
        ([{"prompt": "a", "response": "b"}], "dpo", [("a", "b")]),  # such as --sample_prompts may name
    ],
)
def test_the_answer_expected_of_held_out_data_is_the_good_one(write_jsonl, config, rows, task, expected):
    path = write_jsonl(*rows)
    assert load_pairs(config(path, task=task), path, TOKENIZERS["bytes"]) == expected
    assert load_pairs(config(path, task=task), path, TOKENIZERS["bytes"], 1) == expected[:1]


def test_held_out_prompts_that_cannot_be_read_are_refused_for_their_task(write_jsonl, config):
    path = write_jsonl({"a": "b"})
    with pytest.raises(UserError, match="--task dpo expects two answers"):
        load_pairs(config(path, task="dpo"), path, TOKENIZERS["bytes"])


def test_tables_hold_answers_too(tmp_path, config):
    turns_as_text = json.dumps(turns(["hi", "yes"])).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'chosen,rejected\n"{turns_as_text}","{turns_as_text.replace("yes", "no")}"\n')
    (tmp_path / "b.csv").write_text("prompt,completion,label\nhi,yes,True\nhi,no,False\n")
    pairs = documents_of(config(str(tmp_path / "a.csv"), task="dpo", template="world"))
    single = documents_of(config(str(tmp_path / "b.csv"), task="kto", template="world"))
    assert [one[1:] for one in parts(pairs)] == [one[1:] for one in parts(single)]
    assert single.good.tolist() == [True, False]
