"""planning/timing.py: what a step takes, from the ends of passes, by hand-made clocks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_bone.data import BatchPlan, load_dataset
from rwkv_bone.planning.timing import FEW, MANY, Enough, Mark, TimeSteps, enough, positions_of_a_step, times, windows


def marks(*seconds, positions=100, passes=1):
    return [Mark(second, positions, (i + 1) % passes == 0) for i, second in enumerate(seconds)]


def test_the_first_step_is_left_out_and_what_it_took_longer_is_the_warm_up():
    found = times(marks(9.0, 2.0, 2.1, 1.9))
    assert found.per_position * 100 == pytest.approx(2.0) and found.steps == 3
    assert found.warm_up == pytest.approx(7.0)


def test_a_step_is_in_proportion_to_its_positions():
    found = times([Mark(5, 100, True), Mark(1, 50, True), Mark(4, 200, True), Mark(2, 100, True)])
    assert found.per_position == pytest.approx(0.02) and found.spread == 0


def test_one_slow_step_among_many_does_not_count():
    assert times(marks(3, *[1.0] * 9, 60.0)).per_position == pytest.approx(0.01)


def test_the_passes_of_a_step_are_added_up():
    assert [w.seconds for w in windows(marks(1, 2, 3, 4, 5, passes=2))] == [3, 7]
    assert times(marks(1, 2, 3, 4, passes=2)).per_position == pytest.approx(7 / 200)


def test_without_a_second_step_the_passes_after_the_first_count_and_without_these_the_first():
    assert times(marks(9, 2, 2, passes=4)).per_position == pytest.approx(0.02)
    assert times(marks(9, passes=4)).per_position == pytest.approx(0.09)
    assert times(marks(9)).per_position == pytest.approx(0.09) and times(marks(9)).warm_up == 0


def test_few_steps_that_agree_are_enough_and_others_only_many():
    assert not enough(marks(9, *[1.0] * (FEW - 1)))
    assert enough(marks(9, *[1.0] * FEW))
    wild = [1.0, 9.0] * (MANY // 2)
    assert not enough(marks(9, *wild[:20])) and enough(marks(9, *wild))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def passes_taken(seconds, limit, accumulate=1, world_size=1, most=500):
    """How many passes of so many seconds TimeSteps takes before it ends the run."""
    clock = Clock()
    watcher = TimeSteps(limit, clock)
    plan = SimpleNamespace(world_size=world_size, accumulate=accumulate)
    state = {"micro": 0}
    module = SimpleNamespace(
        plan=plan,
        asks={"time": 0},
        asked={"time": 0},
        device=torch.device("cpu"),
        window_finished=lambda: state["micro"] == 0,
    )
    trainer = SimpleNamespace(is_global_zero=True)
    batch = SimpleNamespace(ids=torch.zeros(1, 100))
    watcher.on_train_start(trainer, module)
    for number in range(most):
        clock.now += seconds(number)
        state["micro"] = (state["micro"] + 1) % accumulate
        if module.window_finished():
            watcher.on_before_optimizer_step(trainer, module, None)
            module.asked = dict(module.asks)
        try:
            watcher.on_train_batch_end(trainer, module, None, batch, number)
        except Enough:
            return number + 1, clock.now
    return most, clock.now


def test_equal_steps_end_early_and_slow_ones_when_time_is_over():
    assert passes_taken(lambda n: 0.1, 60) == (FEW + 1, pytest.approx(0.6))
    count, took = passes_taken(lambda n: 20.0, 60)
    assert count == 3 and took == 60


def test_a_step_of_many_slow_passes_is_not_waited_for_in_one_process():
    count, took = passes_taken(lambda n: 25.0, 60, accumulate=100)
    assert (count, took) == (3, 75)


def test_of_several_processes_none_ends_but_at_a_step_that_all_know_of():
    """A process that ends alone would leave the others waiting in the next exchange."""
    count, _ = passes_taken(lambda n: 25.0, 60, accumulate=4, world_size=2)
    assert count == 4
    count, _ = passes_taken(lambda n: 0.1, 60, accumulate=1, world_size=2)
    assert count == FEW + 2  # the main process asks in the step after it knows


@pytest.mark.parametrize("how", ["pack", "pad"])
def test_an_average_step_has_the_positions_of_a_pass_divided_by_its_steps(tmp_path, job, how):
    from rwkv_bone.config.flags import parse_train

    config = parse_train([word for word in job.argv({"dataload": how}) if word != "--typed"])
    dataset = load_dataset(config.data, 256)
    plan = BatchPlan(dataset, micro_bsz=2, accumulate=2, world_size=2, pack=how == "pack")
    seen = [
        plan.batch(0, step, micro, rank).ids.numel()
        for step in range(plan.steps_in(0))
        for micro in range(2)
        for rank in range(2)
    ]
    assert positions_of_a_step(plan) == pytest.approx(np.sum(seen) / plan.steps_in(0) / 2)
