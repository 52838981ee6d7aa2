"""Answers within texts: hand-checked cases, and lm_eval's own filters as an independent implementation."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from rwkv_bone.evaluation import extract
from rwkv_bone.evaluation.extract import after_hashes, boxed, code_block, flexible, last_number
from tests.evaluation.published import gsm8k_filters, hendrycks

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text("utf-8").splitlines()]
TEXTS = [case for case in CASES if "text" in case]
RULES = {case["rule"]: getattr(extract, case["rule"]) for case in TEXTS}
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "assets" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize("rule", RULES)
def test_hand_checked_answers(rule):
    wrong = [
        (case["text"], found, case["answer"])
        for case in TEXTS
        if case["rule"] == rule and (found := RULES[rule](case["text"])) != case["answer"]
    ]
    assert wrong == []


def test_every_rule_has_cases_and_there_are_two_hundred():
    public = {name for name, rule in vars(extract).items() if inspect.isfunction(rule) and name[0] != "_"}
    assert set(RULES) == public - {"after_thinking"}
    assert len(CASES) >= 200 and len({json.dumps(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("rule", RULES)
def test_thoughts_are_no_answer_and_a_text_without_one_has_none(rule):
    answers = "The answer is: 5\n#### 5\n\\boxed{5}\nFinal Answer: The final answer is $5$. (A)\n```\nx\n```\n$y$"
    for text in ("", " \n", f"<think>{answers}", f"{answers}</think>", f"<think>{answers}</think>\n<think>5"):
        assert RULES[rule](text) is None, text
    assert RULES[rule](f"<think>no</think>{answers}") == RULES[rule](answers) is not None


@pytest.mark.parametrize("rule", RULES)
def test_a_long_text_takes_a_time_in_proportion(rule):
    """Each would take hours, if the work grew with the square of the length."""
    for piece in (
        "1",
        "1,11",
        " ",
        "answer to ",
        "\\boxed{",
        ".",
        "```\n",
        "~",
        "<think>",
        "\\frac{1",
        "(",
        "*",
        "a_",
        "^{",
    ):
        RULES[rule]((piece * 40_000)[:40_000])


# ---- lm_eval


def test_the_strict_match_of_lm_eval_finds_the_same():
    strict, _ = gsm8k_filters()
    for text in {case["text"] for case in TEXTS}:
        theirs, ours = strict(text), after_hashes(text)
        if "<think>" in text:  # it looks there, too
            continue
        if text == "#### ...":  # dots are an answer to it, which is never right
            assert (theirs, ours) == ("...", None)
            continue
        assert ours == (theirs.replace(",", "") if theirs else None), text  # its metric leaves the commas out later


def test_the_flexible_extract_of_lm_eval_finds_the_same():
    _, theirs = gsm8k_filters()
    for text in {case["text"] for case in TEXTS}:
        assert flexible(text) == theirs(text) or "<think>" in text, text


def test_the_last_number_is_lm_evals_flexible_extract_read_with_care():
    """Where they differ, ours is the number a reader would say; each difference is of one of these kinds."""
    _, flexible = gsm8k_filters()
    kinds = (
        r"[0-9]\s?-\s?[0-9]",  # a difference is no negative number
        r"\.\.\.",  # dots are no number
        r"/|frac",  # fractions
        r"[eE^⁰-⁹²×_]",  # powers, indices
        r"−|[０-９]",  # other signs and digits
        r"Rs\.",  # a full stop is no decimal point
        r"[0-9],[0-9]{1,2}(?![0-9])",  # a comma that does not part thousands
        r"\{,\}|\\,|\\!",  # spaces of LaTeX between thousands
        r"-\$|\$-",  # a currency behind the sign
        r"<think>",
        r"[0-9]:[0-9]",
    )
    for text in {case["text"] for case in TEXTS}:
        theirs = (flexible(text) or "").replace(",", "").replace("$", "").removesuffix(".") or None
        if last_number(text) != theirs:
            assert any(re.search(kind, text) for kind in kinds), (text, last_number(text), theirs)


def test_the_box_of_lm_eval_holds_the_same():
    published = hendrycks()

    def theirs(text):
        found = published.last_boxed_only_string(text)
        return found and published.remove_boxed(found)

    for text in {case["text"] for case in TEXTS}:
        if re.search(r"<think>|\\boxed(?!\{| 5)|\\fbox|\\left\\\{.*\\right\.", text):
            continue  # thoughts; what it takes for an error: no braces, \fbox; an escaped brace without its partner
        assert boxed(text) == (theirs(text) or "").strip() or not theirs(text) and boxed(text) is None, text


def test_the_gold_answers_of_gsm8k_are_read_by_every_rule():
    """Each solution ends with `#### `, an integer perhaps with commas; the split here is independent of the rules."""
    bundled = Path(__file__).resolve().parents[1] / "assets" / "data" / "gsm8k" / "train.jsonl"
    files = [path.read_text("utf-8") for path in (bundled, GSM8K) if path.exists()]
    rows = [json.loads(line) for file in files for line in file.splitlines()]
    for answer in (row["answer"] for row in rows[::3]):
        gold = str(int(answer.split("####")[1].replace(",", "")))
        assert after_hashes(answer) == last_number(answer) == extract.number_answer(answer) == gold
        assert (flexible(answer) or "").replace(",", "") == extract.final_answer(answer).replace(",", "") == gold
        assert extract.metamath_number(f"{answer}\nThe answer is: {gold}") == gold
    assert len(rows) == 1000 + 1319 * GSM8K.exists()


# ---- options


def test_another_block_may_be_asked_for():
    assert code_block("```\na\n```\n```python\ndef f(x): pass\n```", "def f(") == "def f(x): pass\n"
    assert code_block("```\na\n```", "def f(") == "a\n"
