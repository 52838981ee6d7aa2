"""What a killed run of `train_hf.py` leaves, and how the same command goes on from it."""

import json
import pkgutil
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.hf import saved
from rwkv_bone.run_lock import held
from tests.hf.test_finetune import flags, parse
from tests.training.runs import Killed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WHOLE: list[bytes] = []  # the adapter of a run that nobody kills
SAVE_EACH = {"deepspeed": "none", "eval_path": "", "save_steps": 1, "save_total_limit": 2}


@pytest.fixture(autouse=True)
def handlers():
    """A run that is killed here, within its process, leaves its signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def finetune(folder, output="out", *more, **changes):
    from rwkv_bone.hf import finetune as module

    module.finetune(parse(flags(folder, output, **(SAVE_EACH | changes)), *more))
    return folder / output


@contextmanager
def killed(where: str, at: int):
    """In this context a run is killed when it calls `where`, a function by its module and name, for the at-th time."""
    module, _, name = where.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original, calls = getattr(owner, name), Counter()

    def dies(*args, **kwargs):
        calls[where] += 1
        if calls[where] == at:
            raise Killed
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, dies), pytest.raises(Killed):
        yield


def bytes_of(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


TRAINER = "transformers.Trainer"
KILLS = {
    "before the first checkpoint": (f"{TRAINER}.training_step", 2),
    "in the first checkpoint": (f"{TRAINER}._save_rng_state", 1),
    "between two checkpoints": (f"{TRAINER}.training_step", 6),
    "in the third checkpoint, before the optimiser": (f"{TRAINER}._save_optimizer_and_scheduler", 3),
    "in the third checkpoint, before its last file": ("transformers.TrainerState.save_to_json", 3),
    "in the third checkpoint, before its list": ("rwkv_bone.hf.saved.complete", 3),
    "while the oldest is removed": ("rwkv_bone.hf.saved.remove", 1),
    "before the adapter is written": (f"{TRAINER}.save_state", 1),
}


@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_anywhere_goes_on_with_the_same_command_and_ends_with_the_same_adapter(folder, name, capsys):
    if not WHOLE:
        WHOLE.append(bytes_of(finetune(folder, "whole")))
    with killed(*KILLS[name]):
        finetune(folder)
    capsys.readouterr()
    output = finetune(folder)
    said = capsys.readouterr().out
    assert bytes_of(output) == WHOLE[0]
    left = ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == left
    assert [saved.damage(output / name) for name in left] == ["", ""]
    assert ("this one begins anew" in said) == ("first" in name), said
    assert ("continues the run" in said) == ("first" not in name), said
    assert ("is not whole (it was not written to its end)" in said) == ("in the " in name)
    finetune(folder)
    assert capsys.readouterr().out.startswith(f"nothing is left to do: the run in {output} is complete")


@pytest.mark.parametrize("damage", ["one bit", "cut short", "a file is missing", "the list"])
def test_a_damaged_checkpoint_is_not_used_but_the_one_before(folder, damage, capsys):
    output = finetune(folder)
    expected = bytes_of(output)
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"finished": False}))
    spoil(output / "checkpoint-4", damage)
    capsys.readouterr()
    finetune(folder)
    said = capsys.readouterr().out
    assert f"warning: {output}/checkpoint-4 is not whole (" in said
    assert f"continues the run in {output} from checkpoint-3" in said
    assert bytes_of(output) == expected
    (output / "run.json").write_text(json.dumps(record | {"finished": False}))
    for path in output.glob("checkpoint-*"):
        spoil(path, damage)
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole \(checkpoint-4: .*checkpoint-3: .*--overwrite 1"
    ):
        finetune(folder)


def spoil(checkpoint: Path, damage: str) -> None:
    path = checkpoint / "optimizer.pt"
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 4
    elif damage == "cut short":
        del data[-100:]
    if damage == "the list":
        (checkpoint / saved.LIST).write_text("[1")
    elif damage == "a file is missing":
        path.unlink()
    else:
        path.write_bytes(data)


def test_a_folder_of_another_run_is_refused_with_what_is_different(folder):
    output = finetune(folder)
    before = bytes_of(output)
    for changes, words in (
        (
            {"learning_rate": 0.01, "seed": 1},
            "--learning_rate was 0.02 and is now 0.01.*--seed was 42 and is now 1|--seed",
        ),
        ({"data_path": folder / "held.jsonl", "num_train_epochs": 9}, "--data_path gives other samples"),
    ):
        with pytest.raises(UserError, match=words):
            finetune(folder, **changes)
    with pytest.raises(UserError, match="out is not empty and is kept: give another --output_dir, --resume 1 or"):
        finetune(folder, resume="never")
    assert bytes_of(output) == before
    finetune(folder, num_train_epochs=3)
    assert (output / "checkpoint-6").is_dir()
    finetune(folder, "out", "--overwrite", "1", learning_rate=0.01)
    assert bytes_of(output) != before and not (output / "checkpoint-6").exists()


def test_two_runs_in_one_folder_do_not_meet(folder):
    with (
        held(folder / "out", "--output_dir"),
        pytest.raises(UserError, match="^--output_dir .* is in use by another run"),
    ):
        finetune(folder)
    assert not (folder / "out").exists()
    finetune(folder)
    assert not (folder / "out" / ".lock").exists()


@contextmanager
def bad_gradients(*steps):
    """In this context the gradients of these steps, of two forward passes each, hold an infinite value."""
    original, passes = transformers.Trainer.training_step, Counter()

    def spoil(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        passes["done"] += 1
        if passes["done"] in [2 * step for step in steps]:
            next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = torch.inf
        return loss

    with mock.patch.object(transformers.Trainer, "training_step", spoil):
        yield


def test_a_step_with_a_bad_gradient_is_not_taken_and_too_many_end_the_run(folder, capsys):
    with bad_gradients(2):
        output = finetune(folder)
    assert (
        "warning: step 2: the gradient is not a finite number; the step was not taken (1 of 3)"
        in capsys.readouterr().out
    )
    first, second = (torch.load(output / f"checkpoint-{step}" / "optimizer.pt", weights_only=True) for step in (3, 4))
    assert (first["state"][0]["step"], second["state"][0]["step"]) == (2, 3)
    with bad_gradients(1, 2, 3, 4), pytest.raises(UserError, match="step 4: the gradient .*one more than the 3 that"):
        finetune(folder, "bad")
    assert not (folder / "bad" / "checkpoint-4").exists()


def test_an_adapter_that_is_not_finite_never_becomes_a_checkpoint(folder):
    original = transformers.Trainer._save_checkpoint

    def spoil(self, model, trial):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.nan
        original(self, model, trial)

    with mock.patch.object(transformers.Trainer, "_save_checkpoint", spoil):
        with pytest.raises(UserError, match="checkpoint-3.* holds NaN or infinity"):
            finetune(folder)
    assert saved.damage(folder / "out" / "checkpoint-2") == "" and saved.damage(folder / "out" / "checkpoint-3")
    finetune(folder)
