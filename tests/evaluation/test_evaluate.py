"""An evaluation from rows to its files: what is asked, what is kept, and what never depends on anything else."""

import json
import os
import random

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.adapters import AdapterSettings, inject
from rwkv_bone.config import MergeConfig
from rwkv_bone.conversion.merge import merge_files
from rwkv_bone.data.tokenizer import load_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.evaluation import judge
from rwkv_bone.evaluation.tasks import choices_of, chosen
from rwkv_bone.inference.evaluate import exact_match
from rwkv_bone.inference.load import load_model
from rwkv_bone.inference.voice import Voice, Written
from rwkv_bone.models import RWKV
from tests.conftest import adapter_state, random_model
from tests.evaluation.answering import records, result, write_rows

PAIRS = [{"prompt": f"{i} in words: ", "response": f"number {i}"} for i in range(7)]


@pytest.fixture
def drawn(evaluations):
    """Twenty-one drawn answers to seven prompts."""
    rows = write_rows(evaluations.folder / "rows.jsonl", PAIRS)
    settings = {"task": "exact", "data_file": rows, "max_new": 6, "temperature": 1.0, "samples": 3, "batch": 4}
    return lambda output="out", **more: evaluations(output, **{**settings, **more})


# --- the same as elsewhere ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tokenizer.json of the twelve characters that the third-party model knows; # ends a document."""
    import tokenizers

    folder = tmp_path_factory.mktemp("digits")
    letters = {letter: number for number, letter in enumerate("0123456789,#")}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="#"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "#"}')
    return str(folder / "tokenizer.json")


def test_exact_answers_are_those_of_trainings_measurement_and_of_a_plain_greedy_loop(evaluations, shared, digits):
    model = str(shared / "models" / "blinkdl-reverse" / "rwkv7-reverse-L2-D32-ft.pth")
    source = random.Random(1)
    numbers = ["".join(source.choice("0123456789") for _ in range(n)) for n in [10] * 3 + [18] * 5 + [26] * 2]
    rows = [{"prompt": f"{number},", "response": number[::-1]} for number in numbers]
    out = evaluations(
        load_model=model, tokenizer=digits, task="exact", data_file=write_rows(evaluations.folder / "r.jsonl", rows)
    )
    loaded = load_model(model)
    share, answers = exact_match(loaded, load_tokenizer(digits, 12), [(r["prompt"], r["response"]) for r in rows])
    found = records(out)
    assert [record["right"] for record in found] == [answer.correct for answer in answers]
    assert result(out)["scores"]["accuracy"]["value"] == share and 0.2 < share < 1
    for row, record in list(zip(rows, found, strict=True))[1:5]:
        ids = ["0123456789,#".index(letter) for letter in row["prompt"]]
        while len(ids) < len(row["prompt"]) + len(row["response"]) + 1:
            ids.append(int(loaded(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == 11:
                break
        written = "".join("0123456789,#"[i] for i in ids[len(row["prompt"]) :])
        assert record["text"] == written.rstrip("#")


def log_likelihood(model, context, continuation):
    ids = [*context, *continuation]
    logits = torch.log_softmax(model(torch.tensor([ids]))[0].detach().double(), dim=-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids)))


def test_choices_are_chosen_by_likelihood_alone_and_by_length(evaluations):
    stone = {"text": ["sand", "water", "a very old stone"], "label": ["A", "B", "C"]}
    rows = [
        {"question": "What is wet?", "choices": stone, "answerKey": "B"},
        {"ctx": "He sat", "endings": ["down.", "on top of the hill.", "x"], "label": "0"},
        {"question": "2+2?", "choices": ["4", "twenty-two"], "answer": 1},
    ]
    out = evaluations(task="choice", data_file=write_rows(evaluations.folder / "c.jsonl", rows), batch=2)
    model = load_model(evaluations.model)
    for row, record in zip(rows, records(out), strict=True):
        question = row.get("question") or row["ctx"]
        texts = row.get("endings") or (row["choices"]["text"] if isinstance(row["choices"], dict) else row["choices"])
        prompt = f"Question: {question}\nAnswer:"
        totals = [log_likelihood(model, prompt.encode(), f" {text}".encode()) for text in texts]
        normed = [total / len(text) for total, text in zip(totals, texts, strict=True)]
        assert record["log_likelihoods"] == pytest.approx(totals, rel=1e-4)
        right = {"B": 1, "0": 0, 1: 1}[row.get("answerKey", row.get("label", row.get("answer")))]
        assert record["expected"] == texts[right]
        assert record["right"] == (totals.index(max(totals)) == right)
        assert record["right_normed"] == (normed.index(max(normed)) == right)


def test_a_perplexity_is_that_of_each_text_from_the_end_of_another_on(evaluations):
    texts = ["The cat sat.", "é", "x" * 70]
    rows = write_rows(evaluations.folder / "t.jsonl", [{"text": text} for text in texts])
    out = evaluations(task="perplexity", data_file=rows, batch=2)
    model = load_model(evaluations.model)
    nats = [-log_likelihood(model, [0], text.encode()) for text in texts]
    assert [record["nats"] for record in records(out)] == pytest.approx(nats, rel=1e-4)
    scores = result(out)["scores"]
    assert scores["nats per byte"]["value"] == pytest.approx(sum(nats) / 84, rel=1e-4)
    assert scores["bits per byte"]["value"] == pytest.approx(sum(nats) / 84 * 1.4426950408889634, rel=1e-4)
    (evaluations.folder / "one.txt").write_text("The cat sat.")
    one = evaluations("one", task="perplexity", data_file=str(evaluations.folder / "one.txt"))
    assert records(one)[0]["nats"] == pytest.approx(nats[0], rel=1e-4)
    assert result(one)["scores"]["nats per byte"]["low"] is None


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (["b", "a"], "a", 1),
        (["b", "a"], "A", 0),
        (["b", "a"], 1, 1),
        (["1", "0", "2"], "0", 1),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "3", 2),
        ({"text": ["x", "y"], "label": ["C", "D"]}, "D", 1),
    ],
)
def test_the_right_choice_is_named_in_every_way_that_is_published(choices, answer, place):
    assert chosen(answer, *choices_of(choices)) == place


def test_a_right_choice_that_is_none_is_refused_with_its_row(evaluations):
    path = write_rows(evaluations.folder / "c.jsonl", [{"question": "?", "choices": ["a", "b"], "answer": "E"}])
    with pytest.raises(UserError, match=r"c.jsonl:1: the right choice is 'E'; expected a label, a letter"):
        evaluations(task="choice", data_file=path)
    path = write_rows(evaluations.folder / "d.jsonl", [{"question": "?", "choices": "a b", "answer": "A"}])
    with pytest.raises(UserError, match=r"d.jsonl:1: choices: expected a list of two texts or more"):
        evaluations(task="choice", data_file=path)


# --- what an answer depends on ---


def test_an_answer_depends_neither_on_the_batch_nor_on_the_other_prompts(evaluations, drawn):
    whole = {(one["item"], one["sample"]): one for one in records(drawn())}
    assert len({one["text"] for one in whole.values()}) > 15
    for name, more in {"alone": {"batch": 1}, "together": {"batch": 50}, "fewer": {"limit": 3, "samples": 2}}.items():
        for one in records(drawn(name, **more)):
            assert one == whole[one["item"], one["sample"]]
    some = write_rows(evaluations.folder / "some.jsonl", [{"prompt": "another", "response": "?"}, PAIRS[2]])
    others = records(drawn("others", data_file=some))
    assert [one["text"] for one in others if one["item"] == 2] == [whole[3, k]["text"] for k in range(3)]


def test_a_kill_at_any_byte_loses_no_whole_answer_and_changes_none(drawn, capsys, monkeypatch):
    def write(voice, prompts, seeds, **how):
        for ids, seed in zip(prompts, seeds, strict=True):
            yield Written(f"{seed}|{bytes(ids).decode()}", "end", 7)

    monkeypatch.setattr(Voice, "write", write)
    out = drawn()
    path = out / "answers.jsonl"
    whole, ends = path.read_bytes(), result(out)
    assert len(set(one["text"] for one in records(out))) == 21
    lines = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    # Every third line: of batches of four these are all places.
    places = {
        *lines[::3],
        *(end - 1 for end in lines[1::3]),
        *range(0, len(whole), 1997),
        *range(len(whole) - 3, len(whole)),
    }
    for place in sorted(places):
        path.write_bytes(whole[:place])
        (out / "result.json").unlink(missing_ok=True)
        drawn()
        assert path.read_bytes() == whole, place
    assert {**result(out), "seconds": 0, "crc32": ""} == {**ends, "seconds": 0, "crc32": ""}
    # A power cut may leave anything where the last lines were being written.
    path.write_bytes(whole[: lines[5]] + b"\0" * 700)
    drawn()
    assert path.read_bytes() == whole
    assert "5 of 21 answers are there: going on" in capsys.readouterr().err


def test_what_was_answered_before_an_interruption_is_kept_and_said(evaluations, drawn, capsys, monkeypatch):
    out = drawn()
    whole = (out / "answers.jsonl").read_bytes()
    from rwkv_bone.inference import voice

    real, calls = voice.generate, []

    def interrupted(*arguments, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr("rwkv_bone.inference.voice.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn("again")
    assert "8 of 21 answers are in" in capsys.readouterr().err
    assert drawn("again") and (evaluations.folder / "again" / "answers.jsonl").read_bytes() == whole


def test_one_evaluation_at_a_time_works_in_a_folder(drawn, evaluations):
    from rwkv_bone import run_lock

    with run_lock.held(evaluations.folder / "out", "--output"), pytest.raises(UserError, match="in use by another"):
        drawn()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"batch": 5}, r"^--batch 5 \(it began with 4\)"),
        ({"samples": 2, "seed": 3}, r"^--samples 2 \(it began with 3\), --seed 3 \(it began with 0\)"),
        ({"stop": ("x",)}, r"^--stop x \(it began with \(empty\)\)"),
        ({"limit": 4}, r"^--limit 4 \(it began with 0\)"),
        ({"precision": "bf16"}, "^--precision bf16"),
    ],
)
def test_other_settings_are_refused_by_name_and_the_answers_kept(drawn, more, words):
    out = drawn()
    before = (out / "answers.jsonl").read_bytes()
    with pytest.raises(UserError, match=words):
        drawn(**more)
    assert (out / "answers.jsonl").read_bytes() == before
    drawn(**more, overwrite=True)
    saved = json.loads((out / "config.json").read_text())["settings"]
    assert all(saved[name] == (list(value) if type(value) is tuple else value) for name, value in more.items())


def test_another_model_other_rows_and_damage_are_refused_too(drawn, evaluations, tiny_checkpoint):
    out = drawn()
    rows = evaluations.folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("number 3", "number 33"))
    with pytest.raises(UserError, match=r"^--data_file .*: other rows than it began with"):
        drawn()
    write_rows(rows, PAIRS)
    other = str(tiny_checkpoint("other.pth", seed=9, vocab_size=256))
    with pytest.raises(UserError, match=r"^--load_model .*other.pth or --adapter \(none\): other weights"):
        drawn(load_model=other)
    path = out / "answers.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sample": 1', b'"sample": 2', 1))
    with pytest.raises(UserError, match=r"answers.jsonl:2: damaged"):
        drawn()
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="holds answers without a config.json"):
        drawn()
    (out / "config.json").write_text('{"data": {}}')
    with pytest.raises(UserError, match="config.json of something else"):
        drawn()


# --- what is asked ---

WORD_PROBLEMS = [
    {"question": f"{i} and {i}?", "answer": f"It is {i}+{i}.\n#### {2 * i}"} for i in range(1, 9)
]  # fmt: skip


def prompts(evaluations, output, **settings):
    evaluations.writes(lambda prompt: ("", "end"))
    return [record["prompt"] for record in records(evaluations(output, **settings))]


def test_a_question_stands_after_worked_examples_as_the_template_writes_them(evaluations):
    test = write_rows(evaluations.folder / "test.jsonl", WORD_PROBLEMS[:2])
    train = write_rows(evaluations.folder / "train.jsonl", [*WORD_PROBLEMS[:2], WORD_PROBLEMS[5]])
    settings = {"task": "gsm8k", "data_file": test, "shots": 1, "shots_file": train}
    assert prompts(evaluations, "raw", **settings)[0] == (
        "Question: 6 and 6?\nAnswer: It is 6+6.\n#### 12\n\nQuestion: 1 and 1?\nAnswer:"
    )
    assert prompts(evaluations, "world", **settings, template="world", system="Count.")[1] == (
        "System: Count.\n\nUser: 6 and 6?\n\nAssistant: It is 6+6.\n#### 12\n\nUser: 2 and 2?\n\nAssistant:"
    )
    asked = prompts(evaluations, "own", task="gsm8k", data_file=test, prompt="{question}\\nSo: ")
    assert asked == ["1 and 1?\nSo: ", "2 and 2?\nSo: "]


def test_worked_examples_are_drawn_by_the_seed_and_never_evaluated_beyond_the_limit_either(evaluations):
    test = write_rows(evaluations.folder / "test.jsonl", WORD_PROBLEMS[:6])
    train = write_rows(evaluations.folder / "train.jsonl", WORD_PROBLEMS)
    settings = {"task": "gsm8k", "data_file": test, "shots_file": train, "shots": 2}
    asked = prompts(evaluations, "two", **settings, limit=1)[0]
    assert "7 and 7?" in asked and "8 and 8?" in asked and asked.count("Question:") == 3
    with pytest.raises(UserError, match=r"^--shots 3: .* has 2 rows that can be worked examples \(6 are evaluated\)"):
        evaluations("three", **{**settings, "shots": 3})
    few = {**settings, "data_file": write_rows(evaluations.folder / "one.jsonl", WORD_PROBLEMS[:1]), "shots": 4}
    orders = {prompts(evaluations, f"seed{seed}", **few, seed=seed)[0] for seed in (0, 1, 2)}
    assert len(orders) == 3
    assert prompts(evaluations, "again", **few, seed=1)[0] in orders


def test_fields_of_ones_own_are_named_and_a_wrong_name_is_refused(evaluations):
    rows = write_rows(evaluations.folder / "r.jsonl", [{"q": "1+1?", "a": {"value": 2}}])
    settings = {"task": "gsm8k", "data_file": rows}
    assert prompts(evaluations, "own", **settings, task_field=("question=q", "answer=a.value")) == [
        "Question: 1+1?\nAnswer:"
    ]
    with pytest.raises(
        UserError, match=r"r.jsonl:1: no field 'question'; found: q, a. Name it with --task_field question="
    ):
        evaluations("no", **settings)
    with pytest.raises(UserError, match=r"^--task_field text=q: --task gsm8k has the fields question, answer"):
        evaluations("no", **settings, task_field=("text=q",))
    with pytest.raises(UserError, match=r"^--prompt 'Q: {query}': {query} is no field of --task gsm8k"):
        evaluations("no", **settings, task_field=("question=q", "answer=a.value"), prompt="Q: {query}")


def test_rows_that_cannot_be_used_stop_or_are_skipped_and_counted(evaluations, capsys):
    rows = [
        WORD_PROBLEMS[0],
        {"question": "", "answer": "#### 1"},
        {"question": "why?", "answer": "so"},
        WORD_PROBLEMS[1],
    ]
    path = write_rows(evaluations.folder / "r.jsonl", rows)
    with pytest.raises(UserError, match=r"r.jsonl:2: field 'question' is empty.* \(--bad_rows skip"):
        evaluations("stop", task="gsm8k", data_file=path)
    evaluations.writes(lambda prompt: ("#### 2", "end"))
    out = evaluations("skip", task="gsm8k", data_file=path, bad_rows="skip")
    assert [record["item"] for record in records(out)] == [1, 4]
    assert result(out)["counts"] == {"rows skipped": 2}
    said = capsys.readouterr()
    assert "r.jsonl:3: its answer holds no right answer" in said.err and "2 rows skipped (--bad_rows skip)" in said.out
    # A bad row beyond the limit is not asked about.
    evaluations("limited", task="gsm8k", data_file=path, limit=1)


def test_worked_examples_are_read_once_for_all_questions(evaluations, monkeypatch):
    path = write_rows(evaluations.folder / "test.jsonl", WORD_PROBLEMS[:5])
    train = write_rows(evaluations.folder / "train.jsonl", WORD_PROBLEMS)
    read, forward = [], RWKV.forward
    monkeypatch.setattr(RWKV, "forward", lambda self, ids, **how: read.append(ids.numel()) or forward(self, ids, **how))
    out = evaluations(task="gsm8k", data_file=path, shots_file=train, shots=2, batch=2, max_new=4)
    asked = [record["prompt"] for record in records(out)]
    shared = len(os.path.commonprefix(asked))  # a token is a byte
    assert shared > 60 and len(set(asked)) == 5
    # Each batch shares a little more, if that is not worth a pass: the rest of each question is read.
    assert sum(read) == shared + sum(len(prompt) - shared for prompt in asked)


def test_a_long_prompt_is_read_whole(evaluations):
    path = write_rows(evaluations.folder / "r.jsonl", [{"prompt": "word " * 900, "response": "x"}])
    (record,) = records(evaluations(task="exact", data_file=path))
    assert record["prompt"] == "word " * 900


def test_an_answer_stops_where_its_turn_or_its_publisher_does(evaluations, monkeypatch):
    seen = []

    def write(voice, prompts, seeds, *, stop_texts, max_new, **how):
        seen.append((tuple(stop_texts), max_new))
        yield from (Written("", "end", 0) for _ in prompts)

    monkeypatch.setattr(Voice, "write", write)
    path = write_rows(evaluations.folder / "r.jsonl", WORD_PROBLEMS[:1])
    evaluations("raw", task="gsm8k", data_file=path)
    evaluations("world", task="gsm8k", data_file=path, template="world")
    evaluations("own", task="gsm8k", data_file=path, template="world", stop=("\\n\\nUser:",), max_new=7)
    pair = write_rows(evaluations.folder / "p.jsonl", [{"prompt": "a", "response": "four"}])
    evaluations("exact", task="exact", data_file=pair, template="world")
    assert seen == [(("Question:",), [512]), (("\n\n",), [512]), (("\n\nUser:",), [7]), ((), [6])]


def test_what_is_thought_is_not_judged(evaluations):
    path = write_rows(evaluations.folder / "r.jsonl", WORD_PROBLEMS[:3])
    answers = iter([">\n#### 9\n</think>\n#### 2", ">\n#### 4", ">\n1\n</think>\nIt is 6."])
    evaluations.writes(lambda prompt: (next(answers), "end"))
    found = records(evaluations(task="gsm8k", data_file=path, template="g1-think"))
    assert [(one["answer"], one["right"]) for one in found] == [("2", True), (None, False), ("6", True)]


# --- rows as they are published: few, written for these tests, in the layouts of the files ---


def questions_and_answers(evaluations, task, rows, answers=(), **settings):
    """[(prompt, expected, right)] where the model writes these answers, one after another."""
    said = iter(answers)
    if answers:
        evaluations.writes(lambda prompt: (next(said), "end"))
    path = write_rows(evaluations.folder / "published.jsonl", rows)
    found = records(evaluations("published", task=task, data_file=path, overwrite=True, **settings))
    return [(one["prompt"], one["expected"], one["right"]) for one in found]


def test_rows_of_math_are_read_as_published(evaluations):
    about = {"level": "Level 5", "type": "Algebra"}
    rows = [
        {"problem": "Half of $x$ is 3. Find $x$.", "solution": r"$x = 2 \cdot 3 = \boxed{6}$.", **about},
        {"problem": "Where do they meet?", "solution": r"At $\boxed{\left(1, \frac{1}{2}\right)}$.", **about},
        {"problem": "Solve.", "solution": r"First $\boxed{1}$, no: $\boxed{x \le \text{ 3}}$", **about},
        {"problem": "How many?", "solution": "...", "answer": "1,000", "subject": "Algebra", "unique_id": "a/1.json"},
    ]
    said = [r"So $\boxed{6}$.", r"The answer is $(1, 0.5)$.", r"\boxed{3}", r"\boxed{1000}"]
    found = questions_and_answers(evaluations, "math", rows, said)
    assert found[0][0] == "Problem:\nHalf of $x$ is 3. Find $x$.\n\nSolution:"
    expected = ["6", r"\left(1, \frac{1}{2}\right)", r"x \le \text{ 3}", "1,000"]
    assert [(one, right) for _, one, right in found] == list(zip(expected, [True, True, False, True], strict=True))


def test_rows_of_svamp_are_read_as_published_and_as_on_the_hub(evaluations):
    body, question = "Ann has 8 pens. She gives 3 away.", "How many has she now?"
    published = {"ID": "chal-1", "Body": body, "Question": question, "Equation": "( 8.0 - 3.0 )", "Answer": 5.0}
    hub = {**published, "Answer": "5.0", "Type": "Subtraction", "question_concat": f"{body} {question}"}
    rows = [published, hub, {name: hub[name] for name in ("question_concat", "Answer")}]
    rows.append({name: hub[name] for name in ("Body", "question_concat", "Answer")})
    found = questions_and_answers(evaluations, "svamp", rows, ["8 - 3 = 5", "#### 5", "It is 5.", "8"])
    assert {prompt for prompt, _, _ in found} == {f"Question: {body} {question}\nAnswer:"}
    assert [(expected, right) for _, expected, right in found] == [("5.0", True)] * 3 + [("5.0", False)]


def test_rows_of_multiple_choice_are_read_as_published(evaluations):
    arc = {"text": ["a stone", "rain", "sand"], "label": ["1", "2", "3"]}
    rows = [
        {"id": "Q1", "question": "What is wet?", "choices": arc, "answerKey": "2"},  # ARC
        {
            "question": "What is wet?",
            "subject": "x",
            "choices": ["a stone", "rain", "sand", "fire"],
            "answer": 1,
        },  # MMLU
        {"question": "What is wet?", "choices": ["a stone", "rain"], "answer": "B"},
        {"ind": 4, "ctx_a": "He", "ctx_b": "", "ctx": "He went", "endings": ["up.", "off."], "label": "1"},  # HellaSwag
    ]
    found = questions_and_answers(evaluations, "choice", rows)
    prompts = ["Question: What is wet?\nAnswer:"] * 3 + ["Question: He went\nAnswer:"]
    assert [(prompt, expected) for prompt, expected, _ in found] == list(
        zip(prompts, ["rain", "rain", "rain", "off."], strict=True)
    )
    assert result(evaluations.folder / "published")["judged_by"] == "the likeliest choice"


def test_an_answer_that_is_cut_while_it_thinks_is_cut_and_not_right(evaluations):
    path = write_rows(evaluations.folder / "r.jsonl", WORD_PROBLEMS[:2])
    cut = iter([(">\nSo #### 2\nThe answer is 2, \\boxed{2}", "length"), (">\n#### 4\n</think>\n#### 4", "length")])
    evaluations.writes(lambda prompt: next(cut))
    out = evaluations(task="gsm8k", data_file=path, template="g1-think")
    assert [(one["answer"], one["right"], one["finish_reason"]) for one in records(out)] == [
        (None, False, "length"),
        ("4", True, "length"),
    ]
    assert records(out)[0]["prompt"].endswith("Assistant: <think")
    assert result(out)["counts"] == {"cut by length": 2, "without an answer that the rule finds": 1}
    # Code of thoughts is not run.
    code = write_rows(evaluations.folder / "code.jsonl", CODE[1:])
    evaluations.writes(lambda prompt: (">\n```python\ndef one():\n    return 1\n```", "length"))
    out = evaluations("code", task="humaneval", data_file=code, template="g1-think", execute_code=True)
    assert records(out)[0]["right"] is False and result(out)["counts"]["cut by length"] == 1


# --- what is counted ---


def test_the_answers_of_gsm8ks_rows_are_right_and_others_are_counted_for_what_they_are(evaluations, shared, capsys):
    path = shared / "data" / "gsm8k" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gold = {f"Question: {row['question']}\nAnswer:": row["answer"] for row in rows}
    evaluations.writes(lambda prompt: (f" {gold[prompt]}", "end"))
    scores = result(evaluations(task="gsm8k", data_file=str(path), batch=500))["scores"]["accuracy"]
    assert (scores["right"], scores["of"], scores["high"]) == (1000, 1000, 1.0)
    answers = iter([("", "end"), ("I do not know", "end"), (" #### 1", "length"), (" #### 48,", "end")])
    evaluations.writes(lambda prompt: next(answers, ("The answer is $72.", "end")))
    out = evaluations("wrong", task="gsm8k", data_file=str(path), limit=5)
    counts = {"empty": 1, "without an answer that the rule finds": 1, "cut by length": 1}
    assert result(out)["counts"] == counts
    said = capsys.readouterr().out
    assert all(f"1 of 5 {what}" in said for what in counts)


CODE = [
    {
        "task_id": "Test/0",
        "prompt": 'def add(a, b):\n    """Add."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    },
    {
        "task_id": "Test/1",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
]


def test_code_is_written_down_unless_its_execution_is_asked_for_also_afterwards(evaluations, capsys, monkeypatch):
    path = write_rows(evaluations.folder / "code.jsonl", CODE)
    evaluations.writes(lambda prompt: (CODE[0]["canonical_solution"] if "add" in prompt else "    return 2\n", "text"))
    real = judge.code.run
    monkeypatch.setattr(judge.code, "run", lambda *a, **b: pytest.fail("executed"))
    out = evaluations(task="humaneval", data_file=path)
    assert [record["right"] for record in records(out)] == [None, None]
    assert result(out)["scores"] == {} and result(out)["counts"] == {"not judged": 2}
    assert "2 answers not judged: --execute_code 1" in capsys.readouterr().out
    monkeypatch.setattr(judge.code, "run", real)
    evaluations.writes(lambda prompt: pytest.fail("answered again"))
    evaluations(task="humaneval", data_file=path, execute_code=True)
    assert [record["right"] for record in records(out)] == [True, False]
    assert result(out)["scores"]["accuracy"]["right"] == 1 and "not judged" not in result(out)["counts"]


def judged_as(evaluations, task, row, answer, extract):
    """(whether an answer is right, what the result and the terminal say of how it was judged)."""
    path = write_rows(evaluations.folder / "rule.jsonl", [row])
    evaluations.writes(lambda prompt: (answer, "end"))
    out = evaluations("rule", task=task, data_file=path, extract=extract, overwrite=True)
    return records(out)[0]["right"], result(out)["judged_by"]


HALF = {"problem": "1/2?", "solution": r"It is $\boxed{\frac{1}{2}}$."}


@pytest.mark.parametrize(
    ("task", "row", "answer", "extract", "right", "words"),
    [
        # MATH's script compares tidied strings: 2/4 is no 1/2, but \dfrac12 and 0.5 are.
        ("math", HALF, r"\boxed{\frac{2}{4}}", "boxed", False, r"the last \boxed; equal as strings, by MATH's"),
        ("math", HALF, r"\boxed{\dfrac12}", "boxed", True, r"MATH's published rule (--extract boxed)"),
        ("math", HALF, "The answer is: 2/4", "metamath", False, "'The answer is: '; equal as strings, by MATH's"),
        ("math", HALF, "The answer is: 0.5", "metamath", True, "(--extract metamath)"),
        ("math", HALF, "Final Answer: The final answer is $2/4$. I hope it is correct.", "minerva", True, "by value"),
        ("math", HALF, r"So \boxed{\frac{2}{4}}", "auto", True, "whichever mark of an answer it has; equal by value"),
        # GSM8K's strict and flexible match compare strings: 18.0 is no 18, but $1,200. is 1200.
        (
            "gsm8k",
            {"question": "?", "answer": "#### 18"},
            "#### 18.0",
            "hashes",
            False,
            "####; equal as strings, by",
        ),
        ("gsm8k", {"question": "?", "answer": "#### 18"}, "so 18.0", "flexible", False, "lm_eval's rule for GSM8K"),
        ("gsm8k", {"question": "?", "answer": "#### 1,200"}, "so $1,200.", "flexible", True, "(--extract flexible)"),
        ("gsm8k", {"question": "?", "answer": "#### 18"}, "so 18.0", "number", True, "last number; equal as numbers"),
        ("gsm8k", {"question": "?", "answer": "#### 18"}, "The answer is: 18.0", "metamath", True, "equal as numbers"),
        # SVAMP writes every answer as 8.0, so strings would never be equal.
        ("svamp", {"question": "?", "answer": 8.0}, "so 8", "flexible", True, "equal as numbers (--extract flexible)"),
    ],
)
def test_each_rule_judges_as_those_who_publish_by_it(evaluations, capsys, task, row, answer, extract, right, words):
    found, by = judged_as(evaluations, task, row, answer, extract)
    assert (found, words in by) == (right, True), by
    assert f"\njudged by {by}\n" in capsys.readouterr().out


def test_of_several_samples_the_majority_and_pass_at_k_are_told(evaluations):
    path = write_rows(evaluations.folder / "r.jsonl", WORD_PROBLEMS[:2])
    answers = iter(["#### 5", "#### 2", "#### 2.0", "I pass", "#### 9", "#### 9", "#### 4", ""])
    evaluations.writes(lambda prompt: (next(answers), "end"))
    out = evaluations(task="gsm8k", data_file=path, samples=4, temperature=0.7)
    scores = {name: score["value"] for name, score in result(out)["scores"].items()}
    assert scores == {
        "accuracy, mean of samples": pytest.approx((2 / 4 + 1 / 4) / 2),
        "maj@4": 0.5,
        "pass@1": pytest.approx((2 / 4 + 1 / 4) / 2),
        "pass@4": 1.0,
    }


def test_where_there_is_no_network_one_sentence_says_what_is_missing(evaluations, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"^openai/gsm8k is not on this machine.*HF_HUB_OFFLINE is set"):
        evaluations(task="gsm8k")
    with pytest.raises(UserError, match=r"^--data_file is missing: --task exact has no rows of its own"):
        evaluations(task="exact")


def test_an_adapter_is_evaluated_as_its_merged_file_is_and_on_a_quantised_base_too(evaluations, tmp_path):
    model = random_model(seed=5, vocab_size=256)
    metadata = {"format": 1, "kind": "bone", "r": 8, "base": checkpoints.fingerprint(model.state_dict())}
    inject(model, settings=AdapterSettings("bone", 8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bone"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapter, merged = tmp_path / "run" / "rwkv-0.pth", tmp_path / "merged.pth"
    adapter.parent.mkdir()
    checkpoints.write_state(adapter, adapter_state(model), metadata)
    (adapter.parent / "config.json").write_text(json.dumps({"data": {"template": "world", "tokenizer": "auto"}}))
    merge_files(MergeConfig(base_model=evaluations.model, peft_checkpoint=str(adapter), output=str(merged)))
    settings = {"task": "exact", "data_file": write_rows(tmp_path / "r.jsonl", PAIRS[:3]), "max_new": 8}
    texts = {
        name: [one["text"] for one in records(evaluations(name, **settings, **more))]
        for name, more in {
            "base": {"template": "world"},
            "adapter": {"adapter": str(adapter)},  # in the template of its run
            "merged": {"load_model": str(merged), "template": "world"},
        }.items()
    }
    assert texts["adapter"] == texts["merged"] != texts["base"]
    quantised = evaluations("quantised", **settings, adapter=str(adapter), quant="int8")
    config = json.loads((quantised / "config.json").read_text())
    assert "projections in int8" in config["model"] and config["template"] == "world"
