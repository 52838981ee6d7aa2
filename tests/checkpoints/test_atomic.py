"""Files that appear whole or not at all: what the system is asked, and what a refusal, a kill or a neighbour leaves."""

import builtins
import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from rwkv_bone import checkpoints, locks
from rwkv_bone.checkpoints import atomic
from rwkv_bone.checkpoints.atomic import atomic_path, leftovers, make_folder, sync_folder, temporary_beside
from rwkv_bone.errors import UserError
from tests.forked import forked


class Calls:
    """The calls of os.open, os.fsync and os.replace in order, by the names of files; the one of number `failing` (0 is
    the first) fails with `error`."""

    def __init__(self, monkeypatch, failing: int | None = None, error: int = errno.EIO):
        self.made: list[tuple[str, ...]] = []
        self.failing, self.error = failing, error
        for name in ("open", "fsync", "replace"):
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))

    def _recording(self, name, function):
        def call(*arguments, **options):
            names = [os.readlink(f"/proc/self/fd/{a}") if name == "fsync" else a for a in arguments[:2]]
            self.made.append((name, *(Path(a).name for a in names if not isinstance(a, int))))
            if len(self.made) - 1 == self.failing:
                raise OSError(self.error, os.strerror(self.error))
            return function(*arguments, **options)

        return call


def write(path: Path, text: str, **options) -> None:
    with atomic_path(path, overwrite=True, **options) as temporary:
        temporary.write_text(text)


def test_a_file_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    path, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    write(path, "old")
    calls = Calls(monkeypatch)
    write(path, "new", previous=previous)
    opened, *made = calls.made
    temporary = opened[1]
    assert opened[0] == "open" and temporary.startswith(".a.pth.") and temporary.endswith(".partial.pth")
    folder = tmp_path.name
    assert made == [
        ("fsync", temporary),
        ("replace", "a.pth", "a.previous.pth"),
        ("replace", temporary, "a.pth"),
        ("open", folder),
        ("fsync", folder),
    ]
    assert (path.read_text(), previous.read_text()) == ("new", "old")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("failing", range(6))
def test_whichever_call_the_system_refuses_the_old_or_the_new_file_is_there_whole(
    tmp_path, monkeypatch, failing, error
):
    path, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    write(path, "old")
    with monkeypatch.context() as patch:
        calls = Calls(patch, failing, error)
        with pytest.raises(UserError, match=f"a.pth could not be written: {os.strerror(error)}"):
            write(path, "new", previous=previous)
    assert len(calls.made) == failing + 1
    texts = {file.name: file.read_text() for file in tmp_path.iterdir()}
    # The third call gives the old file its other name, the fourth the new file its own.
    assert (
        texts
        == [{"a.pth": "old"}, {"a.previous.pth": "old"}, {"a.pth": "new", "a.previous.pth": "old"}][
            (failing > 2) + (failing > 3)
        ]
    )


def test_no_file_is_opened_again_once_it_is_written(tmp_path, monkeypatch):
    """A second opening that fails was once taken for a file that is good."""
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
        monkeypatch.setattr(builtins, "open", None)
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_an_opening_that_fails_fails_the_write_and_is_not_tried_in_another_way(tmp_path, monkeypatch):
    path, original = tmp_path / "a.pth", builtins.open
    checkpoints.write_state(path, {"a": torch.ones(1)})

    def failing(file, *arguments, **options):
        if ".partial" in str(file):
            monkeypatch.undo()  # the next one would succeed
            raise OSError(errno.EMFILE, "Too many open files")
        return original(file, *arguments, **options)

    import io

    monkeypatch.setattr(builtins, "open", failing)
    monkeypatch.setattr(io, "open", failing)
    with pytest.raises(UserError, match="a.pth could not be written: Too many open files"):
        checkpoints.write_state(path, {"a": torch.zeros(1)}, overwrite=True)
    assert checkpoints.read_state(path)["a"] == 1


def test_a_file_that_took_the_place_of_the_temporary_one_is_not_passed_off_as_it(tmp_path):
    with pytest.raises(UserError, match="became another file"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.unlink()
        temporary.write_text("unsynced")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSYS])
def test_a_name_that_was_taken_during_the_last_sync_is_kept(tmp_path, monkeypatch, error):
    """error: of a file system that has no links."""
    path, sync = tmp_path / "a.txt", os.fsync

    def taken(descriptor):
        sync(descriptor)
        path.write_text("another's")

    def refused(*_):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr(os, "link", refused)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", taken)
        with pytest.raises(UserError, match="a.txt exists and is kept"), atomic_path(path) as temporary:
            temporary.write_text("mine")
    assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    with atomic_path(path) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_a_link_that_the_disk_refuses_fails_the_write(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(UserError, match="a.txt could not be written: No space left"), atomic_path(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def killed_while_writing(path: Path) -> Path:
    """The temporary file that a process leaves when it is killed within atomic_path."""

    def body(ready):
        with atomic_path(path, overwrite=True) as temporary:
            temporary.write_text("half")
            ready()
            time.sleep(60)

    before = set(path.parent.iterdir())
    with forked(body) as pid:
        os.kill(pid, signal.SIGKILL)
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_what_a_killed_writer_has_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    path, other = tmp_path / "a.pth", tmp_path / "b.pth"
    dead, other_dead = killed_while_writing(path), killed_while_writing(other)
    with atomic_path(path, overwrite=True) as living:
        living.write_text("slow")
        assert not dead.exists() and other_dead.exists()  # of another target
        write(path, "quick")
        assert path.read_text() == "quick" and living.exists()
    assert path.read_text() == "slow"
    assert set(tmp_path.iterdir()) == {path, other_dead}


def test_what_another_machine_left_counts_as_dead_only_after_a_day(tmp_path, monkeypatch):
    """Locks are not always seen from one machine to the other."""
    path = tmp_path / "a.pth"
    monkeypatch.setattr(atomic.socket, "gethostname", lambda: "another")
    left = killed_while_writing(path)
    monkeypatch.undo()
    assert leftovers(path) == []
    a_day_ago = time.time() - 25 * 3600
    os.utime(left, (a_day_ago, a_day_ago))
    assert leftovers(path) == [left]


def test_where_files_have_no_locks_files_are_written_and_leftovers_stay(tmp_path, monkeypatch):
    left = killed_while_writing(tmp_path / "a.pth")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    write(tmp_path / "a.pth", "new")
    assert (tmp_path / "a.pth").read_text() == "new" and left.exists()


def test_a_folder_is_told_from_a_dead_one_too(tmp_path):
    target = tmp_path / "model"

    def body(ready):
        with temporary_beside(target, folder=True) as (temporary, _):
            (temporary / "file").write_text("half")
            ready()
            time.sleep(60)

    with forked(body) as pid:
        assert leftovers(target) == [] and len(os.listdir(tmp_path)) == 1
        os.kill(pid, signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    with temporary_beside(target, folder=True) as (temporary, _):
        assert not left.exists() and temporary.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["x" * 255, "x" * 251 + ".pth", "字" * 83 + ".pth", "é" * 127, "a." + "y" * 253, "x" * 206 + ".pth", ".pth", "a"],
    ids=lambda name: f"{name[:1]}{len(name)}",
)
def test_every_name_that_a_file_may_have_can_be_written(tmp_path, name):
    path = tmp_path / name
    assert len(os.fsencode(name)) <= 255
    with atomic_path(path) as temporary:
        assert len(os.fsencode(temporary.name)) <= 255 and temporary.name.startswith(".")
        if len(path.suffix) < 10:
            assert temporary.suffix == path.suffix or not path.suffix
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_a_long_name_is_told_from_another_with_the_same_beginning(tmp_path):
    one, other = tmp_path / ("x" * 254 + "1"), tmp_path / ("x" * 254 + "2")
    left = killed_while_writing(one)
    assert leftovers(other) == [] and leftovers(one) == [left]


def test_the_folders_above_a_new_file_are_made_to_last_too(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    assert [call for call in calls.made if call[0] == "fsync"] == [("fsync", tmp_path.name), ("fsync", "a")]
    calls.made.clear()
    make_folder(tmp_path / "a" / "b")
    assert calls.made == []


def test_a_file_system_that_syncs_no_folders_is_put_up_with_and_a_disk_that_fails_is_not(tmp_path, monkeypatch):
    def refuse(error):
        def fsync(_):
            raise OSError(error, os.strerror(error))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError):
        sync_folder(tmp_path)
