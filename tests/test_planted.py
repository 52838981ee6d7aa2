"""The tables of planted bugs are true: what they replace is there, and the tests they name exist.

That the tests find the bugs is what `python -m tests.planted` shows.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.planted import tables
from tests.planted.bug import ROOT, Bug
from tests.planted.run import CONTEXT, run_tests

TABLES = tables()


@pytest.mark.parametrize("name", TABLES)
def test_every_bug_of_a_table_can_be_planted(name):
    assert [problem for bug in TABLES[name] if (problem := bug.problem())] == []


@pytest.mark.parametrize("name", TABLES)
def test_the_tests_that_a_table_names_exist(name):
    files = {word for bug in TABLES[name] for word in shlex.split(bug.tests) if word.startswith("tests/")}
    for word in files:
        path, _, test = word.partition("::")
        assert (ROOT / path).exists(), word
        assert f"def {test.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8") if test else True, word


def test_a_bug_is_planted_and_removed_again(tmp_path):
    bug = Bug("src/rwkv_bone/errors.py", "return 2", "return 3", "tests/x.py")
    target = tmp_path / bug.file
    target.parent.mkdir(parents=True)
    bug.plant(tmp_path)
    assert "return 3" in target.read_text() and "return 2" not in target.read_text()
    bug.remove(tmp_path)
    assert target.read_bytes() == (ROOT / bug.file).read_bytes()


@pytest.mark.parametrize(
    ("body", "outcome"),
    [("assert True", "passed"), ("assert False", "failed"), ("import pytest; pytest.skip('')", "all skipped")],
)
def test_the_outcome_of_the_tests_is_told_apart(tmp_path, body, outcome):
    CONTEXT.set_forkserver_preload(["pytest", "torch"])  # these tests use no more
    Path(tmp_path, "test_it.py").write_text(f"def test_it():\n    {body}\n")
    assert run_tests(tmp_path, "test_it.py") == outcome
    assert run_tests(tmp_path, "test_it.py -k nothing").startswith("pytest ended with 5")
