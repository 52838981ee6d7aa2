"""Whether an answer is right: extracted and compared by the task's rule, compared whole, or run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rwkv_bone.evaluation import code
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.questions import Asked
from rwkv_bone.evaluation.tasks import Task
from rwkv_bone.inference.shown import taken_apart
from rwkv_bone.inference.wording import Wording


def judged(
    cfg: EvaluateConfig, task: Task, wording: Wording, asked: Sequence[Asked], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each text {"answer": what is judged, or None if there is nothing, "right": a bool, or None if it is not
    judged}, and of code that is run "reason": why it failed."""
    if task.name == "exact":
        # As training's own measurement compares them: the whole text.
        return [{"answer": text, "right": text == one.answers[0]} for one, text in zip(asked, texts, strict=True)]
    answers = [taken_apart(text, wording.opening, wording.several)[1] for text in texts]
    if task.name == "humaneval":
        return _run(cfg, asked, answers)
    extract, same = task.rules[cfg.extract]
    found = list(map(extract, answers))
    return [
        {"answer": answer, "right": answer is not None and same(answer, one.item.expected)}
        for one, answer in zip(asked, found, strict=True)
    ]


def _run(cfg: EvaluateConfig, asked: Sequence[Asked], answers: Sequence[str]) -> list[dict[str, Any]]:
    def run(one: Asked, answer: str) -> dict[str, Any]:
        values = one.item.values
        name = values["entry_point"]
        program = code.solution(values["prompt"], answer, name)
        if not cfg.execute_code:
            return {"answer": program, "right": None}
        outcome = code.run(program, check=f"{values['test']}\n\ncheck({name})\n", entry_point=name)
        return {"answer": program, "right": outcome.passed, "reason": outcome.reason}

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(run, asked, answers))
