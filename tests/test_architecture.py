"""docs/architecture.md names files, functions and tests that exist, and its picture is that of today's imports."""

import ast
import importlib.util
import re

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "rwkv_bone"
PAGE = REPOSITORY / "docs" / "architecture.md"
CELLS = re.compile(r"^\| (?:\d+\. )?(?P<first>.+?) \| (?P<second>.+?) \|", re.MULTILINE)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def located(name: str):
    """The file or folder that the page means by `training/fit.py`; None if there is none."""
    found = [folder / name for folder in (PACKAGE, REPOSITORY) if (folder / name).exists()]
    return found[0] if found else None


def defined(path) -> set[str]:
    """`function`, `Class` and `Class.method` of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def steps() -> list[tuple[str, str]]:
    """(file, function) of every row that names both, and of every `file`: `test`."""
    page = PAGE.read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w/]+\.py)`: `(\w+)`", page)
    for row in CELLS.finditer(page):
        files = quoted(row["first"])
        if len(files) == 1 and files[0].endswith(".py") and row["first"] == f"`{files[0]}`":
            pairs += [(files[0], name) for name in quoted(row["second"]) if re.fullmatch(r"[\w.]+", name)]
    return pairs


@pytest.mark.parametrize(("file", "name"), steps())
def test_a_function_that_the_page_names_is_in_its_file(file, name):
    path = located(file)
    assert path, f"{file} does not exist"
    assert name in defined(path), f"{file} defines no {name}"


def test_the_page_follows_both_ways_and_names_a_test_for_each_rule():
    found = steps()
    assert {"fit", "merge.py"} <= {word for word in quoted(PAGE.read_text(encoding="utf-8"))}
    assert len(found) > 40 and sum(name.startswith("test_") for _, name in found) == 11


def test_every_file_and_folder_that_the_page_names_exists():
    names = {name for name in quoted(PAGE.read_text(encoding="utf-8")) if re.fullmatch(r"[\w/.]+(\.(py|cuh)|/)", name)}
    assert len(names) > 40
    assert {name for name in names if located(name) is None} == set()


def test_the_picture_is_that_of_the_imports():
    spec = importlib.util.spec_from_file_location("draw_rooms", REPOSITORY / "docs" / "draw_rooms.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert program.PICTURE.read_text(encoding="utf-8") == program.draw(), "python docs/draw_rooms.py"
