"""Numbers of processes and machines that do not fit what a launcher has started end in a sentence."""

import pytest

from rwkv_bone.config import RunConfig
from rwkv_bone.errors import UserError
from rwkv_bone.hf import finetune
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.training.launchers import check_launcher

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def torchrun(monkeypatch):
    """A function: the number of processes -> their environment."""

    def start(count):
        for name, value in {**TORCHRUN, "WORLD_SIZE": str(count), "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (4, 2), (1, 2)])
def test_torchrun_must_have_started_as_many_processes_as_the_settings_say(devices, nodes, torchrun):
    run = RunConfig(devices=devices, num_nodes=nodes)
    torchrun(devices * nodes)
    check_launcher(run)
    for count in (devices * nodes + 1, devices * nodes + 7):
        torchrun(count)
        with pytest.raises(UserError, match=f"are {devices * nodes} processes, and torchrun has started {count}"):
            check_launcher(run)
    if devices * nodes > 1:
        torchrun(1)
        with pytest.raises(UserError, match="torchrun has started 1"):
            check_launcher(run)


def test_several_machines_need_something_that_says_which_one_this_is(monkeypatch):
    for name in (*TORCHRUN, "MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    check_launcher(RunConfig(devices=2))
    with pytest.raises(UserError, match="--num_nodes 2: nothing says which machine this is"):
        check_launcher(RunConfig(num_nodes=2))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_launcher(RunConfig(num_nodes=2))


def test_devices_of_a_hugging_face_run_agree_with_torchrun(torchrun):
    torchrun(2)
    assert not finetune.launches(HfConfig("m", "d")) and not finetune.launches(HfConfig("m", "d", devices=2))
    with pytest.raises(UserError, match="--devices 3, and torchrun has started 2 processes"):
        finetune.launches(HfConfig("m", "d", devices=3))
