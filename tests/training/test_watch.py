"""The rules by which a run's processes find one that has stopped or hangs, with a clock that the tests turn."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from rwkv_bone.cluster import links, process, signs
from rwkv_bone.cluster.hanging import PATIENCE, Judge, Life
from rwkv_bone.errors import Interrupted, exit_status
from rwkv_bone.signals import SIGNALS, Listener, descendants
from tests.conftest import clean_environment, python_path

TIMEOUT = 60.0
WORKING = {"running": True, "busy": True}


class Clock:
    """A run of three ranks. lives: what each tells in every second, None for one that is silent."""

    def __init__(self, spins: bool = False):
        self.judge, self.now, self.done = Judge(range(3), TIMEOUT, spins), 0, 0

    def run(self, seconds: int, *lives: dict | None, advancing: bool = False):
        """(rank, seconds it took, words) of the verdict, or None if there is none in this time."""
        for second in range(seconds):
            self.done += advancing
            for rank, life in enumerate(lives):
                if life is not None:
                    self.judge.heard(rank, Life(**{"done": self.done} | life))
            if verdict := self.judge.judge(1.0):
                return verdict.rank, second + 1, verdict.words
        return None


@pytest.fixture(params=[False, True], ids=["gloo", "nccl"])
def clock(request):
    return Clock(request.param)


def waits(clock) -> dict:
    """What a rank tells that waits for another: with NCCL it is busy."""
    return {"running": True, "busy": clock.judge.spins, "waits": True}


def test_a_run_that_advances_is_left_alone_however_idle_it_is(clock):
    idle = {"running": True}
    assert clock.run(2_000, idle, idle, idle, advancing=True) is None


def test_a_silent_rank_is_found_after_the_timeout_also_while_it_loads(clock):
    assert clock.run(20, {}, {}, {}) is None
    rank, took, words = clock.run(1000, {}, {}, None)
    assert rank == 2 and TIMEOUT <= took <= TIMEOUT + 1 and words.startswith("has stopped, or its machine is gone")


@pytest.mark.parametrize("sleeper", [0, 1, 2])
def test_a_rank_that_sleeps_while_others_wait_for_it_hangs(clock, sleeper):
    lives = [{"running": True, "at": "read (a.py:1)"} if rank == sleeper else waits(clock) for rank in range(3)]
    rank, took, words = clock.run(1000, *lives)
    assert rank == sleeper and TIMEOUT < took <= TIMEOUT + 2
    assert words == "hangs: no progress for 61 s, at read (a.py:1)"


def test_a_rank_that_works_or_writes_is_waited_for(clock):
    assert clock.run(20, *[WORKING | {"longest": 500.0}] * 3, advancing=True) is None
    for life in (WORKING, {"running": True, "disk": True}):
        assert clock.run(1000, life | {"longest": 500.0}, waits(clock), waits(clock)) is None


def test_on_gpus_no_progress_for_much_longer_than_ever_ends_a_run_of_busy_ranks():
    clock = Clock(spins=True)
    slow = WORKING | {"longest": 20.0}
    assert clock.run(50, slow, slow, slow, advancing=True) is None
    lives = [slow, slow | {"waits": True}, slow | {"waits": True}]
    rank, took, _ = clock.run(5000, *lives)
    assert rank == 0 and took == pytest.approx(20 * PATIENCE, abs=2)
    # Before anything is known, the limit is long.
    rank, took, _ = Clock(spins=True).run(5000, *[WORKING] * 3)
    assert took == pytest.approx(TIMEOUT * PATIENCE, abs=2)


@pytest.mark.parametrize("longest", [1.0, 20.0])
def test_a_rank_that_hardly_comes_to_run_is_waited_for_as_much_longer(clock, longest):
    """A crowded machine: it gets half a percent of a processor, and is not busy by that."""
    share = 0.005
    starved = {"running": True, "share": share, "longest": longest}
    spins = waits(clock)
    limit = max(TIMEOUT, PATIENCE * longest) if clock.judge.spins else TIMEOUT
    assert clock.run(int(TIMEOUT / share) - 10, starved, spins, spins) is None
    # If it hangs there, in the end it is found.
    assert clock.run(int(limit / share), starved, spins, spins)[0] == 0
    # Also where it gets more than nothing, all steps take that much longer.
    clock = Clock(clock.judge.spins)
    crowded = WORKING | {"share": 0.02, "longest": longest}
    limit = max(TIMEOUT, PATIENCE * longest)
    assert clock.run(int(limit / 0.02) - 10, *[crowded] * 3) is None


def test_the_rank_that_did_least_is_named_where_all_seem_alike():
    lives = [waits(Clock()) | {"done": 7}, waits(Clock()) | {"done": 6}, waits(Clock()) | {"done": 7}]
    assert Clock().run(1000, *lives)[0] == 1


def test_loading_has_no_limit_until_a_rank_waits_in_training_and_then_a_long_one(clock):
    assert clock.run(2_000, {}, {}, {}) is None
    rank, took, _ = Clock(clock.judge.spins).run(2_000, waits(clock), {}, waits(clock))
    assert rank == 1 and took == pytest.approx(TIMEOUT * PATIENCE, abs=2)


def test_ranks_that_are_done_are_not_judged_nor_is_the_first_alone(clock):
    clock.judge.finished(1)
    clock.judge.finished(2)
    assert clock.run(2_000, {"running": True}) is None
    clock = Clock(clock.judge.spins)
    clock.judge.finished(0)
    clock.judge.finished(1)
    assert clock.run(1000, None, None, {"running": True})[0] == 2


def test_where_a_thread_hangs_is_told_by_its_own_line_and_ours():
    where, in_collective = signs._where(sys._getframe())
    assert where.startswith("test_where_a_thread_hangs") and not in_collective


def test_progress_counts_and_remembers_the_longest_time_between(monkeypatch):
    marks = signs.Marks()
    monkeypatch.setattr(signs, "marks", marks)
    now = marks.last
    monkeypatch.setattr(signs.time, "monotonic", lambda: now)
    now += 100  # before the steps nothing is measured
    signs.progress()
    marks.running = True
    for gap in (3, 7, 2):
        now += gap
        signs.progress()
    with signs.waiting_outside():
        assert not marks.running
        now += 50
    now += 1
    signs.progress()
    assert (marks.done, marks.longest, marks.running) == (5, 7, True)


BESIDE = """
import os, sys, threading, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def work():
    while True:
        pass
threading.Thread(target=work if sys.argv[1] == "works" else lambda: time.sleep(1000), daemon=True).start()
print("ready", flush=True)
work() if sys.argv[1] == "crowds" else time.sleep(1000)
"""


@pytest.mark.skipif(not process.read("/proc/self/schedstat"), reason="this system does not tell who waits")
def test_who_works_on_a_crowded_processor_is_told_from_who_sleeps():
    """A thread that always wants a processor runs or waits, however crowded the machine is."""
    kinds = ("works", "sleeps", "crowds", "crowds", "crowds")
    programs = [subprocess.Popen([sys.executable, "-c", BESIDE, kind], stdout=subprocess.PIPE) for kind in kinds]
    try:
        for program in programs:
            program.stdout.readline()
        works, sleeps = (process.Threads(program.pid) for program in programs[:2])
        time.sleep(0.3)
        works.look(), sleeps.look()
        # As often as it takes for some turns.
        used = waited = seconds = idle = 0.0
        for _ in range(300):
            if used > 0.05 and waited > used:
                break
            time.sleep(0.1)
            got, of_sleeper = works.look(), sleeps.look()
            assert 0 <= got.waited <= got.seconds
            used, waited, seconds = used + got.used, waited + got.waited, seconds + got.seconds
            idle += of_sleeper.used + of_sleeper.waited
        assert waited > used  # four on one processor
        assert used + waited > 0.5 * seconds and idle < 0.1 * seconds
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def test_a_long_wait_that_is_told_at_its_end_counts_for_the_time_since(monkeypatch):
    now, told = [0.0], [0.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(process.Threads, "_read", lambda self: {"7": (0.0, told[0])})
    threads, waits = process.Threads(1), []
    for second in range(1, 7):
        now[0], told[0] = second, 2.5 if second >= 3 else 0.0
        waits.append(threads.look().waited)
    assert waits == [0, 0, 1, 1, 0.5, 0]


# Listeners, without a program.


@pytest.fixture
def listener(monkeypatch):
    """A listener within the steps, and a function that turns its clock."""
    from rwkv_bone import signals

    now = [1000.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    one = Listener()
    one.stepping = True

    def heard(number, after=0.0):
        now[0] += after
        return one.notes(number)

    return one, heard


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_of_two_signals_the_second_ends_at_once_unless_it_only_reminds(listener, first, second):
    one, heard = listener
    assert heard(first) and one.received == first
    orders = (signal.SIGINT, signal.SIGTERM)
    reminds = second == signal.SIGHUP or (second == signal.SIGTERM and first not in orders)
    assert heard(second, after=5) == reminds and one.received == first
    assert not heard(signal.SIGINT, after=5)


def test_a_signal_that_launcher_and_system_both_send_is_one(listener):
    one, heard = listener
    assert heard(signal.SIGTERM) and heard(signal.SIGTERM, after=0.1)
    assert not heard(signal.SIGTERM, after=2)


def test_ctrl_c_twice_in_a_moment_is_two(listener):
    _, heard = listener
    assert heard(signal.SIGINT) and not heard(signal.SIGINT, after=0.1)


def test_outside_the_steps_every_signal_ends_the_run(listener):
    one, heard = listener
    one.stepping = False
    assert not any(heard(number, after=5) for number in SIGNALS)


def test_time_that_is_up_has_the_status_of_timeout():
    from rwkv_bone.errors import TIME_UP

    def body():
        raise Interrupted("", TIME_UP)

    assert exit_status(body) == 124


PROGRAM = """
import ctypes, os, signal, subprocess, sys, time
from rwkv_bone import signals
signals.hear()
if sys.argv[1] == "fork":
    if not os.fork():
        os.kill(os.getpid(), signal.SIGTERM)  # a worker of a compiler, say
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    time.sleep(0.3)
    print("lives", flush=True)
else:
    child = subprocess.Popen(["sleep", "1000"])
    print(child.pid, flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)  # in which no Python handler runs
"""


def start(what):
    environment = clean_environment() | {"PYTHONPATH": python_path()}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_program_in_c_ends_at_once_with_what_it_has_started(number):
    # A shell that starts tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program = start("wait")
    finally:
        signal.signal(signal.SIGINT, before)
    child = int(program.stdout.readline())
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 128 + number
    assert errors == "interrupted before the first step: nothing was lost\n"
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and b") Z" not in process.read(f"/proc/{child}/stat"):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_signals_to_a_forked_process_are_not_the_programs():
    output, errors = start("fork").communicate(timeout=60)
    assert output.split() == ["-15", "lives"] and errors == ""


def test_descendants_are_found_over_generations():
    inner = f"{shlex.quote(sys.executable)} -c 'import time; time.sleep(1000)' & echo $!; wait"
    outer = subprocess.Popen(["sh", "-c", inner], stdout=subprocess.PIPE, text=True)
    grandchild = int(outer.stdout.readline())
    try:
        assert {outer.pid, grandchild} <= set(descendants())
    finally:
        os.kill(grandchild, signal.SIGKILL)
        outer.communicate()


def test_a_message_that_comes_in_pieces_is_read_whole():
    import socket

    one, other = socket.socketpair(socket.AF_UNIX)

    link, text = links.Link(other), json.dumps({"failed": "x" * 1000}).encode()
    one.sendall(text[:400])
    assert list(link.receive()) == []
    one.sendall(text[400:] + b"\n" + b'{"bye": true}\n')
    assert list(link.receive()) == [{"failed": "x" * 1000}, {"bye": True}]
    one.close()
    assert list(link.receive()) == [] and link.closed
    other.close()
