"""Long series made short: nothing that stands out is lost."""

import numpy as np
import pytest

from rwkv_bone.report.series import POINTS, ends, extremes, smoothed, span, spread

NAN = float("nan")


def test_of_every_few_values_the_lowest_and_the_highest_stay_in_order():
    values = np.array([3.0, 9.0, 1.0, 5.0, 5.0, 5.0, NAN, NAN, NAN, 7.0, NAN, 2.0, 4.0])
    assert extremes(values, 3).tolist() == [1, 2, 3, 9, 11, 12]
    assert extremes(values, 1).tolist() == list(range(13))


def test_values_that_are_no_finite_number_hide_none_that_are():
    assert extremes(np.array([np.inf, 2.0, NAN, 1.0]), 4).tolist() == [1, 3]
    assert extremes(np.array([NAN] * 5), 2).tolist() == []


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 12_345, 1_000_000])
def test_points_are_few_and_a_spike_anywhere_is_among_them(count):
    values = np.sin(np.arange(count) / 50)
    values[count * 2 // 3] = 1e6
    kept = extremes(values, span(count))
    assert len(kept) <= POINTS and count * 2 // 3 in kept and (np.diff(kept) > 0).all()
    assert len(ends(count, span(count))) <= POINTS and ends(count, span(count))[-1] == count - 1


def test_a_short_series_keeps_every_value():
    assert [span(count) for count in (1, POINTS, POINTS + 1, 100_000)] == [1, 1, 3, 100]
    assert ends(7, 3).tolist() == [2, 5, 6] and ends(0, 3).tolist() == []


def test_what_is_chosen_has_both_ends_and_what_must_be_there():
    assert spread(5, 10) == [0, 1, 2, 3, 4]
    assert spread(101, 3, (7, 500)) == [0, 7, 50, 100]
    assert spread(0, 3, (0,)) == []


def test_smoothing_is_a_mean_with_weights_that_fall_by_a_factor():
    """By its definition: weight**age, divided by the sum of the weights."""
    values = [4.0, 1.0, 3.0, 8.0, 2.0]
    expected = [np.average(values[: n + 1], weights=[0.5 ** (n - i) for i in range(n + 1)]) for n in range(5)]
    assert smoothed(values) == pytest.approx(expected)
