"""Which GPUs a run uses: --devices auto, 2 and 2,3, and --cards, on machines of which PyTorch's count is made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_bone import cards, devices
from rwkv_bone.config import RunConfig
from rwkv_bone.config.flags import parse_train
from rwkv_bone.config.saved import from_json, shaping, to_json
from rwkv_bone.errors import UserError
from rwkv_bone.hf.flags import HfConfig

REPOSITORY = Path(__file__).resolve().parents[1]
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RWKV_BONE_CARDS")
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "NODE_RANK", "MASTER_ADDR")
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}
MODEL = ["--load_model", "m", "--data_file", "d"]


@pytest.fixture
def machine(monkeypatch):
    """Factory: PyTorch counts this machine's GPUs as CUDA does, by the variable; these variables are set."""

    def make(gpus: int, **variables: str):
        for name in [*VARIABLES, *LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        def count() -> int:
            if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
                return gpus
            words = [word.strip() for word in visible.split(",")]
            there = [word.startswith("GPU-") or word.isdecimal() and int(word) < gpus for word in words]
            return there.index(False) if False in there else len(there)

        monkeypatch.setattr(torch.cuda, "device_count", count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)
        # What the code sets is taken back after the test.
        for name in VARIABLES:
            monkeypatch.setenv(name, os.environ.get(name, "-"))
            if name not in variables:
                monkeypatch.delenv(name)

    return make


def settled(*words: str) -> tuple[int, str, str | None]:
    """(devices, cards, CUDA_VISIBLE_DEVICES) of a command line."""
    run = cards.settled(parse_train([*MODEL, *words])).run
    return run.devices, run.cards, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    "gpus, words, expected, said",
    [
        (4, ["--devices", "auto"], (4, "", None), "note: --devices auto is 4: all GPUs that PyTorch sees"),
        (0, ["--devices", "auto"], (1, "", None), "note: --devices auto is 1: PyTorch sees no GPU"),
        (4, ["--devices", "auto", "--accelerator", "cpu"], (1, "", None), "with --accelerator cpu"),
        (4, ["--devices", "auto", "--cards", "1,3"], (2, "1,3", "1,3"), "note: --devices auto is 2: those of --cards"),
        (4, ["--devices", "2"], (2, "", None), ""),
        (4, ["--devices", "2,3"], (2, "2,3", "2,3"), ""),
        (4, ["--devices", "3,"], (1, "3", "3"), ""),
        (4, ["--devices", "[3, 1]"], (2, "3,1", "3,1"), ""),
        (4, ["--cards", "2"], (1, "2", "2"), ""),
        (4, ["--devices", "2,3", "--cards", "2,3"], (2, "2,3", "2,3"), ""),
    ],
)
def test_devices_are_a_number_all_gpus_or_some(gpus, words, expected, said, machine, capsys):
    machine(gpus)
    assert settled(*words) == expected
    assert (said in capsys.readouterr().out) and (not expected[1] or os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID")


@pytest.mark.parametrize(
    "visible, words, expected",
    [
        ("4,5,7", ["--devices", "0,2"], (2, "0,2", "4,7")),
        ("GPU-aa, GPU-bb", ["--cards", "1"], (1, "1", "GPU-bb")),
        ("4,5,7", ["--devices", "auto"], (3, "", "4,5,7")),
    ],
)
def test_cards_are_numbers_among_those_that_the_shell_shows(visible, words, expected, machine):
    machine(8, CUDA_VISIBLE_DEVICES=visible)
    assert settled(*words) == expected
    # The numbers of the shell mean what they meant.
    assert "CUDA_DEVICE_ORDER" not in os.environ


@pytest.mark.parametrize(
    "gpus, variables, words, message",
    [
        (4, {}, ["--devices", "2,7"], "--cards 2,7: there is no GPU 7: `nvidia-smi -L` lists"),
        (1, {}, ["--cards", "1"], "--cards 1: there is no GPU 1"),
        (4, {"CUDA_VISIBLE_DEVICES": "1,2"}, ["--cards", "2"], "no GPU 2 among the 2 that CUDA_VISIBLE_DEVICES=1,2"),
        (4, {"CUDA_VISIBLE_DEVICES": "-1"}, ["--cards", "0"], "no GPU 0 among the 0 that"),
        (4, {}, ["--devices", "2,2"], "--cards 2,2 names GPU 2 twice"),
        (4, {}, ["--cards", "1,01"], "--cards 1,01 names GPU 1 twice"),
        (4, {}, ["--cards", "first"], "--cards first: expected numbers of GPUs"),
        (4, {}, ["--cards", "1;2"], "--cards 1;2: expected numbers of GPUs"),
        (4, {}, ["--devices", "-1"], "--devices -1: expected at least 1"),
        (4, {}, ["--devices", "0"], "--devices: expected a number, auto, or numbers of GPUs such as 2,3"),
        (4, {}, ["--devices", "2-3"], "--devices: expected a number, auto, or numbers of GPUs such as 2,3"),
        (4, {}, ["--devices", "3", "--cards", "0,1"], "--cards 0,1 names 2 GPUs, and --devices is 3"),
        (4, {}, ["--devices", "2,3", "--cards", "0,1"], "--devices 2,3 and --cards 0,1 name different GPUs"),
        (4, {}, ["--devices", "2,3", "--accelerator", "cpu"], "--cards 2,3 has no effect with --accelerator cpu"),
        (4, {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1"}, ["--devices", "0,1"], "Slurm has chosen the GPUs of this task"),
    ],
)
def test_gpus_that_cannot_be_meant_are_refused_with_the_flag(gpus, variables, words, message, machine):
    machine(gpus, **variables)
    before = {name: os.environ.get(name) for name in VARIABLES}
    with pytest.raises(UserError) as error:
        settled(*words)
    assert message in str(error.value)
    assert {name: os.environ.get(name) for name in VARIABLES} == before


def test_cards_on_a_machine_without_any_are_refused_with_what_to_do(machine, monkeypatch):
    machine(0)
    monkeypatch.setattr(devices, "has_driver", lambda: False)
    with pytest.raises(UserError, match=r"^--cards 1: PyTorch sees no CUDA device .* leave it out: then the CPU"):
        settled("--cards", "1")


def test_the_processes_that_a_run_starts_use_the_cards_that_it_has_chosen(machine):
    machine(8, CUDA_VISIBLE_DEVICES="5,6,7")
    assert settled("--devices", "1,2")[2] == "6,7"
    # A child has the same command line and this environment: its numbers are not counted among 6,7 again.
    assert settled("--devices", "1,2")[2] == "6,7"


@pytest.mark.parametrize(
    "variables, words, expected",
    [
        (
            {"TORCHELASTIC_RUN_ID": "r", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            [],
            2,
        ),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, [], 3),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "6"}, [], 6),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "6"}, ["--accelerator", "cpu"], 1),
    ],
)
def test_auto_is_what_a_launcher_has_started_or_gives(variables, words, expected, machine):
    machine(8, **variables)
    assert settled("--devices", "auto", *words)[0] == expected


def test_auto_may_be_several_so_that_what_several_need_is_accepted():
    assert parse_train([*MODEL, "--devices", "auto", "--rank_timeout", "120"]).run.rank_timeout == 120


def test_torchruns_processes_choose_cards_too(machine):
    torchrun = {"TORCHELASTIC_RUN_ID": "r", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    machine(4, **torchrun)
    assert settled("--devices", "2,3") == (2, "2,3", "2,3")


def test_cards_of_a_script_belong_to_its_devices(machine, capsys):
    machine(4)
    config = parse_train(["--devices=2,3", "--typed", *MODEL, "--devices", "1"])
    assert (config.run.devices, config.run.cards) == (1, "")
    assert "note: cards=2,3 of the script is left out: it belongs to that devices" in capsys.readouterr().out
    config = parse_train(["--devices=2,3", "--typed", *MODEL, "--accelerator", "cpu"])
    assert (config.run.devices, config.run.cards) == (2, "")


def test_a_run_keeps_the_number_and_goes_on_elsewhere(machine, tmp_path):
    machine(4)
    run = cards.settled(parse_train([*MODEL, "--devices", "auto", "--proj_dir", str(tmp_path)]))
    assert '"devices": 4' in to_json(run) and shaping(run)["run"]["devices"] == 4
    chosen = cards.settled(parse_train([*MODEL, "--devices", "1,2", "--proj_dir", str(tmp_path)]))
    assert "cards" not in shaping(chosen)["run"] and from_json(to_json(chosen)) == chosen
    (tmp_path / "config.json").write_text(to_json(chosen))
    again = parse_train(["--resume", "1", "--proj_dir", str(tmp_path)])
    assert (again.run.devices, again.run.cards) == (2, "1,2")
    other = parse_train(["--resume", "1", "--proj_dir", str(tmp_path), "--devices", "1"])
    assert (other.run.devices, other.run.cards) == (1, "")


def test_fine_tuning_hugging_face_models_takes_the_same_words(machine):
    from rwkv_bone.config.flags import parse_section

    def parse(*words: str) -> HfConfig:
        return cards.settle(
            parse_section("train_hf.py", "", HfConfig, ["--model_name_or_path=m", "--data_path=d", *words])
        )

    machine(4)
    assert parse("--devices", "auto").devices == 4
    two = parse("--devices", "2,3")
    assert (two.devices, os.environ["CUDA_VISIBLE_DEVICES"]) == (2, "2,3")


def test_a_number_of_devices_needs_no_torch():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from rwkv_bone import cards\n"
        "from rwkv_bone.config import RunConfig; cards.settle(RunConfig(devices=2)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(REPOSITORY / "src")], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert cards.settle(RunConfig(devices=2)) == RunConfig(devices=2)
