"""A run that ends because its held-out loss gets no better."""

import json

import pytest

from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.training.heldout import HeldOut
from tests.training.conftest import log_of
from tests.training.runs import Killed
from tests.training.test_best import held_out_losses, step_of
from tests.training.test_measurements import lines_of

LOSSES = (5.0, 3.0, 4.0, 3.0, 2.0, 1.0)


@pytest.fixture
def flags(job):
    held = {"eval_data": job.flags["data_file"], "eval_samples": 1, "eval_general": "none", "eval_steps": 1}
    return held | {"epoch_count": 2}


def test_it_ends_like_a_run_that_is_done_and_the_same_command_leaves_it(job, flags, capsys):
    with held_out_losses(*LOSSES):
        folder = job.run("stopped", early_stop=2, **flags)
    said = capsys.readouterr().out
    assert "early stop after step 4 of 6: 2 measurements without a held-out loss below 3.0000, that of step 2" in said
    assert f"results   {folder / 'rwkv-1-s4.pth'}" in said and (folder / "loss.png").exists()
    assert [line["step"] for line in log_of(folder)] == [1, 2, 3, 4]
    assert [line["step"] for line in lines_of(folder)] == [0, 1, 2, 3, 4]
    assert json.loads((folder / "evaluation.json").read_text())["after"]["step"] == 4
    assert lines_of(folder)[-1]["sets"]["heldout"]["prompts"] == 1  # with the answers of the end
    assert step_of(folder) == 2
    left = {path: path.read_bytes() for path in folder.iterdir()}
    with held_out_losses(*LOSSES):
        job.run("stopped", early_stop=2, **flags)
    assert {path: path.read_bytes() for path in folder.iterdir()} == left
    said = capsys.readouterr().out
    assert "it has ended early, after step 4 (--early_stop 2)" in said
    assert "nothing is left to do; a larger --early_stop, or 0, trains longer" in said


def test_a_larger_early_stop_goes_on_where_it_ended(job, flags):
    with held_out_losses(*LOSSES):
        reference = job.run("all of it", **flags)
        job.run("on", early_stop=2, **flags)
        folder = job.run("on", early_stop=3, **flags)
    steps = [(line["step"], line["loss"]) for line in log_of(folder)]
    assert steps == [(line["step"], line["loss"]) for line in log_of(reference)]
    assert step_of(folder) == 6


def test_a_kill_in_the_last_measurement_is_made_good(job, flags, monkeypatch):
    finish = HeldOut.finish

    def die(self, trainer, module):
        raise Killed

    monkeypatch.setattr(HeldOut, "finish", die)
    with held_out_losses(*LOSSES), pytest.raises(Killed):
        job.run("killed", early_stop=2, **flags)
    monkeypatch.setattr(HeldOut, "finish", finish)
    with held_out_losses(*LOSSES):
        folder = job.run("killed", early_stop=2, **flags)
    assert len(log_of(folder)) == 4
    assert json.loads((folder / "evaluation.json").read_text())["after"]["step"] == 4


def test_the_count_goes_on_in_a_continued_run(job, flags):
    with held_out_losses(5.0, 3.0, 4.0):
        job.run("counted", early_stop=2, **(flags | {"epoch_count": 1}))
    with held_out_losses(5.0, 3.0, 4.0, 4.0, 1.0, 1.0):
        folder = job.run("counted", early_stop=2, **flags)
    assert len(log_of(folder)) == 4


def test_losses_that_are_no_numbers_end_it_too(job, flags, capsys):
    with held_out_losses(None, None, None, None, None, None):
        folder = job.run("no numbers", early_stop=3, **flags)
    said = capsys.readouterr().out
    assert len(log_of(folder)) == 3 and not (folder / "rwkv-best.pth").exists()
    assert said.count("is not a finite number: it never counts as best") >= 3
    assert "3 measurements without a held-out loss that is a finite number" in said


def test_it_is_refused_where_nothing_is_measured(job):
    with pytest.raises(UserError, match="--early_stop 2 has no effect"):
        parse_train(job.argv({"eval_split": 0.3, "eval_steps": 0, "early_stop": 2, "proj_dir": "x"}))
    with pytest.raises(UserError, match="--early_stop 2 has no effect"):
        parse_train(job.argv({"early_stop": 2, "proj_dir": "x"}))


def test_more_measurements_than_there_are_is_said(job, flags, capsys):
    job.run("never", early_stop=9, **flags)
    assert "warning: --early_stop 9 cannot act: the run has 5 measurements" in capsys.readouterr().out


def test_a_run_that_is_done_leaves_nothing_that_a_kill_at_its_end_cut_short(job):
    folder = job.run("cut at the end")
    before = sorted(path.name for path in folder.iterdir())
    (folder / ".report.html.5bce98-29392-bbabca09.partial.html").write_text("half")
    job.run("cut at the end", resume="auto")
    assert sorted(path.name for path in folder.iterdir()) == before
