"""--lr_init auto and --lr_final auto in a run: what is trained with, written down and said."""

import json
import math

import pytest

from rwkv_bone import checkpoints
from tests.planning.test_plan import planned, untimed  # noqa: F401
from tests.training.conftest import log_of

AUTO = {"lr_init": "auto", "lr_final": "auto"}


def written(folder):
    return json.loads((folder / "config.json").read_text())["optim"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("bone", {"bone_r": 8}),
        ("state", {"peft": "state"}),
        ("every weight", {"peft": "none"}),
    ],
)
def test_the_numbers_of_the_rule_are_trained_with_and_written_down(job, capsys, name, flags):
    folder = job.run(name, **AUTO, **flags)
    optim, log = written(folder), log_of(folder)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rate "))
    assert f"--lr_init auto is {optim['lr_init']:g}, --lr_final auto is {optim['lr_final']:g}: " in said
    assert (log[0]["lr"], log[-1]["lr"]) == pytest.approx((optim["lr_init"], optim["lr_final"]))
    assert optim["lr_init"] / optim["lr_final"] == pytest.approx(10 if name == "state" else 30, rel=0.05)
    assert checkpoints.read_metadata(folder / "rwkv-0.pth")["config"]["optim"] == optim


def test_a_run_goes_on_with_auto_as_it_began_with_numbers(job, capsys):
    folder = job.run("numbers", lr_init=5e-3, lr_final=1e-3)
    job.run("numbers", **AUTO, epoch_count=2)
    assert written(folder)["lr_init"] == 5e-3 and "--lr_init auto is 0.005, " in capsys.readouterr().out
    # Six steps: the fourth is three fifths along the cosine.
    expected = 1e-3 + 4e-3 * (1 + math.cos(math.pi * 3 / 5)) / 2
    assert [line["lr"] for line in log_of(folder)[3:]] == pytest.approx(
        [expected, 1e-3 + 4e-3 * (1 + math.cos(math.pi * 4 / 5)) / 2, 1e-3]
    )


def test_a_plan_has_the_numbers_too(job, capsys, untimed):  # noqa: F811
    assert "--lr_init auto is 0.01, --lr_final auto is 0.00033: " in planned(job, capsys, **AUTO)
    assert "--lr_init auto" not in planned(job, capsys)
