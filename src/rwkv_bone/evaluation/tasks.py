"""The tasks: what rows they have, how a question is put, when an answer ends, what of it is judged, and how.

Each follows those who published it; `docs/evaluation.md` has the table with sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rwkv_bone.errors import UserError
from rwkv_bone.evaluation import code, extract
from rwkv_bone.evaluation.equal import same_hendrycks, same_math, same_number, same_string

Values = Mapping[str, Any]  # what a row says, under the task's names of fields
Extract = Callable[[str], "str | None"]
Same = Callable[[str, str], bool]


class Rule(NamedTuple):
    """One way to judge an answer: what of it counts, and when that is the expected answer."""

    extract: Extract
    same: Same


EQUALITIES: dict[Same, str] = {
    same_number: "equal as numbers",
    same_math: "equal by value",
    same_string: "equal as strings, by lm_eval's rule for GSM8K",
    same_hendrycks: "equal as strings, by MATH's published rule",
}


def _hashes_or_number(text: str) -> str | None:
    return extract.after_hashes(text) or extract.number_answer(text)


_MARKS: dict[str, Extract] = {
    "auto": _hashes_or_number,
    "hashes": extract.after_hashes,
    "flexible": extract.flexible,
    "metamath": extract.metamath_number,
    "number": extract.last_number,
    "boxed": extract.boxed,
    "minerva": extract.minerva,
}


def _rules(same: Same, marks: Mapping[str, Extract], published: Mapping[str, Same]) -> dict[str, Rule]:
    """The rules by --extract: those in `published` compare as their publishers do, the others by `same`."""
    return {name: Rule(mark, published.get(name, same)) for name, mark in marks.items()}


NUMBERS = _rules(same_number, _MARKS, {})
GSM8K = _rules(same_number, _MARKS, {"hashes": same_string, "flexible": same_string})
MATH = _rules(
    same_math,
    {**_MARKS, "auto": extract.math_answer, "metamath": extract.metamath_text},
    {"boxed": same_hendrycks, "metamath": same_hendrycks},
)


@dataclass(frozen=True)
class Task:
    """A task in which an answer is written, or (choice, perplexity) read.

    fields: for each name of ours the usual names of a row's field, in lower case; the first that a row has is read.
    optional: those that a row may lack. question: the names that make a question what it is. completion: how the
    template raw puts it, a text that the model completes. message: what another template has the user say. worked: the
    answer of a worked example. joint: what raw has between a question and its answer. stops: texts that end an answer
    with raw. max_new: tokens of an answer. rules: by --extract. hub: a data set of the Hub and the files of its test
    rows.
    """

    name: str
    fields: Mapping[str, tuple[str, ...]]
    question: tuple[str, ...]
    optional: tuple[str, ...] = ()
    completion: str = ""
    message: str = ""
    worked: str = ""
    joint: str = " "
    stops: tuple[str, ...] = ()
    max_new: int = 512
    rules: Mapping[str, Rule] = field(default_factory=dict)
    hub: tuple[str, str] = ("", "")

    @property
    def written(self) -> bool:
        """Whether the model writes answers; otherwise it says how likely given ones are."""
        return self.name not in ("choice", "perplexity")

    def expected(self, values: Values) -> str:
        """The right answer, as the rules would extract it. UserError for a row that has none."""
        if self.name in ("gsm8k", "svamp"):
            text = str(values["answer"])
            found = extract.after_hashes(text) or extract.last_number(text)
        elif self.name == "math":
            found = str(values["answer"]) if values.get("answer") else extract.boxed(str(values["solution"]))
        elif self.name == "choice":
            found = values["choices"][values["answer"]]
        elif self.name == "humaneval":
            found = str(values.get("canonical_solution") or "the tests")
        else:
            found = str(values.get("response") or "")
        if not found:
            raise UserError(f"its {'solution' if self.name == 'math' else 'answer'} holds no right answer")
        return found


def put(text: str, values: Values) -> str:
    """A text with the values in place of their names in braces."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]) if found[1] in values else found[0], text)


def check_prompt(text: str, task: Task) -> None:
    """UserError for a --prompt without a field of the task, or with a name that is none."""
    names = re.findall(r"\{(\w+)\}", text)
    known = [name for name in task.fields if name != "body"]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = f"{{{unknown[0]}}} is no field" if unknown else "no field in braces"
        raise UserError(
            f"--prompt {text!r}: {found} of --task {task.name}; expected {', '.join(f'{{{name}}}' for name in known)}"
        )


def choices_of(value: Any) -> tuple[list[str], list[str]] | None:
    """(texts, labels) of a field of choices: a list of texts, or {"text": [...], "label": [...]}; None for others."""
    labels: list[Any] = []
    if isinstance(value, Mapping):
        value, labels = value.get("text"), list(value.get("label") or [])
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text for text in value):
        return None
    return value, [str(label) for label in labels] if len(labels) == len(value) else []


def chosen(answer: Any, texts: list[str], labels: list[str]) -> int | None:
    """The place of the right choice: named by its label or text, as a letter, or as a number from 0."""
    word = str(answer).strip()
    if word in labels:
        return labels.index(word)
    if word in texts:
        return texts.index(word)
    place = int(word) if word.isascii() and word.isdigit() else ord(word) - ord("A") if len(word) == 1 else -1
    return place if 0 <= place < len(texts) else None


TASKS = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            {"question": ("question", "problem", "query"), "answer": ("answer", "response", "solution")},
            ("question",),
            completion="Question: {question}\nAnswer:",
            message="{question}",
            worked="{answer}",
            stops=("Question:",),
            rules=GSM8K,
            hub=("openai/gsm8k", "main/test-*.parquet"),
        ),
        Task(
            "math",
            {"problem": ("problem", "question", "query"), "solution": ("solution", "response"), "answer": ("answer",)},
            ("problem",),
            optional=("solution", "answer"),
            completion="Problem:\n{problem}\n\nSolution:",
            message="{problem}",
            worked="{solution}",
            stops=("Problem:",),
            max_new=1024,
            rules=MATH,
            hub=("EleutherAI/hendrycks_math", "*/test-*.parquet"),
        ),
        Task(
            "humaneval",
            {
                "prompt": ("prompt",),
                "test": ("test",),
                "entry_point": ("entry_point",),
                "canonical_solution": ("canonical_solution",),
            },
            ("prompt",),
            optional=("canonical_solution",),
            completion="{prompt}",
            message="Complete this Python function. Answer with the whole function in one block of code.\n\n"
            "```python\n{prompt}\n```",
            worked="{canonical_solution}",
            joint="",
            stops=code.STOPS,
            hub=("openai/openai_humaneval", "openai_humaneval/test-*.parquet"),
        ),
        Task(
            "svamp",
            {"body": ("body",), "question": ("question", "question_concat"), "answer": ("answer",)},
            ("question",),
            optional=("body",),  # which becomes the beginning of the question
            completion="Question: {question}\nAnswer:",
            message="{question}",
            worked="{answer}",
            stops=("Question:",),
            max_new=256,
            rules=NUMBERS,
            hub=("ChilleD/SVAMP", "**/test*"),
        ),
        Task(
            "choice",
            {
                "question": ("question", "ctx", "goal", "query", "prompt", "sentence"),
                "choices": ("choices", "endings", "options"),
                "answer": ("answerkey", "answer", "label", "gold"),
            },
            ("question", "choices"),
            completion="Question: {question}\nAnswer:",
            message="{question}",
            hub=("allenai/ai2_arc", "ARC-Challenge/test-*.parquet"),
        ),
        Task("perplexity", {"text": ("text", "content")}, ("text",)),
        Task("exact", {"prompt": (), "response": (), "messages": ()}, ("prompt",), joint=""),
    )
}
