"""The model of a disk: what POSIX lets a power cut lose is lost in some state, and what it promises in none."""

import os

import pytest

from tests.faults.disk import EXCHANGE, Disk, cut_at
from tests.faults.shim import Operation

SEEDS = range(2000)


@pytest.fixture
def box(tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    (box / "name").write_bytes(b"old")
    return box


def operation(box, kind, name="", other="", data=b"", offset=0, file=1):
    return Operation(kind, 1, file, offset, str(box / name), str(box / other) if other else "", data)


def states(box, operations):
    """All states that the seeds find after these operations: sets of (name, content)."""
    disk = cut_at(Disk(box), operations)
    return {frozenset(disk.after_cut(seed).items()) for seed in SEEDS}


def recipe(box, *, content=True, folder=True):
    """Write a file under another name and rename it, with a sync of the content, and of the folder, or without."""
    steps = [operation(box, "create", "new"), operation(box, "write", "new", data=b"fresh")]
    steps += [operation(box, "sync", "new")] if content else []
    steps += [operation(box, "rename", "new", "name")]
    return steps + ([operation(box, "sync", "", file=9)] if folder else [])


def contents_of(found, name="name"):
    return {dict(state).get(name) for state in found}


def test_the_whole_recipe_leaves_the_new_content_and_nothing_else(box):
    assert states(box, recipe(box)) == {frozenset({("name", b"fresh")})}


def test_a_rename_may_be_there_and_its_content_not(box):
    found = contents_of(states(box, recipe(box, content=False)))
    assert {b"", b"fresh", bytes(5), b"fre"} <= found
    # Even a sync of the folder says nothing of the content.
    assert b"old" not in found


def test_a_rename_without_a_sync_of_the_folder_may_be_missing(box):
    found = states(box, recipe(box, folder=False))
    assert found == {
        frozenset({("name", b"fresh")}),
        frozenset({("name", b"old"), ("new", b"fresh")}),
        frozenset({("name", b"old")}),
    }


def test_in_the_middle_of_the_recipe_the_old_content_is_there(box):
    for many in range(4):
        assert contents_of(states(box, recipe(box)[:many])) == {b"old"}


def test_names_are_independent_but_each_changes_in_its_order(box):
    steps = []
    for number, name in enumerate("abc"):
        steps += [operation(box, "create", name, file=number), operation(box, "sync", name, file=number)]
    steps += [operation(box, "rename", "a", "d"), operation(box, "unlink", "c")]
    found = {frozenset(dict(state)) - {"name"} for state in states(box, steps)}
    assert found == {frozenset(names) for names in ("", "a", "b", "c", "ab", "ac", "bc", "abc",
                                                    "d", "bd", "cd", "bcd")}  # fmt: skip


def test_a_swap_happens_whole_or_not_at_all(box):
    steps = [operation(box, "create", "new"), operation(box, "write", "new", data=b"fresh")]
    steps += [operation(box, "sync", "new"), operation(box, "sync", "", file=9)]
    found = states(box, [*steps, operation(box, "rename", "new", "name", offset=EXCHANGE)])
    assert found == {
        frozenset({("name", b"old"), ("new", b"fresh")}),
        frozenset({("name", b"fresh"), ("new", b"old")}),
    }


def test_a_line_that_was_appended_may_be_cut_and_those_synced_before_stay(box):
    file = os.stat(box / "name").st_ino
    steps = [
        operation(box, "write", "name", data=b" line\n", offset=3, file=file),
        operation(box, "sync", "name", file=file),
    ]
    steps += [operation(box, "write", "name", data=b"second\n", offset=9, file=file)]
    found = contents_of(states(box, steps))
    assert all(content.startswith(b"old line\n") for content in found)
    assert {b"old line\n", b"old line\nsecond\n", b"old line\n" + bytes(7)} <= found
    assert any(b"sec" in content and not content.endswith(b"second\n") for content in found)


def test_a_folder_whose_name_was_not_synced_may_be_missing_with_all_that_is_in_it(box):
    steps = [operation(box, "mkdir", "inner"), operation(box, "create", "inner/file"), operation(box, "sync", "inner")]
    found = {tuple(sorted(dict(state))) for state in states(box, steps)}
    assert found == {("name",), ("inner", "inner/file", "name")}


def test_a_state_is_written_as_it_is_described(box):
    disk = cut_at(Disk(box), [operation(box, "mkdir", "inner"), *recipe(box)])
    disk.write_after_cut(box.parent / "state", 0)
    assert disk.after_cut(0) == {"inner": None, "name": b"fresh"}
    assert (box.parent / "state" / "name").read_bytes() == b"fresh" and (box.parent / "state" / "inner").is_dir()


def test_a_truncated_file_may_have_either_length_until_it_is_synced(box):
    file = os.stat(box / "name").st_ino
    steps = [operation(box, "truncate", "name", offset=1, file=file)]
    assert {b"old", b"o"} <= contents_of(states(box, steps))
    assert contents_of(states(box, [*steps, operation(box, "sync", "name", file=file)])) == {b"o"}
