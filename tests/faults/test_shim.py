"""The shim does what it is told to a small program, and records what the program did."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import python_path
from tests.faults.shim import KINDS, Faults, compile_shim, obstacle, read_trace

# Of a folder, which is its argument: every kind of operation once, some of them in two ways.
PROGRAM = """
import os, sys, shutil
os.chdir(sys.argv[1])
with open("a", "wb") as file:
    file.write(b"one" * 3)
    file.flush()
    os.fsync(file.fileno())
    file.seek(1)
    file.write(b"T")
fd = os.open("a", os.O_RDWR)
os.pwrite(os.dup(fd), b"end", 20)
os.writev(fd, [b"", b"two"])
os.ftruncate(fd, 21)
os.rename("a", "b")
os.write(fd, b"!")
os.fdatasync(fd)
os.close(fd)
os.link("b", "c")
os.unlink("b")
os.mkdir("d")
os.rmdir("d")
with open("c", "a") as file:
    file.write("more")
shutil.copyfile("c", "e")
folder = os.open(".", os.O_RDONLY)
os.fsync(folder)
with open("../outside", "w") as file:
    file.write("not below the folder")
print("done")
"""
EXPECTED = (
    "create write sync write open write write truncate rename write sync link unlink mkdir rmdir "
    "open write open create write open sync"
).split()
CONTENT = b"two!neone" + bytes(11) + b"e" + b"more"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if problem := obstacle():
        pytest.skip(problem)
    return compile_shim(tmp_path_factory.mktemp("shim"))


def run(library, faults):
    """Run PROGRAM in the folder of the faults, which this makes."""
    os.mkdir(faults.folder)
    begin = f"from tests.faults.shim import Faults; Faults(**{faults.to_dict()!r}).begin()\n"
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", begin + PROGRAM, faults.folder]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_operation_below_the_folder_is_recorded_with_its_data(library, tmp_path):
    folder, trace = tmp_path / "box", tmp_path / "trace"
    assert run(library, Faults(str(folder), trace=str(trace))).returncode == 0
    everything = read_trace(trace)
    operations = [operation for operation in everything if operation.number]
    assert [operation.kind for operation in operations] == EXPECTED
    assert [operation.number for operation in operations] == list(range(1, len(EXPECTED) + 1))
    writes = [(operation.offset, operation.data) for operation in operations if operation.kind == "write"]
    assert writes[:4] == [(0, b"one" * 3), (1, b"T"), (20, b"end"), (0, b"two")]
    # Where a descriptor stands, and at the end for one that appends.
    assert writes[4:] == [(3, b"!"), (21, b"more"), (0, CONTENT)]
    assert (folder / "c").read_bytes() == (folder / "e").read_bytes() == CONTENT
    moved = operations[EXPECTED.index("rename")]
    assert (moved.path, moved.other) == (f"{folder}/a", f"{folder}/b")
    assert (
        len({operation.file for operation in operations if operation.path in (f"{folder}/a", f"{folder}/b")} - {0}) == 1
    )


def test_what_is_written_unseen_is_recorded_when_it_is_synced(library, tmp_path):
    program = (
        "import mmap, os; m = mmap.mmap(fd := os.open('a', os.O_RDWR), 5); m[1:3] = b'xy'; os.fsync(fd); m.close()"
    )
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "a").write_bytes(b"01234")
    faults = Faults(str(tmp_path / "box"), trace=str(tmp_path / "trace"))
    begin = f"from tests.faults.shim import Faults; Faults(**{faults.to_dict()!r}).begin()\n"
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, "-c", begin + program], check=True, env=environment, cwd=faults.folder)
    found = [(operation.kind, operation.number, operation.data) for operation in read_trace(tmp_path / "trace")]
    assert found == [("open", 1, b""), ("write", 0, b"0xy34"), ("sync", 2, b"")]


def test_it_kills_at_the_nth_operation_of_a_kind_and_half_way_through_a_write(library, tmp_path):
    done = run(library, Faults(str(tmp_path / "first"), kill_at=2))
    assert done.returncode == -signal.SIGKILL and (tmp_path / "first" / "a").read_bytes() == b"oneo"
    done = run(library, Faults(str(tmp_path / "rename"), kinds=("rename", "link"), kill_at=2))
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path / "rename") == ["b"]
    done = run(library, Faults(str(tmp_path / "beyond"), kill_at=1000))
    assert done.returncode == 0


@pytest.mark.parametrize("number", range(1, len(EXPECTED) + 1))
def test_each_operation_fails_once_and_has_then_done_nothing(library, tmp_path, number):
    kind = EXPECTED[number - 1]
    error = "EMFILE" if kind in ("open", "create") else "ENOSPC"
    done = run(library, Faults(str(tmp_path / "box"), kinds=KINDS, fail_at=number, error=error))
    assert done.returncode == 1 and os.strerror(getattr(errno, error)) in done.stderr


def test_a_process_that_is_started_has_its_faults_from_the_environment(library, tmp_path):
    (tmp_path / "box").mkdir()
    environment = os.environ | Faults(str(tmp_path / "box"), fail_at=1, error="EIO").environment(library)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "box")]
    for rank, status in {"0": 1, "1": 0}.items():
        assert subprocess.run(command, env=environment | {"LOCAL_RANK": rank}, capture_output=True).returncode == status
