"""benchmarks/convergence/statistics.py: by hand, against scipy, and on data whose truth is known."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.convergence import statistics as s


def row(method="bone", rate=1e-3, seed=0, development=1.0, heldout=1.0, forgetting=0.0, alpha=None, **more):
    end = {"step": 10, "development": development, "heldout": heldout, "forgetting": forgetting}
    return {"method": method, "rate": rate, "seed": seed, "alpha": alpha, "variant": "", "points": [end], **more}


def path_of(*points):
    return {"points": [{"step": step, "heldout": loss, "forgetting": lost} for step, loss, lost in points]}


def test_rate_and_alpha_are_chosen_by_development_loss_over_both_seeds_alone():
    rows = [
        row(rate=1, seed=0, development=2.0, heldout=0.1),
        row(rate=1, seed=1, development=2.0, heldout=0.1),
        row(rate=2, seed=0, development=1.0, heldout=9.0),
        row(rate=2, seed=1, development=1.2, heldout=9.0),
        row(rate=3, seed=0, development=0.5),  # one lucky seed, and no second
        row(rate=1, seed=2, development=0.1),  # no seed of the choice
        row(rate=4, seed=0, development=None),
        row(rate=4, seed=1, development=0.1),
    ]
    assert s.chosen(rows) == (2, None)
    assert s.chosen(rows[4:5]) == (3, None)
    assert s.chosen([]) is None


def test_what_is_tested_are_the_other_seeds_at_the_choice():
    rows = [
        row(rate=rate, seed=seed, development=rate, heldout=10 * rate + seed) for rate in (1, 2) for seed in range(4)
    ]
    assert s.tested(rows) == {2: 12.0, 3: 13.0}
    assert [one["seed"] for one in s.at_best(rows)] == [0, 1, 2, 3]


def test_an_arm_is_a_method_with_its_alpha_and_variant():
    rows = [row("lora", alpha=2.0), row("lora", alpha=8.0), row("lora", alpha=2.0) | {"variant": "mix 0.5"}, row()]
    assert len(s.Arm("", "lora", 2.0).of(rows)) == 1 and len(s.Arm("", "lora").of(rows)) == 2
    assert len(s.Arm("", "lora", None, "mix 0.5").of(rows)) == 1


def test_a_paired_comparison_is_scipys_and_pairs_by_seed():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.2, 0.4, 6), rng.uniform(0.2, 0.4, 6)
    first = dict(enumerate(a))
    second = {**{seed: b[seed] for seed in reversed(range(6))}, 99: 5.0}
    found = s.paired(first, second)
    theirs = stats.ttest_rel(np.log(a), np.log(b))
    assert (found.pairs, found.p) == (6, pytest.approx(theirs.pvalue))
    low, high = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.wins == (a < b).sum()
    flips = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert s.sign_flips(a - b) == pytest.approx(flips.pvalue)


def test_a_difference_by_hand():
    found = s.paired({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0}, ratio=False)
    # 1, 2, 3: mean 2, error 1/sqrt(3), t = 3.4641 with two degrees of freedom; of eight patterns two are as far.
    assert (found.difference, found.p) == (2.0, pytest.approx(0.0742, abs=1e-4))
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert (found.p_flips, found.wins) == (0.25, 0)
    assert s.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).wins == 1 and s.paired({0: 1.0}, {0: 2.0}) is None
    assert s.paired({0: 1.0, 1: math.inf}, {0: 1.0, 1: 1.0}) is None


def test_signs_are_flipped_in_every_way():
    values = [0.3, -0.1, 0.7, 0.2, 0.4]
    count = sum(
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True))) >= 1.5 - 1e-9
        for signs in itertools.product((1, -1), repeat=5)
    )
    assert s.sign_flips(values) == count / 32 and s.sign_flips([1.0] * 6) == 2 / 64


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.6, 0.9]) == [1.0, 1.0] and s.holm([]) == []


def test_without_a_difference_five_in_a_hundred_are_found_and_with_one_most_are():
    rng = np.random.default_rng(0)

    def found(effect, count=400):
        hits = [0, 0, 0]
        for _ in range(count):
            noise = rng.normal(0, 0.02, 8)  # of the seed: both arms have it
            a, b = np.exp(noise + rng.normal(effect, 0.02, 8)), np.exp(noise + rng.normal(0, 0.02, 8))
            one = s.paired(dict(enumerate(a)), dict(enumerate(b)))
            hits[0] += one.p < 0.05
            hits[1] += one.p_flips < 0.05
            hits[2] += one.low <= effect <= one.high
        return [hit / count for hit in hits]

    t, flips, covered = found(0.0)
    assert 0.02 < t < 0.08 and 0.02 < flips < 0.08 and 0.92 < covered < 0.98
    t, flips, covered = found(-0.06)
    assert t > 0.95 and flips > 0.95 and 0.92 < covered < 0.98


def test_of_a_family_without_any_difference_holm_finds_one_in_at_most_five_of_a_hundred():
    rng = np.random.default_rng(3)
    families = []
    for _ in range(300):
        pairs = np.exp(rng.normal(0, 0.1, (6, 2, 6)))
        families.append(s.holm([s.paired(dict(enumerate(a)), dict(enumerate(b))).p for a, b in pairs]))
    assert sum(min(family) < 0.05 for family in families) / 300 < 0.08


def test_forgetting_is_read_off_where_the_loss_first_falls_to_a_level():
    run = path_of((0, 4.0, 0.0), (5, 1.0, 0.8), (10, 0.25, 2.0), (15, 0.5, 3.0))
    assert s.forgetting_at(run, 1.0) == pytest.approx(0.8)
    assert s.forgetting_at(run, 0.5) == pytest.approx(1.4)  # half the way in the logarithm
    assert s.forgetting_at(run, 2.0) == pytest.approx(0.4)
    assert s.forgetting_at(run, 0.2) is None and s.forgetting_at(run, 5.0) == 0.0
    assert s.forgetting_at(path_of((0, 4.0, 0.0), (5, None, None), (10, 0.1, 1.0)), 1.0) is None


def test_who_does_not_reach_the_level_is_left_out_and_counted():
    rows = [
        path_of((0, 2.0, 0.0), (9, end, 1.0)) | {"seed": seed} for seed, end in enumerate((0.1, 0.1, 0.5, 1.5, 1.0))
    ]
    assert s.on_the_way(rows, 1.0) == {2: 0.5, 4: 1.0}
    assert s.common_level([rows, rows[2:]]) == pytest.approx(1.02)


def test_intervals_of_a_mean_are_scipys():
    values = [0.2, 0.25, 0.22, 0.3]
    mean, low, high = s.mean_interval(values)
    theirs = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *theirs))
    assert s.mean_interval([1.0]) == (1.0, -math.inf, math.inf)


def test_the_best_rate_lies_between_those_that_were_tried():
    def loss(rate):
        return math.exp(0.1 * (math.log(rate) - math.log(2e-3)) ** 2 - 1)

    assert s.best_rate({rate: loss(rate) for rate in (5e-4, 1e-3, 3e-3, 9e-3)}) == pytest.approx(2e-3)
    assert s.best_rate({1e-3: 1.0, 2e-3: 2.0, 3e-3: 3.0}) is None  # at an end
    assert s.best_rate({1e-3: 3.0, 2e-3: 2.0, 3e-3: 1.0}) is None
    assert s.best_rate({1e-3: 1.0, 2e-3: 0.5, 4e-3: math.inf}) is None


def test_a_loss_between_rates_lies_on_a_line_of_logarithms():
    assert s.at_rate({1e-4: 1.0, 1e-2: 4.0}, 1e-3) == pytest.approx(2.0)
    assert s.at_rate({1e-4: 1.0, 1e-2: 4.0}, 1e-3, logarithm=False) == pytest.approx(2.5)
    assert s.at_rate({1e-4: 1.0, 1e-3: math.inf}, 5e-4) is None


def test_a_power_law_is_found_again():
    assert s.power_law([32, 128, 256], [0.4 * width**-1.25 for width in (32, 128, 256)]) == pytest.approx((0.4, -1.25))


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps({"a": 1}) + "\n" + '{"a": 2')
    assert s.read(file) == [{"a": 1}]
