"""The loss curve and its moving average."""

import pytest

from rwkv_bone.training.curve import draw_loss, smoothed


def test_smoothing_keeps_a_constant_and_the_length():
    assert smoothed([2.5] * 50) == pytest.approx([2.5] * 50)
    assert len(smoothed([1.0, 2.0, 3.0])) == 3 and 1.0 < smoothed([1.0, 2.0, 3.0])[-1] < 3.0


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    draw_loss(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}], [(0, 3.0), (1, 1.0)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
