"""The loss curve: its moving average, and what it shows of held-out data."""

import pytest

from rwkv_bone.training.curve import draw_loss, heldout_lines, panels, smoothed


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


def compared(step: int, **figures: float | None) -> dict:
    """A line of the log of a run that compares answers."""
    return {"step": step, "loss": 0.5, "units": 4, "reward_margin": float(step), "reward_accuracy": None, **figures}


def test_a_run_that_compares_answers_has_a_panel_for_each_thing_that_was_measured():
    measured = [measurement(step, 0.6, 1.2 + step) for step in (0, 5)]
    for one in measured:
        one["sets"]["mine"]["preference"] = {"reward_margin": one["step"] / 4, "logp_chosen": None, "divergence": 0.25}
    found = dict(panels([compared(step, kl=None) for step in (1, 2)], measured))
    assert [name.split(" (")[0] for name in found] == [
        "loss",
        "reward",
        "divergence from the start",
        "loss of general text",
    ]
    # The loss of general text is of another kind than the task's.
    loss, reward, divergence, general = found.values()
    assert [line["label"] for line in loss] == ["each step", "moving average", "held-out: mine"]
    assert [(line["label"], line["steps"], line["losses"]) for line in reward] == [
        ("margin", [1, 2], smoothed([1.0, 2.0])),
        ("_margin", [0, 5], [0.0, 1.25]),
    ]
    assert [(line["label"], line["losses"]) for line in divergence] == [("held-out", [0.25, 0.25])]
    assert [line["losses"] for line in general] == [(1.2, 6.2)]


def test_a_run_of_sft_has_its_loss_alone():
    ((name, lines),) = panels([{"step": 1, "loss": 2.0}], RUN)
    assert name == "loss (nats per trained token)" and len(lines) == 5


def test_one_step_that_compared_answers_can_be_drawn(tmp_path):
    draw_loss(tmp_path / "loss.png", [compared(1)], [])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
