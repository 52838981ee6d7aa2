"""What ends a run from outside or within, in each of its states, on each of its ranks: a table of real processes."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

from rwkv_bone import checkpoints
from tests.training.acting import perform
from tests.training.conftest import log_of

INT, TERM, HUP, USR1, USR2 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
STEPS = 3
# A rank that waits for longer than this has been left alone.
TIMEOUT = {"rank_timeout": 5}


@dataclass
class Row:
    """A run, what happens to it, and how it must end."""

    name: str
    acts: list[tuple[int, str, str, Any]]  # rank, place, what, value: tests/training/acting.py
    status: Any  # one number, or for each rank one or a set of those that are right
    step: int  # of the state that it leaves, 0: none
    words: str  # on standard error
    ranks: int = 1
    sends: list[tuple[float, int, list[int]]] = field(default_factory=list)
    flags: dict = field(default_factory=dict)
    ignored: tuple[int, ...] = ()
    lines: int = 0  # on standard error; 0 = any number

    def run(self, job) -> dict:
        data = {"eval_data": job.flags["data_file"], "eval_samples": 2, "micro_bsz": 4 // self.ranks}
        flags = (
            data
            | (TIMEOUT if self.ranks > 1 else {})
            | self.flags
            | {"proj_dir": job.folder / self.name, "devices": self.ranks}
        )
        return {
            "name": self.name,
            "argv": [str(word) for word in job.argv(flags)],
            "proj_dir": str(flags["proj_dir"]),
            "ranks": self.ranks,
            "acts": self.acts,
            "sends": self.sends,
            "ignored": self.ignored,
        }


NOTHING = "interrupted before the first step: nothing was lost"
SAVED = "interrupted; the last step saved is {}, in "
AT_ONCE = "stopped at once; the last step saved is {}, in "
EACH = {"save_steps": 1}


def twice(first, second) -> list:
    return [(0, "step 2", "signal", first), (0, "step 2", "signal", second)]


ONE = [
    # Before the first step there is nothing to save.
    Row("term while loading", [(0, "load", "signal", TERM)], 143, 0, NOTHING, lines=1),
    Row("ctrl-c while reading data", [(0, "data", "signal", INT)], 130, 0, NOTHING, lines=1),
    Row("usr1 while measuring before", [(0, "before", "signal", USR1)], 138, 0, "interrupted; nothing was saved yet"),
    # In a step: it is saved.
    Row("term in a step", [(0, "step 2", "signal", TERM)], 143, 2, SAVED.format(2)),
    Row("usr1 in a step", [(0, "step 2", "signal", USR1)], 138, 2, SAVED.format(2)),
    Row("usr2 in a step", [(0, "step 1", "signal", USR2)], 140, 1, SAVED.format(1)),
    Row("hang-up in a step", [(0, "step 1", "signal", HUP)], 129, 1, SAVED.format(1)),
    Row("ctrl-c in a step", [(0, "step 1", "signal", INT)], 130, 1, SAVED.format(1)),
    Row("term in a save", [(0, "save", "signal", TERM)], 143, 1, SAVED.format(1), flags=EACH),
    Row("term in the last step", [(0, "step 3", "signal", TERM)], 143, 3, SAVED.format(3)),
    # The trained model is saved; the measurement is made up by the next run.
    Row("term while measuring after", [(0, "after", "signal", TERM)], 143, 3, SAVED.format(3)),
    # Twice.
    Row("ctrl-c twice", twice(INT, INT), 130, 1, AT_ONCE.format(1), flags=EACH),
    Row("usr1, then term as a reminder", twice(USR1, TERM), 138, 2, SAVED.format(2)),
    Row("term twice at a time", twice(TERM, TERM), 143, 2, SAVED.format(2)),
    Row("hang-up twice", twice(HUP, HUP), 129, 2, SAVED.format(2)),
    Row("term, then ctrl-c", twice(TERM, INT), 130, 1, AT_ONCE.format(1), flags=EACH),
    Row("ctrl-c twice in C", [(0, "step 2", "sleep in C", 0)], 130, 1, AT_ONCE.format(1), flags=EACH,
        sends=[(0.3, INT, [0]), (0.8, INT, [0])]),
    Row("term twice while it sleeps", [(0, "step 2", "sleep", 0)], 143, 1, AT_ONCE.format(1), flags=EACH,
        sends=[(0.3, TERM, [0]), (1.8, TERM, [0])]),
    Row("ctrl-c in C while loading", [(0, "load", "sleep in C", 0)], 130, 0, NOTHING, lines=1, sends=[(0.3, INT, [0])]),
    Row("hang-up under nohup", [(0, "step 1", "signal", HUP)], 0, 3, "", ignored=(HUP,)),
    # 0.001 minutes are over when the first step is.
    Row("time is up", [], 124, 1, "--max_minutes 0.001 are over; the last step saved is 1, in ",
        flags={"max_minutes": 0.001}),
]  # fmt: skip

FIRST, SECOND = "rank 0 of 2 ({host})", "rank 1 of 2 ({host})"
BEGUN = "interrupted; nothing was saved yet"
KILLED = "error: {} has ended without a word: it was killed, perhaps by the system for lack of memory (see dmesg)"


def both(what, place, value) -> list:
    return [(0, place, what, value), (1, place, what, value)]


TWO = [
    # Signals to one rank or to all.
    Row("term to both while loading", both("signal", "load", TERM), 143, 0, NOTHING),
    Row("term to the second while measuring", [(1, "before", "signal", TERM)], 143, 0, BEGUN),
    Row("ctrl-c to both in a step", both("signal", "step 1", INT), 130, 2, SAVED.format(2)),
    Row("usr1 to the second in a step", [(1, "step 1", "signal", USR1)], 138, 2, SAVED.format(2)),
    Row("term to the first after training", [(0, "after", "signal", TERM)], (143, {0, 143}), 3, SAVED.format(3)),
    Row("time is up for both", [], 124, 1, "--max_minutes 0.001 are over", flags={"max_minutes": 0.001}),
    # The ranks agree on a save by the clock of the first; 0.001 milliseconds are over when the first step is.
    Row("the second dies after a save by the minute", [(1, "step 2", "die", 0)], (1, -9), 1, KILLED.format(SECOND),
        flags={"save_minutes": 1e-6}),
    Row("the second hangs, ctrl-c twice", [(1, "step 2", "sleep in C", 0)], 130, 1, AT_ONCE.format(1),
        sends=[(0.5, INT, [0, 1]), (1.0, INT, [0, 1])], flags=EACH | {"rank_timeout": 100}),
    # Ranks that cannot go on.
    Row("the second stops", [(1, "step 2", "stop", 0)], (1, -9), 1, f"error: {SECOND} has stopped", flags=EACH),
    Row("the first stops", [(0, "step 2", "stop", 0)], (-9, 1), 1, f"error: {FIRST} has stopped", flags=EACH),
    Row("the second holds the lock of Python", [(1, "step 2", "hold the lock", 0)], (1, -9), 1,
        f"error: {SECOND} has stopped", flags=EACH),
    Row("the second sleeps", [(1, "step 2", "sleep", 0)], 1, 1, f"error: {SECOND} hangs: no progress for", flags=EACH),
    Row("the first sleeps", [(0, "step 2", "sleep", 0)], 1, 1, f"error: {FIRST} hangs: no progress for", flags=EACH),
    Row("the second dies", [(1, "step 2", "die", 0)], (1, -9), 1, KILLED.format(SECOND), flags=EACH),
    Row("the first dies", [(0, "step 2", "die", 0)], (-9, 1), 1, KILLED.format(FIRST), flags=EACH),
    Row("the second dies while loading", [(1, "load", "die", 0)], (1, -9), 0, KILLED.format(SECOND), flags=EACH),
    # They are watched from the moment they have met.
    Row("the second dies while importing", [(1, "import", "die", 0)], (1, -9), 0, KILLED.format(SECOND)),
    Row("the first dies while importing", [(0, "import", "die", 0)], (-9, 1), 0, KILLED.format(FIRST)),
    Row("the second stops while importing", [(1, "import", "stop", 0)], (1, -9), 0, f"error: {SECOND} has stopped"),
    # Errors.
    Row("the second raises", [(1, "step 2", "raise", "by nothing")], 1, 1, f"{SECOND} failed:", flags=EACH),
    Row("the first raises", [(0, "step 2", "raise", "by nothing")], 1, 1, f"{FIRST} failed:", flags=EACH),
    Row("a mistake on the second", [(1, "data", "mistake", "no rows")], 2, 0, f"error: {SECOND}: no rows", lines=1),
    Row("a mistake on both", both("mistake", "data", "no rows"), 2, 0, "error: no rows", lines=1),
]  # fmt: skip
for row in TWO:
    row.ranks = 2

RESUMED = {"the second dies", "the first stops", "the second sleeps", "term while measuring after"}
RESUMED |= {"the second dies after a save by the minute", "time is up for both"}
UNDISTURBED = [Row(f"undisturbed, {ranks}", [], 0, STEPS, "", ranks, flags={"save_minutes": 0}) for ranks in (1, 2)]


@pytest.fixture(scope="module")
def results(job):
    runs = [row.run(job) for row in TWO + ONE + UNDISTURBED]
    for row in ONE + TWO:
        if row.name in RESUMED:
            again = row.run(job) | {"name": f"{row.name}, resumed", "acts": [], "sends": [], "after": row.name}
            # The same command: --resume auto. But not for another thousandth of a minute.
            again["argv"] += ["--max_minutes", "0"] if "max_minutes" in row.flags else []
            runs.append(again)
    return perform(runs, job.folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", ONE + TWO, ids=lambda row: row.name)
def test_a_run_ends_as_the_table_says(row, results, job):
    result = results[row.name]
    errors = result["errors"]
    assert result["left"] == [], errors
    expected = row.status if isinstance(row.status, tuple) else (row.status,) * row.ranks
    for status, wanted in zip(result["statuses"], expected, strict=True):
        assert status in (wanted if isinstance(wanted, set) else {wanted}), errors
    first, _, rest = row.words.partition("{host}")
    begin = errors.index(first)
    assert rest in errors[begin:]
    # Told once, on top, and nothing of others that were torn down.
    assert errors.count(first) == 1 and "gloo" not in errors
    assert errors.count("Traceback") == (1 if "raises" in row.name else 0)
    assert not row.lines or len(errors.splitlines()) == row.lines, errors
    assert result["step"] == row.step
    # A folder that has nothing in it goes again; of a process that was killed, the lock stays.
    if row.words == NOTHING:
        assert not (job.folder / row.name).exists()


def bits_of(folder) -> dict[str, bytes]:
    """What a complete run has left: adapter and state."""
    files = {name: checkpoints.read_state(folder / name) for name in ("rwkv-0.pth", "resume.pth")}
    return {f"{name} {key}": bytes(value.untyped_storage()) for name in files for key, value in files[name].items()}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ONE + TWO if row.name in RESUMED], ids=lambda row: row.name)
def test_what_is_left_goes_on_to_the_bits_of_an_undisturbed_run(row, results, job):
    again = results[f"{row.name}, resumed"]
    assert set(again["statuses"]) == {0}, again["errors"]
    assert len(log_of(job.folder / row.name)) == STEPS
    found, expected = (bits_of(job.folder / name) for name in (row.name, f"undisturbed, {row.ranks}"))
    assert len(found) > 3 and found == expected
