"""benchmarks/convergence: where a search goes on, and which run comes next."""

import math
from dataclasses import replace

import pytest

from benchmarks.convergence.grid import is_inside, missing_alphas, missing_rates, place_of
from benchmarks.convergence.series import Bench
from benchmarks.convergence.tasks import Task
from benchmarks.convergence.training import Job

# 3 ** (n / 2), to three digits: the rates from about 1e-3 to 1e-1.
LADDER = [0.000457, 0.000792, 0.00137, 0.00238, 0.00412, 0.00713, 0.0123, 0.0214, 0.037, 0.0642]


@pytest.mark.parametrize(
    "losses, wanted",
    [
        # Nothing yet: the start and a factor of 3 on both sides.
        ({}, [0.00412, 0.00137, 0.0123]),
        # The best at the low end: on by 3; at the high end too.
        ({0.00137: 1.0, 0.00412: 2.0, 0.0123: 3.0}, [0.000457]),
        ({0.00137: 3.0, 0.00412: 2.0, 0.0123: 1.0}, [0.037]),
        # Inside: both neighbours at 1.73.
        ({0.00137: 3.0, 0.00412: 1.0, 0.0123: 2.0}, [0.00238, 0.00713]),
        # One of them is better: what is missing of its neighbours at 1.73, and no more at 3.
        ({0.00137: 3.0, 0.00238: 0.5, 0.00412: 1.0, 0.00713: 1.5, 0.0123: 2.0}, []),
        ({0.00412: 3.0, 0.00713: 1.5, 0.0123: 1.0, 0.0214: 0.5, 0.037: 2.0}, []),
        # A run that diverged is worse than any other, on a plateau the smallest rate is the best.
        ({0.00137: 1.0, 0.00412: None, 0.0123: math.nan}, [0.000457]),
        ({0.00137: 1.0, 0.00412: 1.0, 0.0123: 1.0}, [0.000457]),
    ],
)
def test_a_search_goes_on_until_the_best_rate_is_inside(losses, wanted):
    assert missing_rates(losses, 0.0041) == wanted


@pytest.mark.parametrize("best", LADDER)
@pytest.mark.parametrize("fine", [True, False])
def test_a_search_ends_beside_the_least_of_any_valley(best, fine):
    losses = {}
    while rates := missing_rates(losses, 0.0041, fine=fine):
        assert not set(rates) & set(losses)
        losses |= {rate: abs(math.log(rate / best)) for rate in rates}
    found = min(losses, key=losses.get)
    assert is_inside(losses)
    assert abs(place_of(found) - place_of(best)) <= (0 if fine else 1)
    near = sorted(abs(place_of(rate) - place_of(found)) for rate in losses)
    assert near[1] == near[2] == (1 if fine else 2)
    assert len(losses) <= 10


def test_a_search_that_only_falls_ends_at_its_bound():
    losses = {}
    while rates := missing_rates(losses, 0.0041):
        losses |= {rate: rate for rate in rates}
    assert 1e-7 <= min(losses) < 3e-7 and not is_inside(losses)


def test_alphas_go_on_at_the_end_that_is_best():
    assert sorted(missing_alphas({})) == [1, 2, 4, 8, 16]
    tried = dict.fromkeys([1.0, 2.0, 4.0, 8.0, 16.0], 2.0)
    assert missing_alphas(tried | {16.0: 1.0}) == [32.0]
    assert missing_alphas(tried | {1.0: 1.0}) == [0.5]
    assert missing_alphas(tried | {4.0: 1.0}) == []


def bench(**more) -> Bench:
    task = Task("toy", "bundled", "m.pth", "t", "h", "x", steps=5)
    return Bench(Job(task, "base"), **more)


def finished(job: Job, loss: float | None) -> dict:
    return job.row() | {"points": [{"development": 9.0}, {"development": loss}]}


def run_all(on: Bench, series: str, loss) -> list[Job]:
    jobs = []
    while job := on.missing(series):
        jobs.append(job)
        on.rows.append(finished(job, loss(job)))
        assert len(jobs) < 300
    return jobs


def valley(job: Job) -> float:
    """Best at a rate of 0.0123 and alpha 8; rsLoRA's scale lets it want less."""
    best = {"rslora": 0.00412, "full": 0.000457}.get(job.method, 0.0123)
    return abs(math.log((job.rate or 1) / best)) + (abs(math.log((job.alpha or 1) / 8)) if job.method == "lora" else 0)


def test_every_method_is_searched_to_its_own_best_and_then_seen_with_more_seeds():
    on = bench()
    jobs = run_all(on, "grid", valley)
    assert jobs[0].method == "base" and all(job.base for job in jobs[1:])
    assert on.best("bone") == (0.0123, None) and on.best("rslora") == (0.00412, 2.0)
    assert on.best("lora") == (0.0123, 2.0) and on.best("lora", searched=True) == (0.0123, 8.0)
    assert {job.alpha for job in jobs if job.method == "lora"} == {1.0, 2.0, 4.0, 8.0, 16.0}
    # The second seed: of the best and its neighbours at 1.73, and of the neighbours of the best alpha.
    second = [(job.rate, job.alpha) for job in jobs if job.seed == 1 and job.method == "lora"]
    assert sorted(second, key=lambda key: (key[1], key[0])) == [
        *((rate, 2.0) for rate in (0.00713, 0.0123, 0.0214)),
        (0.0123, 4.0),
        *((rate, 8.0) for rate in (0.00713, 0.0123, 0.0214)),
        (0.0123, 16.0),
    ]
    seeds = run_all(on, "seeds", valley)
    assert {(job.method, job.rate, job.alpha) for job in seeds if job.method in ("bone", "lora")} == {
        ("bone", 0.0123, None),
        ("lora", 0.0123, 2.0),
        ("lora", 0.0123, 8.0),
    }
    assert sorted(job.seed for job in seeds if job.method == "bone") == [2, 3, 4, 5, 6, 7]
    assert run_all(on, "seeds", valley) == []


def test_with_one_seed_a_search_ends_without_a_second():
    on = bench(seeds=1)
    assert {job.seed for job in run_all(on, "grid", valley)} == {0}
    assert on.best("bone") == (0.0123, None) and on.missing("seeds") is None


def test_the_best_is_chosen_by_both_seeds_and_by_development_rows():
    on = bench(methods=("bone",))

    def loss(job: Job) -> float:
        # With the first seed the neighbour below looks best, with the second it is far worse.
        lucky = {(0.00713, 0): -1.0, (0.00713, 1): 5.0}
        return lucky.get((job.rate, job.seed), valley(job))

    run_all(on, "grid", loss)
    assert on.best("bone") == (0.0123, None)
    assert {job.rate for job in run_all(on, "seeds", loss)} == {0.0123}


def test_a_failed_run_counts_as_the_worst_and_is_not_tried_again():
    on = bench(methods=("bone",), fine=False)
    tried = []
    while job := on.missing("grid"):
        tried.append(job)
        if job.rate > 0.005:
            on.failed.append(job)
        else:
            on.rows.append(finished(job, valley(job)))
    assert len(tried) == len({(job.rate, job.seed, job.method) for job in tried})
    assert on.best("bone") == (0.00412, None)


def test_rows_of_other_settings_are_not_taken_for_these():
    on = bench(methods=("bone",))
    run_all(on, "grid", valley)
    assert on.missing("grid") is None
    longer = replace(on.task_job, task=replace(on.task_job.task, steps=6))
    assert Bench(longer, methods=("bone",), rows=on.rows).missing("grid").method in ("base", "bone")
    assert Bench(replace(on.task_job, r=8), methods=("bone",), rows=on.rows).missing("grid").method == "base"
