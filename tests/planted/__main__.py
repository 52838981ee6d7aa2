"""Plants bugs in a copy of the repository and says which ones the tests find: python -m tests.planted [NAME ...]

NAME is a file here, such as `numerics`; without one all are planted. For each bug its tests run first without it, where
they must pass, and then with it, where one must fail. `--jobs 2` runs as many at a time. The exit status is 1 if a bug
survived. Each takes seconds, all together an hour, so no other test runs them; test_planted.py keeps the tables true.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from tests.planted import tables
from tests.planted.bug import ROOT, Bug
from tests.planted.run import run_tests

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "venv", "out", "__pycache__", ".*_cache", ".rwkv_bone_cache")


def copy_repository(folder: Path) -> Path:
    """A copy of the working tree below `folder`, with `shared` beside it where the original has one."""
    shutil.copytree(ROOT, folder / "repository", ignore=LEFT_OUT)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return folder / "repository"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *tables()], help="a file of tests/planted")
    parser.add_argument("--jobs", type=int, default=1, help="how many to plant at a time")
    parser.add_argument("--only", default="", help="only bugs whose file or texts contain this")
    options = parser.parse_args(argv)
    chosen = [(name, bug) for name, bugs in tables().items() if name in (options.names or tables()) for bug in bugs]
    chosen = [(name, bug) for name, bug in chosen if options.only in "\n".join(bug)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy_repository(Path(folder, str(number))))
        baseline = copy_repository(Path(folder, "baseline"))
        without = lru_cache(maxsize=None)(lambda tests: run_tests(baseline, tests))

        def outcome(bug: Bug) -> str:
            if (problem := bug.problem() or without(bug.tests)) != "passed":
                return f"useless, without the bug: {problem}"
            copy = copies.get()
            try:
                bug.plant(copy)
                found = run_tests(copy, bug.tests)
            finally:
                bug.remove(copy)
                copies.put(copy)
            return {"failed": "killed", "hangs": "killed (hangs)", "passed": "SURVIVED"}.get(found, f"useless: {found}")

        counts: Counter[str] = Counter()
        for (name, bug), found in zip(chosen, pool.map(outcome, [bug for _, bug in chosen]), strict=True):
            counts[found.split(" ")[0].rstrip(",")] += 1
            print(f"{found:9} {name}: {bug.file}: {bug.old!r} -> {bug.new!r}", flush=True)
    print(", ".join(f"{count} {found}" for found, count in counts.items()))
    return 0 if set(counts) <= {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
