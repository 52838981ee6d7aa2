"""Programs that a model wrote: what passes, what must not, and that none hangs or hurts who runs it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rwkv_bone.evaluation import code
from rwkv_bone.evaluation.code import Outcome, run, solution

HUMANEVAL = Path(__file__).resolve().parents[3] / "shared" / "assets" / "data" / "humaneval" / "HumanEval.jsonl.gz"
PROMPT = (
    'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef more(x: int) -> int:\n    """One more."""\n'
)
TEST = "def check(candidate):\n    assert candidate(1) == 2\n    assert abs(candidate(2) - 3) < 1e-6\n"
ITEM = {"prompt": PROMPT, "test": TEST, "entry_point": "more"}
RIGHT = "def more(x):\n    return x + 1\n"
FORK = "import ctypes, os, time\nif ctypes.CDLL(None).fork() == 0:\n    time.sleep(60)\n"

# What a model may write, and what is said of it. CPU seconds and address space are bounded tightly.
FAIL = {
    "returns nothing": ("def more(x):\n    pass\n", "AssertionError: assert candidate(1) == 2"),
    "an error": ("def more(x):\n    return x / 0\n", "ZeroDivisionError: division by zero"),
    "does not compile": ("def more(x:\n", "SyntaxError"),
    "defines another function": ("def less(x):\n    return x + 1\n", "it defines no function more"),
    "is empty": ("", "it defines no function more"),
    "is no text": ("x = '\ud800'\n" + RIGHT, "UnicodeEncodeError"),
    "endless loop": ("while True:\n    pass\n", "more than 0.3 s of CPU time"),
    "endless loop within": ("def more(x):\n    while True:\n        pass\n", "more than 0.3 s of CPU time"),
    "memory": (
        "hog = []\nwhile True:\n    hog.append(bytearray(10**7))\n",
        "MemoryError: more than the memory allowed",
    ),
    "memory at once": ("def more(x):\n    return [0] * 10**11\n", "MemoryError: more than the memory allowed"),
    "forks": ("import os\nwhile True:\n    os.fork()\n", "PermissionError: os.fork is refused"),
    "waits for input": ("x = input()\n" + RIGHT, "EOFError"),
    "ends at once": ("import os\nos._exit(0)\n", "it ended itself before its check was over (exit status 0)"),
    "ends within": ("import os\ndef more(x):\n    os._exit(0)\n", "it ended itself before its check was over"),
    "exits": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "exits within": ("def more(x):\n    exit()\n", "SystemExit"),
    "interrupts": ("def more(x):\n    raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    "an error that ends": (
        "import os\nclass Error(Exception):\n    def __str__(self):\n        os._exit(0)\n"
        "def more(x):\n    raise Error\n",
        "it ended itself before its check was over (exit status 0)",
    ),
    "crashes": ("import ctypes\nctypes.string_at(0)\n", "ended by SIG"),
    "recursion": ("def more(x):\n    return more(x)\n", "RecursionError"),
    "leaves a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT,
        "it left threads running",
    ),
    "leaves a process that holds the pipe": (FORK + RIGHT, "it left processes running"),
    "ends, leaving a process": (FORK + "os._exit(0)\n", "it ended itself before its check was over (exit status 0)"),
    "closes all": ("import os\nos.closerange(0, 99)\nos._exit(0)\n", "it ended itself before its check was over"),
    "floods and fails": ("print('x' * 10**7)\nraise ValueError('no')\n", "ValueError: no"),
    "a long file": ("open('long', 'w').write('x' * 2 * 10**7)\n" + RIGHT, "OSError: [Errno 27]"),
    "kills": ("import os\nos.kill(os.getppid(), 9)\n" + RIGHT, "PermissionError: os.kill is refused"),
    "a program": (
        "import subprocess\nsubprocess.run(['true'])\n" + RIGHT,
        "PermissionError: subprocess.Popen is refused",
    ),
    "a command": ("import os\nos.system('true')\n" + RIGHT, "PermissionError: os.system is refused"),
    "another program": ("import os\nos.execv('/bin/true', ['true'])\n", "PermissionError: os.exec is refused"),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))\n" + RIGHT, "PermissionError: socket."),
    "lifts limits": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))\n", "PermissionError"),
    # What would make the check say yes.
    "its own check": ("def check(candidate):\n    pass\ndef more(x):\n    return 0\n", "AssertionError"),
    "built-in functions": (
        "import builtins\nbuiltins.abs = lambda x: 0\nmore = {1: 2, 2: 9}.get\n",
        "AssertionError: assert abs(",
    ),
    "functions of its own": ("abs = lambda x: 0\nmore = {1: 2, 2: 9}.get\n", "AssertionError: assert abs("),
    "equals anything": (
        "class Yes:\n    def __eq__(self, other):\n        return True\n"
        "    def __sub__(self, other):\n        return 0\ndef more(x):\n    return Yes()\n",
        "TypeError: the answer holds an object of the program's own class",
    ),
    "an open string": ("def more(x):\n    return 0\n'''", "SyntaxError"),
    "an error of its own": (
        "class AssertionError(Exception):\n    pass\ndef more(x):\n    return 0\n",
        "AssertionError",
    ),
    "claims success": (
        'import os\nfor at in range(3, 999):\n    try:\n        os.write(at, b\'{"token": "", "reason": ""}\\n\')\n'
        "    except OSError:\n        pass\n",
        "it ended itself",
    ),
}


def outcome(program: str, **limits) -> Outcome:
    return run(
        program, check=f"{TEST}\ncheck(more)\n", entry_point="more", **{"seconds": 2, "memory_mb": 400, **limits}
    )


@pytest.mark.parametrize("name", FAIL)
def test_a_program_does_not_pass_that(name):
    program, reason = FAIL[name]
    found = outcome(program, seconds=0.3 if "loop" in name else 2, memory_mb=150 if "memory" in name else 400)
    # A busy machine may let the clock run out first.
    assert not found.passed and found.reason.startswith((reason, "it did not end within" if "loop" in name else reason))


def test_a_right_program_passes_whatever_else_it_does():
    unusual = (
        "import asyncio, dataclasses, os, shutil, sys, tempfile, threading\n"
        "print('x' * 10**6)\nprint(sys.stdin.read(), file=sys.stderr)\n"
        "@dataclasses.dataclass\nclass Number:\n    n: int\n"
        "with tempfile.TemporaryDirectory() as folder:\n    open(folder + '/file', 'w').write('x')\n"
        "os.makedirs('a/b')\nshutil.rmtree('a')\n"
        "threading.Thread(target=print, daemon=True).start()\n"
        "async def later(x):\n    return Number(x).n + 1\n"
        "def more(x):\n    return asyncio.run(later(x))\n"
        "if __name__ == '__main__':\n    sys.exit(1)\n"
    )
    assert outcome(unusual) == (True, "passed")
    assert run("x = 1\n") == (True, "passed")


def test_sleeping_ends_by_the_clock(monkeypatch):
    monkeypatch.setattr(code, "GRACE", 0.5)
    found = outcome("import time\nwhile True:\n    time.sleep(60)\n", seconds=0.1)
    assert found == (False, "it did not end within 0.9 s")


@pytest.mark.parametrize(
    "deed",
    [
        "os.remove({0!r})",
        "shutil.rmtree(os.path.dirname({0!r}))",
        "open({0!r}, 'w')",
        "os.open({0!r}, os.O_WRONLY | os.O_TRUNC)",
        "os.rename({0!r}, 'here')",
        "os.truncate({0!r}, 0)",
        "os.chmod({0!r}, 0)",
        "os.chdir(os.path.dirname({0!r})) or os.remove('file')",
        "os.remove('file', dir_fd=os.open(os.path.dirname({0!r}), os.O_RDONLY))",
        "os.symlink({0!r}, 'link') or open('link', 'w')",
        "os.link({0!r}, 'link') or open('link', 'w')",
        "__import__('pathlib').Path({0!r}).unlink()",
    ],
)
def test_files_outside_the_working_folder_stay(tmp_path, deed):
    path = tmp_path / "file"
    path.write_text("kept")
    found = outcome(f"import os, shutil\n{deed.format(str(path))}\n{RIGHT}")
    assert found.reason.startswith("PermissionError") and path.read_text() == "kept"
    assert path.stat().st_mode & 0o600 == 0o600


def processes_below(folder: Path) -> list[str]:
    """The working folders of processes that work below this one, where the system tells."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return [path for path in found if path.startswith(f"{folder}/")]


def test_nothing_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(code.tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    outcome("import os\nos.makedirs('a/b')\nos.chmod('a', 0)\n" + RIGHT)
    outcome("import os\nos.rmdir(os.getcwd())\n" + RIGHT)
    outcome(FORK + RIGHT)
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 20
    while (running := processes_below(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed process is gone a moment later
    assert running == []
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_the_order_of_sets_of_strings_is_the_same_in_every_run():
    order = "def more(x):\n    raise ValueError(''.join(set('abcdefgh')))\n"
    assert outcome(order) == outcome(order)


def test_secrets_of_the_environment_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert outcome("import os\nraise ValueError(os.environ.get('HF_TOKEN'))\n").reason == "ValueError: None"


def test_other_systems_refuse_to_run_code(monkeypatch):
    monkeypatch.setattr(code.os, "name", "nt")
    with pytest.raises(code.UserError, match="--execute_code 1 needs Linux or macOS"):
        run("")


# ---- what a completion stands for

BODY = "    return helper(x) + 1\n"
WHOLE = f"def more(x: int) -> int:\n{BODY}"
COMPLETIONS = {
    "the body": BODY,
    "the body and more": BODY + "\nprint(more('x'))\n",
    "the body and another function": BODY + "\n\ndef other(:\n",
    "the body and a class": BODY + "\nclass A(:\n",
    "the body and a comment": BODY + "\n# and so on(\nreturn\n",
    "the body and its use": BODY + "\nif __name__ == '__main__':\n    raise SystemExit\n",
    "a nested function": "    def inner(y):\n        return helper(y) + 1\n\n    # call it\n    return inner(x)\n",
    "an import first": "    import math\n    return math.floor(helper(x)) + 1\n",
    "a fenced function": f"Here it is:\n\n```python\n{WHOLE}```\n\nIt adds 1. def more(x): no\n",
    "a fenced function with imports": f"```py\nfrom typing import List\nimport math\n\n{WHOLE}```",
    "a fence without a language": f"Sure!\n```\n{WHOLE}```",
    "a fence of tildes": f"~~~python\n{WHOLE}~~~",
    "a fence in a list": "1. So:\n\n   ```python\n   def more(x):\n       return helper(x) + 1\n   ```\n",
    "a fence that never closes": f"```python\n{WHOLE}",
    "the second of two blocks": f"First:\n```\npip x\n```\nthen\n```python\n{WHOLE}```\nUse:\n```\nmore(\n```\n",
    "a fenced body": f"```python\n{BODY}```",
    "a fenced body without its indentation": "```python\nreturn helper(x) + 1\n```",
    "a body whose fence the prompt has opened": BODY + "```\nThis adds 1. It's (simple\n",
    "a function whose fence the prompt has opened": f"{WHOLE}```\nThis adds 1. It's (simple\n",
    "the whole function": WHOLE,
    "the whole function with imports and words": f"from typing import List\n\n\n{WHOLE}\nThis adds 1. It's (simple\n",
    "words, the whole function, a use": f"Sure, here you are:\n\n{WHOLE}\nprint(more(1\n",
    "a leading space": f" {WHOLE}",
    "a helper behind it": "def more(x):\n    return extra(x)\n\n\ndef extra(x):\n    return x + 1\n",
    "the prompt again": PROMPT + BODY,
    "thoughts": f"<think>\n```python\ndef more(x):\n    return 0\n```\nNo.</think>\n```python\n{WHOLE}```",
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_completion_becomes_the_program_it_means(name):
    """Executed here, in this process: the texts above are ours."""
    names: dict = {}
    exec(solution(PROMPT, COMPLETIONS[name], "more"), names)
    assert names["more"](1) == 2 and names["helper"](3) == 3


@pytest.mark.parametrize(
    "completion", ["", "I cannot help with that.", "<think>    return x + 1", "\n\n", "```", "    pass"]
)
def test_a_completion_without_code_does_not_pass(completion):
    names: dict = {}
    try:
        exec(solution(PROMPT, completion, "more"), names)
    except SyntaxError:
        return
    assert names["more"](1) is None


def test_a_prompt_without_a_docstring_may_be_written_again():
    names: dict = {}
    exec(solution("def more(x):\n", WHOLE.replace("helper", ""), "more"), names)
    assert names["more"](1) == 2


def test_a_completion_of_an_item_is_run_with_its_tests():
    assert human_eval(ITEM, BODY) == (True, "passed")
    assert human_eval(ITEM, "    return x\n") == (False, "AssertionError: assert candidate(1) == 2")


# ---- HumanEval itself


def humaneval() -> list[dict[str, str]]:
    if not HUMANEVAL.exists():
        pytest.skip(f"needs HumanEval.jsonl.gz of openai/human-eval: {HUMANEVAL}")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


MISTAKE = """
def changed(value):
    if isinstance(value, (list, tuple)):
        return value[:-1] if value else type(value)([0])
    if isinstance(value, str):
        return value + 'x'
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, (int, float)) else None
right = {0}
def {0}(*given):
    return changed(right(*given))
"""


def human_eval(item: dict[str, str], completion: str) -> Outcome:
    """Whether a completion passes the tests of HumanEval's item."""
    name = item["entry_point"]
    program = solution(item["prompt"], completion, name)
    return run(program, check=f"{item['test']}\n\ncheck({name})\n", entry_point=name)


def right_and_wrong(item: dict[str, str]) -> tuple[str, list[bool]]:
    """Whether the canonical solution passes: as it is, behind `return None`, and with each answer changed."""
    body, name = item["canonical_solution"], item["entry_point"]
    check = f"{item['test']}\n\ncheck({name})\n"
    mistaken = solution(item["prompt"], body, name) + MISTAKE.format(name)
    wrong = run(mistaken, check=check, entry_point=name)
    found = [human_eval(item, body), human_eval(item, f"    return None\n{body}"), wrong]
    return item["task_id"], [each.passed for each in found]


def check_items(items: list[dict[str, str]]) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = dict(pool.map(right_and_wrong, items))
    assert {task: each for task, each in found.items() if each != [True, False, False]} == {}


def test_solutions_of_humaneval_pass_and_spoilt_ones_fail():
    check_items(humaneval()[::20])


@pytest.mark.slow
def test_all_solutions_of_humaneval_pass_and_spoilt_ones_fail():
    items = humaneval()
    assert len(items) == 164
    check_items(items)
