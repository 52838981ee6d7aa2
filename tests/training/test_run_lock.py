"""Two runs never work in one folder: by real processes that are killed, forked, and started at the same moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from rwkv_bone import run_lock
from rwkv_bone.errors import UserError
from rwkv_bone.locks import NoLocks, Process
from rwkv_bone.run_lock import held

# Forked, so that each test's processes are there at once; none of them uses a library with threads.
context = multiprocessing.get_context("fork")


def hold(folder, ready):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with held(folder):
        ready.set()
        signal.pause()


@contextmanager
def holder(folder):
    """A process that holds `folder`."""
    ready = context.Event()
    process = context.Process(target=hold, args=(folder, ready))
    process.start()
    try:
        assert ready.wait(30)
        yield process
    finally:
        process.terminate()
        process.join(30)
        process.kill()


def test_the_second_run_is_told_who_holds_the_folder(tmp_path):
    folder = tmp_path / "out"
    with holder(folder) as process:
        before = (folder / ".lock").read_bytes()
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        who = rf"process {process.pid} on {re.escape(socket.gethostname())}, since {since}"
        with (
            pytest.raises(UserError, match=rf"--proj_dir .*out is in use by another run \({who}\): wait.*stop it"),
            held(folder),
        ):
            pass
        assert (folder / ".lock").read_bytes() == before
    with held(folder):
        pass
    assert not folder.exists()  # nobody has put anything there


def test_a_killed_run_holds_nothing_and_neither_do_its_children(tmp_path):
    folder, child = tmp_path / "out", tmp_path / "child"

    def run():
        with held(folder):
            forked = os.fork()
            if forked == 0:
                time.sleep(60)
                os._exit(0)
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
            (tmp_path / "child.tmp").write_text(json.dumps([forked, started.pid]))
            os.rename(tmp_path / "child.tmp", child)
            time.sleep(60)

    process = context.Process(target=run)
    process.start()
    while not child.exists():
        time.sleep(0.01)
    children = json.loads(child.read_text())
    try:
        process.kill()
        process.join()
        assert (folder / ".lock").is_file()
        assert all(os.path.exists(f"/proc/{pid}") for pid in children) or not os.path.isdir("/proc")
        with held(folder):
            assert f'"pid": {os.getpid()}' in (folder / ".lock").read_text()
        assert not (folder / ".lock").exists()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_child_that_leaves_the_block_of_its_parent_frees_nothing(tmp_path):
    with held(tmp_path / "out"):
        if os.fork() == 0:
            try:
                raise SystemExit
            finally:
                os._exit(0)
        os.wait()
        with pytest.raises(UserError, match="in use"), held(tmp_path / "out"):
            pass


def contend(folder, barrier, results, rounds):
    """Try to take the folder when the others do; [whether it was had] of each round."""
    had = []
    for _ in range(rounds):
        barrier.wait(60)
        try:
            with held(folder):
                # Only who has the folder makes this file, so that a second one is found here.
                os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
                barrier.wait(60)
                os.unlink(folder / "alone")
            had.append(True)
        except UserError:
            barrier.wait(60)
            had.append(False)
        barrier.wait(60)
    results.put(had)


def test_of_several_that_start_at_the_same_moment_exactly_one_goes_on(tmp_path):
    """In a folder that is not there yet, which those that are refused, and the one that ends, remove again."""
    count, rounds = 6, 25
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=contend, args=(tmp_path / "a" / "out", barrier, results, rounds)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    had = [results.get(timeout=60) for _ in range(count)]
    assert [sum(turn) for turn in zip(*had, strict=True)] == [1] * rounds
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


def take_turns(folder, barrier, turns):
    """Hold the folder `turns` times, as soon as it is free."""
    barrier.wait(60)
    while turns:
        try:
            with held(folder):
                count = int((folder / "count").read_text())
                time.sleep(0)
                (folder / "count").write_text(str(count + 1))
            turns -= 1
        except UserError:
            time.sleep(0)


def test_a_lock_that_is_let_go_and_taken_by_turns_never_has_two_holders(tmp_path, monkeypatch):
    """What is unlinked at the end may be the file that another process has just opened."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0)
    (tmp_path / "count").write_text("0")
    barrier = context.Barrier(4)
    processes = [context.Process(target=take_turns, args=(tmp_path, barrier, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "200"


@pytest.fixture(params=["no locks", "those of one machine"])
def without_locks(request, monkeypatch, tmp_path):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    if request.param == "no locks":
        monkeypatch.setattr(run_lock, "hold", lambda file: (_ for _ in ()).throw(NoLocks()))
    else:
        mounts = tmp_path / "mounts"
        mounts.write_text(f"disk / ext4 rw 0 0\nserver:/x {tmp_path.resolve()} nfs4 rw,vers=4.2,local_lock=all 0 0\n")
        monkeypatch.setattr(run_lock, "MOUNTS", mounts)


def test_where_there_are_no_locks_a_file_says_who_holds_the_folder(without_locks, tmp_path):
    folder = tmp_path / "out"
    with holder(folder) as process:
        message = rf"in use by another run \(process {process.pid} on .*\).*; if it has ended, remove .*out/.lock$"
        with pytest.raises(UserError, match=message), held(folder):
            pass
        assert f'"pid": {process.pid}' in (folder / ".lock").read_text()
        process.kill()
        process.join()
        with held(folder):  # its process has ended on this machine, which can tell
            assert f'"pid": {os.getpid()}' in (folder / ".lock").read_text()
    assert not (folder / ".lock").exists()


def test_without_locks_another_machine_is_believed(without_locks, tmp_path):
    other = run_lock.Holder(Process("elsewhere", 1, "boot:1"), "2026-01-01 00:00:00")
    (tmp_path / ".lock").write_text(other.text())
    with (
        pytest.raises(UserError, match=r"process 1 on elsewhere, since 2026-01-01 00:00:00\).*remove .*/.lock$"),
        held(tmp_path),
    ):
        pass
    assert (tmp_path / ".lock").read_text() == other.text()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"host": 1}', b"[[[["])
def test_whatever_a_lock_file_holds_a_lock_that_is_free_is_taken(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_folder_that_cannot_be_made_or_written_to_is_said_to_be_so(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / ".lock").mkdir(parents=True)
    for folder in (tmp_path / "file" / "out", tmp_path / "taken"):
        with pytest.raises(UserError, match=f"--proj_dir {folder} is not a writable folder"), held(folder):
            pass


@pytest.mark.parametrize("flags", [{}, {"resume": 1}, {"resume": "never"}, {"overwrite": 1}], ids=str)
def test_no_start_of_a_run_touches_a_folder_in_use(job, flags, tmp_path):
    folder = job.run("in use", save_steps=1) if not (job.folder / "in use").exists() else job.folder / "in use"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with holder(folder) as process:
        (folder / "resume.pth").rename(tmp_path / "away")  # it is not read either
        with pytest.raises(UserError, match=f"in use by another run .process {process.pid} on"):
            job.run("in use", epoch_count=2, **flags)
        (tmp_path / "away").rename(folder / "resume.pth")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
