"""A short loop of faults; `sh scripts/test_faults.sh` is the long one.

Each test collects all problems of its cases, so that one failing operation does not hide the next.
"""

import random

import pytest

from tests.faults.flips import flip_bits, readers
from tests.faults.outputs import JOBS, Outputs
from tests.faults.runs import SETUPS, cut, error_of, fail, kill, kill_started, numbers_of
from tests.faults.shim import CHANGES, KINDS

NAMED = {setup.name: setup for setup in SETUPS}
OUTPUTS = {job.name: job for job in JOBS}


def spread(numbers: list[int], many: int) -> list[int]:
    """As many of them as that, from the first to the last."""
    return sorted({numbers[i * (len(numbers) - 1) // max(1, many - 1)] for i in range(many)})


def of_every_kind(operations, many: int, kinds=CHANGES) -> list[int]:
    """Numbers of operations: of each kind some."""
    return sorted(number for numbers in numbers_of(operations, kinds).values() for number in spread(numbers, many))


def problems(cases) -> list[str]:
    """The cases with something wrong: (case, what is wrong) pairs."""
    return [f"{case}: {problem}" for case, problem in cases if problem]


@pytest.mark.parametrize("name, many", [("bone, evaluated", 6), ("full", 3), ("two processes, stage 2", 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(bench, name, many):
    setup = NAMED[name]
    numbers = spread(of_every_kind(bench.operations(setup), 3), many)
    assert not problems((f"killed at {at}", kill(bench, setup, at)) for at in numbers)


def test_a_run_killed_within_a_step_goes_on_to_the_same_bytes(bench):
    setup = NAMED["bone, evaluated"]
    renames = numbers_of(bench.operations(setup))["rename"]
    cases = list(zip(spread(renames, 4), (500, 5000, 15000, 1), strict=True))
    assert not problems((f"{delay} us after {at}", kill(bench, setup, at, delay)) for at, delay in cases)


@pytest.mark.parametrize("name, many", [("bone, evaluated", 12), ("full", 4)])
def test_a_power_cut_costs_no_step_that_was_saved(bench, name, many):
    setup = NAMED[name]
    operations = bench.operations(setup)
    # Where something else happens than one more write, twice each; and at the end.
    places = [at for at, operation in enumerate(operations) if operation.kind != "write"]
    states = [(at, seed) for at in [*spread(places, many // 2 - 1), len(operations)] for seed in range(2)]
    assert not problems((f"after {at} operations, #{seed}", problem) for at, seed, problem in cut(bench, setup, states))


def test_an_operation_that_fails_once_loses_nothing(bench):
    setup = NAMED["bone, evaluated"]
    numbers = of_every_kind(bench.operations(setup), 2, KINDS)
    kinds = {operation.number: operation.kind for operation in bench.operations(setup)}
    cases = [(at, error_of(kinds[at], at)) for at in numbers]
    assert not problems((f"{kinds[at]} {at} with {error}", fail(bench, setup, at, error)) for at, error in cases)


@pytest.mark.parametrize("name", ["merge to .pth", "merge to a folder"])
def test_an_output_is_the_older_or_the_new_one_whatever_happens(bench, name):
    outputs, job = Outputs(bench), OUTPUTS[name]
    operations = outputs.operations(job)
    killed = [(f"killed at {at}", outputs.kill(job, at)) for at in spread(of_every_kind(operations, 1), 2)]
    failed = [(f"{at} failed", outputs.fail(job, at, "EIO")) for at in spread(of_every_kind(operations, 1, KINDS), 3)]
    states = [(at, seed) for seed, at in enumerate(spread(list(range(1, len(operations) + 1))[-8:], 3))]
    cuts = [(f"cut after {at}, #{seed}", problem) for at, seed, problem in outputs.cut(job, states)]
    assert not problems(killed + failed + cuts)


def flipped(bench, work, many):
    given = readers(bench.reference(NAMED["bone, evaluated"]), bench.work / "base.pth", work)
    return [defect for reader in given for defect in flip_bits(reader, many)[1]]


def test_no_flipped_bit_is_read_in_silence(bench, tmp_path):
    assert not flipped(bench, tmp_path, 34)


@pytest.mark.slow
def test_every_way_to_train_survives_kills_and_power_cuts(bench):
    found = []
    for setup in SETUPS:
        operations = bench.operations(setup)
        draw = random.Random(setup.name)
        numbers = of_every_kind(operations, 1)
        cases = [(at, -1) for at in draw.sample(numbers, 2)] + [(draw.choice(numbers), draw.randrange(20000))]
        found += [(f"{setup.name}, killed {delay} us after {at}", kill(bench, setup, at, delay)) for at, delay in cases]
        states = [(draw.randint(1, len(operations)), seed) for seed in range(2)]
        found += [
            (f"{setup.name}, cut after {at}, #{seed}", problem) for at, seed, problem in cut(bench, setup, states)
        ]
    assert not problems(found)


@pytest.mark.slow
def test_a_started_run_that_is_killed_leaves_no_process_and_goes_on(bench):
    setup = NAMED["two processes, stage 2"]
    at = numbers_of(bench.operations(setup))["rename"][-3]
    assert not problems([(f"killed at {at}", kill_started(bench, setup, at))])


@pytest.mark.slow
def test_no_flipped_bit_of_many_is_read_in_silence(bench, tmp_path):
    assert not flipped(bench, tmp_path, 250)
