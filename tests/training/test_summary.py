"""The table at the end of a run."""

import math

import pytest

from rwkv_bone.training.summary import forgotten, table


def log(steps, missing=()):
    numbers = {"seconds": 0.5, "tokens": 1000, "peak_memory_mb": 500.0, "peak_reserved_mb": None}
    return [{"step": n, **numbers} for n in range(1, steps + 1) if n not in missing]


def measured(step, loss, general=None, exact=None, more=None):
    def one(value, match=None):
        return {"loss": value, "tokens": 10, "exact_match": match, "prompts": 0}

    sets = {"heldout": one(loss, exact)} | ({"other-name-that-is-far-too-long.jsonl": one(more)} if more else {})
    sets |= {"general": one(general)} if general else {}
    return {"step": step, "seconds": 2.0, "sets": sets, "main": "heldout", "general": "general" if general else None}


def cells(records=(), measurements=(), warnings=(), total=100):
    lines = "\n".join(table(records, measurements, warnings, total)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    return [line.split() for line in lines if line]


def test_a_whole_run_with_several_sets():
    run = [
        measured(0, 2.0, 1.2, exact=0.0, more=3.0),
        measured(50, 0.5, 1.3, more=2.0),
        measured(75, 0.4, 1.4, more=2.5),
        measured(100, 0.45, 1.5, exact=0.92, more=2.5),
    ]
    found = cells(log(100), run)
    assert found[0] == ["loss,", "nats", "per", "token", "before", "best", "at", "step", "after", "change"]
    assert found[1] == ["heldout", "2.0000", "0.4000", "75", "0.4500", "-1.5500"]
    assert found[2] == ["exact", "answers", "0.0%", "92.0%", "+92.0"]
    assert found[3][1:] == ["3.0000", "2.0000", "50", "2.5000", "-0.5000"] and "..." in found[3][0]
    assert found[4] == ["general", "1.2000", "1.5000", "+0.3000"]
    assert " ".join(found[5]).startswith("forgotten something: tokens of the general text are 1.35 times less likely")
    assert found[7] == "took 0:58 for 100 steps, 0:08 of it for measurements".split()
    assert found[8] == "tokens 100,000; 2,000 a second in the steps; peak memory 500 MiB".split()


def test_a_set_of_answers_has_rows_for_its_figures_and_the_general_text_is_per_token():
    def preference(margin, share, moved, kl=None):
        figures = {"reward_margin": margin, "reward_accuracy": share, "divergence": moved, "kl": kl}
        return figures | {"logp_chosen": -1 - margin, "logp_rejected": -2.0}

    run = [measured(0, 0.6931, 1.2), measured(50, 0.5, 1.25)]
    for line, figures in zip(run, (preference(0.0, None, 0.0), preference(0.25, 0.712, 0.0456)), strict=True):
        line["sets"]["heldout"]["preference"] = figures
    found = cells([], run)
    assert found[0][:3] == ["loss", "per", "pair"]
    assert found[1] == ["heldout", "0.6931", "0.5000", "50", "0.5000", "-0.1931"]
    assert found[2] == ["accuracy", "71.2%"]
    assert found[3] == ["margin", "0.0000", "0.2500", "+0.2500"]
    assert found[4] == ["log", "p,", "chosen", "-1.0000", "-1.2500", "-0.2500"]
    assert found[6] == ["KL", "from", "the", "start", "0.0000", "0.0456", "+0.0456"]
    assert found[7] == ["general", "(per", "token)", "1.2000", "1.2500", "+0.0500"]
    head, _, accuracy, *_ = [line for line in "\n".join(table([], run, [], 50)).splitlines() if line]
    assert head.index("after") + len("after") == accuracy.index("71.2%") + len("71.2%")
    for line in run:
        line["sets"]["heldout"]["preference"] = preference(0.5, None, None, kl=1.5)
    found = cells([], run)
    assert found[0][:3] == ["loss", "per", "answer"]
    assert [row[0] for row in found[2:6]] == ["margin", "log", "log", "general"]


def test_numbers_stand_under_their_heads():
    head, row = table([], [measured(0, 2.0), measured(77, 0.5)], [], 77)
    for name, cell in (("before", "2.0000"), ("best", "0.5000"), ("at step", "77"), ("change", "-1.5000")):
        assert head.strip("\n").index(name) + len(name) == row.index(cell) + len(cell)


def test_without_held_out_data_there_is_what_it_took():
    assert [row[0] for row in cells(log(10))] == ["took", "tokens"]
    assert cells() == []


def test_a_run_that_ended_early_says_how_far_it_came():
    assert cells(log(40), total=100)[0] == "took 0:20 for 40 of 100 steps".split()
    # Interrupted some steps after the last measurement.
    head = cells(log(40), [measured(0, 2.0), measured(30, 1.0)])[0]
    assert head[-3:] == ["step", "30", "change"] and cells(log(30), [measured(30, 1.0)])[0][-2] == "after"
    # Interrupted before anything was measured but the base.
    found = cells(log(40), [measured(0, 2.0, 1.2, exact=0.1)])
    assert found[1] == ["heldout", "2.0000"] and found[2] == ["exact", "answers", "10.0%"]


def test_steps_that_a_damaged_log_lacks_are_counted():
    found = cells(log(10, missing=(3, 4)), total=10)
    assert found[0] == ["took", "0:04", "for", "10", "steps"]
    assert found[1] == "(without 2 steps that the log lacks)".split()


def test_warnings_are_counted_and_placed():
    assert cells(log(10), warnings=[{"step": 0}, {"step": 1240}])[-1] == "warnings 2 above, at step 0, 1,240".split()


def test_the_memory_of_a_gpu_is_what_was_reserved():
    records = [{**line, "peak_reserved_mb": 12345.0} for line in log(2)]
    assert cells(records)[1][-4:] == "peak memory 12,345 MiB".split()


@pytest.mark.parametrize(
    "rise, words",
    [
        (-0.2, "forgotten nothing that the general text shows: its loss changed by -0.2000"),
        (0.005, "forgotten nothing that the general text shows: its loss changed by +0.0050"),
        (math.log(1.05), "forgotten a little: tokens of the general text are 1.05 times less likely"),
        (math.log(1.5), "forgotten something: tokens of the general text are 1.5 times less likely"),
        (math.log(9), "forgotten much: tokens of the general text are 9 times less likely"),
        (50, "forgotten much: tokens of the general text are immensely less likely"),
    ],
)
def test_forgetting_is_said_in_words(rise, words):
    assert next(forgotten([measured(0, 2.0, 1.2), measured(9, 1.0, 1.2 + rise)])) == words


def test_a_loss_that_is_no_finite_number_is_no_best_and_breaks_no_line():
    found = cells(log(10), [measured(0, None), measured(5, 1.0, 2.0), measured(10, None)])
    assert found[1] == ["heldout", "1.0000", "1.0000", "5"]
    assert cells([], [measured(0, None)])[1] == ["heldout", "not", "finite"]


def test_one_measurement_tells_nothing_of_forgetting():
    assert list(forgotten([measured(0, 2.0, 1.2)])) == list(forgotten([measured(0, 2.0), measured(9, 1.0)])) == []
