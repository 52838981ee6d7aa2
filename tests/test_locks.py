"""Locks that a dead process does not keep."""

import errno
import fcntl
import os
import signal
import time

import pytest

from rwkv_bone import locks
from tests.forked import forked


def test_a_lock_is_held_by_one_opening_until_it_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert locks.hold(first)
        assert not locks.hold(second) and not locks.hold(second.fileno())
        first.close()
        assert locks.hold(second)


def test_a_killed_process_keeps_no_lock(tmp_path):
    def body(ready):
        file = open(tmp_path / "lock", "w")
        assert locks.hold(file)
        ready()
        time.sleep(60)

    with open(tmp_path / "lock", "w") as file:
        with forked(body) as pid:
            assert not locks.hold(file)
            os.kill(pid, signal.SIGKILL)
        assert locks.hold(file)


def test_a_file_system_without_locks_is_told_from_a_lock_that_is_held(tmp_path, monkeypatch):
    def refuse(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    with open(tmp_path / "lock", "w") as file:
        for number, held in ((errno.EAGAIN, False), (errno.EACCES, False)):
            monkeypatch.setattr(fcntl, "flock", refuse(number))
            assert locks.hold(file) == held
        for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            monkeypatch.setattr(fcntl, "flock", refuse(number))
            with pytest.raises(locks.NoLocks):
                locks.hold(file)
        monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
        with pytest.raises(OSError) as error:
            locks.hold(file)
        assert not isinstance(error.value, locks.NoLocks)


def test_a_process_is_told_from_a_later_one_of_its_number_and_from_those_of_other_machines():
    current = locks.Process.current()
    assert current.pid == os.getpid() and current.is_dead() is False
    assert current._replace(start="another boot:1").is_dead() is True
    assert current._replace(start="").is_dead() is False
    assert current._replace(host="elsewhere").is_dead() is None
    boot, container, ticks = current.start.split()
    # A process of another container may have any number here.
    assert current._replace(start=f"{boot} pid:[1] {ticks}", pid=2**22 + 1).is_dead() is None
    assert current.is_here() and not current._replace(start=f"{boot} {container} 1").is_here()
    with forked(lambda ready: (ready(), time.sleep(60))) as pid:
        other = locks.Process(current.host, pid, locks.started(pid))
        assert other.start and other.is_dead() is False
        os.kill(pid, signal.SIGKILL)
    assert other.is_dead() is True
