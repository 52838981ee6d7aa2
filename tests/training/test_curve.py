"""The loss curve: its moving average, and what it shows of held-out data."""

import pytest

from rwkv_bone.training.curve import draw_loss, heldout_lines, smoothed


def measurement(step: int, main: float, general: float | None = None, best: bool = False) -> dict:
    sets = {"mine": {"loss": main}} | ({"general": {"loss": general}} if general is not None else {})
    return {"step": step, "sets": sets, "main": "mine", "general": "general" if general is not None else None} | {
        "best": best
    }


RUN = [
    measurement(0, 3.0, 1.2),
    measurement(5, 1.5, 1.3, best=True),
    measurement(10, 0.5, 1.6, best=True),
    measurement(15, 0.7, 1.9),
]


def test_smoothing_keeps_a_constant_and_the_length():
    assert smoothed([2.5] * 50) == pytest.approx([2.5] * 50)
    assert len(smoothed([1.0, 2.0, 3.0])) == 3 and 1.0 < smoothed([1.0, 2.0, 3.0])[-1] < 3.0


def test_every_measurement_of_every_set_is_drawn_and_the_best_one_is_marked():
    mine, general, best = heldout_lines(RUN)
    assert (mine["label"], mine["steps"], mine["losses"]) == ("held-out: mine", (0, 5, 10, 15), (3.0, 1.5, 0.5, 0.7))
    assert (general["label"], general["losses"]) == ("general (what it may forget)", (1.2, 1.3, 1.6, 1.9))
    assert (best["label"], best["steps"], best["losses"]) == ("best, step 10", [10], [0.5])


def test_a_run_without_held_out_data_has_no_such_line_and_one_that_never_got_better_no_best():
    assert heldout_lines([]) == []
    assert [line["label"] for line in heldout_lines([measurement(0, 1.0), measurement(5, 2.0)])] == ["held-out: mine"]


@pytest.mark.parametrize("measured", [[], RUN, [measurement(0, 3.0)]])
def test_a_run_of_one_step_can_be_drawn(measured, tmp_path):
    draw_loss(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}], measured)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_measurement_that_is_no_number_leaves_a_gap(tmp_path):
    broken = [*RUN, {**measurement(20, 0.0), "sets": {"mine": {"loss": None}}}]
    assert heldout_lines(broken)[0]["steps"] == (0, 5, 10, 15)
    draw_loss(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}], broken)
