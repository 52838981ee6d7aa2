"""rwkv-best.pth: the adapter of the lowest held-out loss, whatever happens to the run."""

import json
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from rwkv_bone import checkpoints
from rwkv_bone.training import project
from rwkv_bone.training.best import Best, is_best, read_best, since_best
from rwkv_bone.training.heldout import HeldOut
from rwkv_bone.training.saving import SaveTrained
from tests.training.conftest import adapter_of
from tests.training.runs import Killed
from tests.training.test_measurements import lines_of

BEST = "rwkv-best.pth"


@contextmanager
def held_out_losses(*losses):
    """In this context the main set has these losses after steps 1, 2, ...; before training 9."""
    measure = HeldOut._set

    def scripted(self, module, one, exact, main):
        found = measure(self, module, one, exact, main)
        step = module.window.step if module.window else module.first_step
        return found | {"loss": losses[step - 1] if step else 9.0}

    with mock.patch.object(HeldOut, "_set", scripted):
        yield


@pytest.fixture
def flags(job):
    held = {"eval_data": job.flags["data_file"], "eval_samples": 0, "eval_general": "none", "eval_steps": 1}
    return held | {"epoch_count": 2, "save_steps": 1}


def step_of(folder):
    return checkpoints.read_metadata(folder / BEST)["step"]


def equal(folder, name):
    best, other = adapter_of(folder, BEST), adapter_of(folder, name)
    return best.keys() == other.keys() and all(torch.equal(best[key], other[key]) for key in best)


@pytest.mark.parametrize(
    ("losses", "step", "name"),
    [
        ((5.0, 3.0, 4.0, 3.0, 6.0, 7.0), 2, "rwkv-0-s2.pth"),
        ((5.0, 4.0, 3.0, 2.0, 1.0, 0.5), 6, "rwkv-1.pth"),
        ((math.nan, 3.0, math.inf, 4.0, math.nan, math.nan), 2, "rwkv-0-s2.pth"),
        ((12.0, 11.0, 10.0, 10.5, 11.0, 12.0), 3, "rwkv-0.pth"),  # all above the base's, which is no adapter
    ],
)
def test_it_is_the_adapter_of_the_lowest_loss(job, flags, losses, step, name):
    shown = [None if not math.isfinite(loss) else loss for loss in losses]
    with held_out_losses(*shown):
        folder = job.run(f"lowest {step} {losses[0]}", **flags)
    assert step_of(folder) == step and equal(folder, name)
    marked = [line["step"] for line in lines_of(folder) if line["best"]]
    lowest, expected = math.inf, []
    for number, loss in enumerate(losses, 1):
        if loss < lowest:
            lowest, expected = loss, [*expected, number]
    assert marked == expected and marked[-1] == step
    assert project.kept(folder)[-1].name == "rwkv-1.pth"
    metadata = checkpoints.read_metadata(folder / name)
    assert {**checkpoints.read_metadata(folder / BEST), "heldout": None} == {**metadata, "heldout": None}


def test_keep_does_not_remove_it_and_overwrite_does(job, flags):
    with held_out_losses(1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        folder = job.run("kept", keep=1, **flags)
    assert {path.name for path in folder.glob("*.pth")} == {BEST, "rwkv-1.pth", "resume.pth", "resume.previous.pth"}
    flags = {name: value for name, value in flags.items() if not name.startswith("eval")}
    job.run("kept", overwrite=1, **flags)
    assert not list(folder.glob("rwkv-best*")) and not list(folder.glob("*s.jsonl"))


def killed_at(step, when):
    """A context in which a run dies before or after the best adapter of this step is written."""
    save = SaveTrained.save_best

    def die(self, trainer, module, at, about):
        if at == step and when == "before":
            raise Killed
        save(self, trainer, module, at, about)
        if at == step:
            raise Killed

    return mock.patch.object(SaveTrained, "save_best", die)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("save_steps", [1, 0])
@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_run_that_is_killed_beside_it_ends_with_the_same_one(job, flags, when, save_steps, step):
    flags |= {"save_steps": save_steps}
    name = f"killed {when} {save_steps} {step}"
    with held_out_losses(5.0, 3.0, 4.0, 3.5, 2.0, 1.0):
        with killed_at(step, when), pytest.raises(Killed):
            job.run(name, **flags)
        folder = job.run(name, **flags)
    assert step_of(folder) == 6 and equal(folder, "rwkv-1.pth")
    assert [(line["step"], line["best"]) for line in lines_of(folder)] == [
        (0, False), (1, True), (2, True), (3, False), (4, False), (5, True), (6, True),
    ]  # fmt: skip


def test_a_continued_run_does_not_replace_it_by_a_worse_one(job, flags):
    """A kill after step 3, of which no state is there: the steps are taken again from step 0 on."""
    with held_out_losses(5.0, 1.0, 4.0, 3.0, 3.0, 3.0), killed_at(2, "after"), pytest.raises(Killed):
        job.run("worse", **(flags | {"save_steps": 1}))
    folder = job.folder / "worse"
    before = adapter_of(folder, BEST)
    # Another rounding of the same steps: nothing comes below what the file is.
    with held_out_losses(5.0, 1.5, 4.0, 3.0, 3.0, 3.0):
        job.run("worse", **flags)
    assert step_of(folder) == 2 and all(torch.equal(before[key], adapter_of(folder, BEST)[key]) for key in before)


def test_a_damaged_or_missing_one_is_told_and_the_best_that_follows_is_kept(job, flags, capsys):
    for name, told in (("damaged", "is damaged"), ("gone", "is gone")):
        with held_out_losses(1.0, 2.0, 3.0):
            folder = job.run(name, **(flags | {"epoch_count": 1}))
        content = bytearray((folder / BEST).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / BEST).write_bytes(content)
        if name == "gone":
            (folder / BEST).unlink()
        capsys.readouterr()
        with held_out_losses(1.0, 2.0, 3.0, 6.0, 5.0, 5.5):
            job.run(name, **flags)
        assert told in capsys.readouterr().out
        assert step_of(folder) == 5


def test_what_is_best_on_other_data_is_not_compared(job, flags, tmp_path, capsys):
    with held_out_losses(1.0, 2.0, 3.0):
        folder = job.run("other", **(flags | {"epoch_count": 1}))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "5 -> ", "response": "5"}) + "\n")
    with held_out_losses(1.0, 2.0, 3.0, 6.0, 5.0, 5.5):
        job.run("other", **(flags | {"eval_data": other}))
    assert step_of(folder) == 3 and "was the best on other held-out data" in capsys.readouterr().out


def test_only_a_lower_loss_or_the_same_measurement_again_is_best():
    best = Best(20, 1.5)
    assert is_best(None, 10, 3.0) and is_best(best, 30, 1.4) and is_best(best, 20, 1.5)
    assert not is_best(best, 30, 1.5) and not is_best(best, 10, 1.5) and not is_best(best, 30, None)


def test_measurements_since_the_best_are_counted_without_that_of_the_base():
    def records(*best):
        return [{"step": step, "best": one} for step, one in enumerate(best)]

    assert since_best(records(False)) == 0
    assert since_best(records(False, True)) == 0
    assert since_best(records(False, True, False, False)) == 2
    assert since_best(records(False, True, False, True, False)) == 1
    assert since_best(records(False, False, False)) == 2  # of losses that are no finite numbers


def test_a_file_that_is_there_without_a_best_measurement_is_read(tmp_path):
    assert read_best(tmp_path / BEST, "data", []) == (None, "")
    (tmp_path / BEST).write_bytes(b"")
    assert "is damaged" in read_best(tmp_path / BEST, "data", [])[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_3"])
def test_several_processes_measure_and_save_the_same_as_one(job, flags, strategy):
    """Stage 3 gathers what each rank holds a part of, also between two steps."""
    flags |= {"early_stop": 5, "eval_samples": 1}
    alone = job.run(f"alone {strategy}", **flags)
    two = {"devices": 2, "micro_bsz": 2, "strategy": strategy}
    folder, done = job.ranks(f"two {strategy}", **flags, **two)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = lines_of(folder), lines_of(alone)
    assert [(line["step"], line["best"]) for line in ours] == [(line["step"], line["best"]) for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["sets"]["heldout"]["loss"] == pytest.approx(other["sets"]["heldout"]["loss"], rel=1e-4)
    assert step_of(folder) == step_of(alone)
    best, other = adapter_of(folder, BEST), adapter_of(alone, BEST)
    assert all(torch.allclose(best[key], other[key], atol=1e-4) for key in other)
