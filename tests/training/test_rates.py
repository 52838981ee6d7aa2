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


SCRATCH = {"load_model": "", "peft": "none", "n_layer": 2, "n_embd": 32, "vocab_size": 256, "head_size": 16}


@pytest.mark.parametrize(
    ("name", "flags", "rates"),
    [
        ("bone", {"bone_r": 8}, (1e-2, 3.3e-4)),  # no weight moves faster
        ("pissa", {"peft": "pissa", "lora_r": 8, "lora_plus": 16}, (4.4e-3, 1.5e-4)),  # 3e-3 x 4^1.28 / 4
        ("state", {"peft": "state"}, (0.1, 1e-2)),
        ("every weight", {"peft": "none"}, (2.9e-3, 9.7e-5)),  # 1e-3 x 4^0.78
        ("from scratch", SCRATCH, (5.1e-3, 1.7e-4)),  # 2e-3 x 4^0.67
    ],
)
def test_the_numbers_of_the_rule_are_trained_with_and_written_down(job, capsys, name, flags, rates):
    """The model is 32 wide, a quarter of the rule's width."""
    folder = job.run(name, **AUTO, **flags)
    optim, log = written(folder), log_of(folder)
    assert (optim["lr_init"], optim["lr_final"]) == rates
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rate "))
    assert f"--lr_init auto is {optim['lr_init']:g}, --lr_final auto is {optim['lr_final']:g}: " in said
    assert (log[0]["lr"], log[-1]["lr"]) == pytest.approx((optim["lr_init"], optim["lr_final"]))
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
