"""The learning rate is a pure function of the optimiser step."""

import math

import pytest

from rwkv_bone.config import SCHEDULES, OptimConfig
from rwkv_bone.errors import UserError
from rwkv_bone.training.schedule import check_schedule, learning_rate


def config(**changes) -> OptimConfig:
    return OptimConfig(**{"lr_init": 1e-3, "lr_final": 1e-5, **changes})


def rates(total: int, cfg: OptimConfig) -> list[float]:
    return [learning_rate(step, total, cfg) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cos", "exp", "linear"])
@pytest.mark.parametrize("total", [2, 3, 100, 1009])
def test_first_step_has_lr_init_and_last_step_exactly_lr_final(schedule, total):
    values = rates(total, config(lr_schedule=schedule))
    assert values[0] == 1e-3
    assert values[-1] == 1e-5
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_the_middle_of_each_schedule_is_its_formula():
    def middle(schedule):
        return learning_rate(50, 101, config(lr_schedule=schedule))

    assert middle("linear") == pytest.approx((1e-3 + 1e-5) / 2)
    assert middle("cos") == pytest.approx((1e-3 + 1e-5) / 2)
    assert middle("exp") == pytest.approx(math.sqrt(1e-3 * 1e-5))
    quarter = learning_rate(25, 101, config(lr_schedule="cos"))
    assert quarter == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.sqrt(0.5)) / 2)


def test_constant_keeps_lr_init():
    assert set(rates(7, config(lr_schedule="constant"))) == {1e-3}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_linearly_to_lr_init_and_then_the_schedule_runs_its_whole_way(schedule):
    values = rates(20, config(lr_schedule=schedule, warmup_steps=5))
    assert values[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert values[-1] == (1e-3 if schedule == "constant" else 1e-5)
    assert max(values) == values[4]


def test_a_rising_schedule_works_too():
    values = rates(10, config(lr_init=1e-5, lr_final=1e-3, lr_schedule="exp"))
    assert values[0] == 1e-5 and values[-1] == 1e-3 and values == sorted(values)


def test_a_run_of_one_step_uses_lr_init():
    assert rates(1, config()) == [1e-3]


def test_zero_lr_init_is_a_number_not_a_division_by_zero():
    assert rates(3, config(lr_init=0.0, lr_final=0.0, lr_schedule="linear")) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("warmup, total", [(10, 10), (11, 10), (1, 1)])
def test_a_warmup_that_fills_the_run_is_refused(warmup, total):
    with pytest.raises(UserError, match=f"--warmup_steps {warmup}.*{total} optimiser step"):
        check_schedule(total, config(warmup_steps=warmup))


def test_shorter_warmups_are_accepted():
    check_schedule(10, config(warmup_steps=9))
    check_schedule(1, config())
