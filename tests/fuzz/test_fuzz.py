"""Whatever bytes a file holds, it is read, or refused with a sentence, in little time and memory: see `readers.py`."""

import random

import pytest

from tests.fuzz import bad_readers
from tests.fuzz.__main__ import FAULTS, run, table
from tests.fuzz.mutations import mutant
from tests.fuzz.readers import READERS

NAMES = [reader.name for reader in READERS]


def check(each: int, seed: int) -> None:
    counts, faults = run(NAMES, each, seed)
    assert not faults, "\n".join(faults)
    assert all(sum(found.values()) == each for found in counts.values()), table(counts)
    assert sum(found["refused"] for found in counts.values()) > each * len(NAMES) / 3, table(counts)
    assert not any(found[fault] for found in counts.values() for fault in FAULTS)


def test_damaged_files_of_every_reader_are_read_or_refused_with_a_sentence():
    check(each=6, seed=1)


@pytest.mark.slow
def test_many_damaged_files_of_every_reader_are_read_or_refused_with_a_sentence():
    check(each=60, seed=2)


def test_a_case_is_the_same_every_time_and_cases_differ():
    good = b'{"text": "a row", "list": [1, 2, 3]}\n' * 20

    def drawn(seed: int) -> list[bytes]:
        return [mutant(good, random.Random(f"{seed} {number}")).content for number in range(50)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0)) - {good}) > 40


def test_the_harness_sees_each_kind_of_fault():
    names = [reader.name for reader in bad_readers.READERS]
    counts, faults = run(names, 1, readers=bad_readers.__name__)
    assert counts == {name: {name: 1} for name in names}
    assert [fault.partition(":")[0] for fault in faults] == names[2:]
