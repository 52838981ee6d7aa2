"""One line a method of what was right: python recipes/table.py ANSWERS TASK FIRST METHOD..., called by recipes/lib.sh.

ANSWERS/METHOD-TASK are folders of scripts/evaluate.sh. p is McNemar's exact test against FIRST on the items of both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from rwkv_bone.errors import UserError, exit_status
from rwkv_bone.evaluation.compare import Evaluation, read
from rwkv_bone.evaluation.statistics import mcnemar, wilson


def rights(evaluation: Evaluation) -> dict[tuple[str, int], bool]:
    """Whether the first answer to each item is right; UserError where answers were not judged."""
    found = {key: item[0]["right"] for key, item in evaluation.items.items()}
    if None in found.values():
        raise UserError(f"{evaluation.folder} is not judged: give --execute_code 1")
    return found


def table(answers: Path, task: str, first: str, methods: list[str]) -> list[str]:
    """The lines of the table: share of right answers, its 95 % interval, the difference from `first`, and p."""
    base = rights(read(answers / f"{first}-{task}"))
    lines = [f"{task:<11}right      95 % interval     against {first}"]
    for method in methods:
        found = rights(read(answers / f"{method}-{task}"))
        low, high = (100 * end for end in wilson(sum(found.values()), len(found)))
        line = f"{method:<11}{100 * sum(found.values()) / len(found):5.1f} %    {low:5.1f} to {high:5.1f} %"
        if method != first:
            both = found.keys() & base.keys()
            gained, lost = (sum(a[key] and not b[key] for key in both) for a, b in ((found, base), (base, found)))
            line += f"   {100 * (gained - lost) / len(both):+5.1f} points, p = {mcnemar(gained, lost):.3g}"
            line += f" ({gained} gained, {lost} lost)"
        lines.append(line)
    tests = len([method for method in methods if method != first])
    return [
        *lines,
        f"p: McNemar's exact test on the same items; {tests} tests, so take p < {0.05 / tests:.3g} as certain",
    ]


def main() -> None:
    answers, task, first, *methods = sys.argv[1:]
    print("\n".join(table(Path(answers), task, first, methods)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
