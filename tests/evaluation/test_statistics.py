"""Intervals, McNemar's test, pass@k and majorities, beside scipy, brute force and printed values."""

import itertools
import math
import random

import pytest

from rwkv_bone.evaluation.statistics import majority, mcnemar, mean_interval, paired_difference, pass_at_k, wilson


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (81, 263), (731, 1319)])
def test_wilson_is_scipys_interval(right, total, level):
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = scipy.binomtest(right, total).proportion_ci(level, method="wilson")
    assert wilson(right, total, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_newcombes_printed_examples():
    """Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    for right, total, printed in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))):
        assert wilson(right, total) == pytest.approx(printed, abs=5e-5)


def test_wilson_of_no_answers_says_nothing():
    assert wilson(0, 0) == (0, 1)


def test_mcnemar_is_scipys_exact_binomial_test():
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for b, c in [*itertools.product(range(8), repeat=2), (40, 61), (500, 430), (3, 1200), (4000, 4100)]:
        expected = scipy.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9), (b, c)


def test_mcnemar_counts_coin_throws():
    for b, c in ((0, 5), (1, 6), (2, 4), (5, 5)):
        throws = [abs(2 * sum(throw) - b - c) >= abs(b - c) for throw in itertools.product((0, 1), repeat=b + c)]
        assert mcnemar(b, c) == sum(throws) / len(throws)


def test_the_interval_of_a_paired_difference_by_hand():
    # 7 + 1 and 1 + 1 of 21 + 2 items: 6/23 -+ 1.959964 * sqrt((10/23 - 36/529) / 23).
    difference, low, high = paired_difference(7, 1, 21)
    assert difference == pytest.approx(6 / 21)
    assert (low, high) == pytest.approx((0.0134, 0.5084), abs=5e-5)
    assert paired_difference(1, 7, 21) == pytest.approx((-difference, -high, -low))
    assert paired_difference(0, 0, 0) == (0, -1, 1)


def test_the_interval_of_a_paired_difference_holds_the_truth_nineteen_times_in_twenty():
    """The exact coverage, over all tables of 40 items, for several true shares of items that only one has right."""
    n = 40
    intervals = {(b, c): paired_difference(b, c, n)[1:] for b in range(n + 1) for c in range(n + 1 - b)}
    for a_alone, b_alone in ((0.1, 0.1), (0.2, 0.1), (0.3, 0.05), (0.02, 0.15), (0.4, 0.4)):
        rest, covered = 1 - a_alone - b_alone, 0.0
        for (b, c), (low, high) in intervals.items():
            if low <= a_alone - b_alone <= high:
                ways = math.comb(n, b) * math.comb(n - b, c)
                covered += ways * a_alone**b * b_alone**c * rest ** (n - b - c)
        assert 0.935 < covered < 0.99, (a_alone, b_alone)


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)
    assert pass_at_k(200, 1, 100) == 0.5
    assert pass_at_k(10_000, 1, 1) == 1e-4


def test_the_majority_is_the_most_frequent_answer_and_of_several_the_first():
    assert majority(["4", "5", "5", "4", "6"]) == "4"
    assert majority(["5", "4", "4"]) == "4"
    assert majority([]) is majority([None, None]) is None


def test_samples_without_an_answer_have_no_vote():
    assert majority([None, None, None, "7", "8", "8"]) == "8"


def test_equal_answers_written_differently_vote_together():
    assert majority(["8", "7.0", "7", "8", "7.00"], same=lambda a, b: float(a) == float(b)) == "7.0"


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 11, 100, 101, 1001])
def test_the_interval_of_a_mean_is_scipys(count, level):
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    draw = random.Random(count)
    values = [draw.gauss(3, 2) for _ in range(count)]
    expected = scipy.t.interval(level, count - 1, loc=sum(values) / count, scale=scipy.sem(values))
    assert mean_interval(values, level)[1:] == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_mean_by_the_printed_table():
    # Student's t for 4 degrees of freedom: 2.776; of 1 to 5 the deviation is sqrt(2.5).
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5), abs=1e-3)
    assert mean_interval([0.25]) == (0.25, -math.inf, math.inf)
    assert mean_interval([0.1] * 9) == pytest.approx((0.1, 0.1, 0.1))
