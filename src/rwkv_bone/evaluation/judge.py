"""Whether an answer is right: extracted and compared by the task's rule, compared whole, or run."""

from __future__ import annotations

from typing import Any

from rwkv_bone.evaluation import code
from rwkv_bone.evaluation.flags import EvaluateConfig
from rwkv_bone.evaluation.questions import Asked
from rwkv_bone.evaluation.tasks import Task
from rwkv_bone.inference.shown import taken_apart
from rwkv_bone.inference.wording import Wording

SECONDS, MEMORY_MB = 10.0, 2048  # for a program that the model has written


def judged(cfg: EvaluateConfig, task: Task, wording: Wording, asked: Asked, text: str) -> dict[str, Any]:
    """{"answer": what is judged, or None if there is nothing, "right": a bool, or None if it is not judged}, and for
    code that is run, why it failed."""
    if task.name == "exact":
        # As training's own measurement compares them: the whole text.
        return {"answer": text, "right": text == asked.answers[0]}
    answer = taken_apart(text, wording.opening, wording.several)[1]
    if task.name == "humaneval":
        return _run(cfg, asked, answer)
    found = task.rules[cfg.extract](answer)
    return {"answer": found, "right": found is not None and task.same(found, asked.item.expected)}


def _run(cfg: EvaluateConfig, asked: Asked, answer: str) -> dict[str, Any]:
    values = asked.item.values
    solution = code.solution(values["prompt"], answer, values["entry_point"])
    if not cfg.execute_code:
        return {"answer": solution, "right": None}
    program = f"{solution}\n\n{values['test']}\n\ncheck({values['entry_point']})\n"
    outcome = code.run(program, seconds=SECONDS, memory_mb=MEMORY_MB)
    return {"answer": solution, "right": outcome.passed, "reason": outcome.reason}
