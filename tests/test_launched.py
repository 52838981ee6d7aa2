"""What the variables of launchers say: torchrun's, Slurm's, and those that a person sets on each machine."""

import pytest

from rwkv_bone import launched
from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.hf import finetune
from rwkv_bone.hf.flags import HfConfig
from rwkv_bone.launched import Launched, find, host_names

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",  # of the machine where srun was typed
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
MODEL = ["--load_model", "m.pth", "--data_file", "d.jsonl"]


@pytest.fixture
def environment(monkeypatch):
    """A function that sets these variables, and no others of a launcher."""

    def set_all(values):
        for name in {*TORCHRUN, *SLURM, "NODE_RANK", "SLURM_GPUS_ON_NODE"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_all({})
    return set_all


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[01-03,7]", "node01 node02 node03 node7"),
        ("a,b-1", "a b-1"),
        ("gpu[098-101]", "gpu098 gpu099 gpu100 gpu101"),
        ("r[1-2]n[3,5].cluster,login", "r1n3.cluster r1n5.cluster r2n3.cluster r2n5.cluster login"),
        ("one", "one"),
        ("a[1] b", "a1 b"),
        ("", ""),
    ],
)
def test_the_machines_of_a_job_are_read_without_scontrol(text, names):
    assert host_names(text) == names.split()


def test_a_terminal_an_interactive_shell_and_a_batch_step_of_one_task_are_plain_runs():
    shell = SLURM | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    # salloc -N 2 whose shell is an interactive step of its own.
    of_two = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    without_step = {name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}
    # What a run of one process leaves in the environment of its own process.
    left = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for values in ({}, shell, of_two, without_step, left, {"MASTER_ADDR": "a"}):
        assert find(values) == Launched()


def test_each_process_of_torchrun_is_a_rank_also_inside_slurm():
    expected = Launched("torchrun", 1, 2, 1, 2, None, "a", 1)
    assert find(TORCHRUN) == find(SLURM | TORCHRUN) == expected
    one = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert find(one) == Launched("torchrun", 0, 1, 0, 1, None, "a", 1)
    with pytest.raises(UserError, match="torchrun has started 4 processes, 3 of them on this machine"):
        find(TORCHRUN | {"LOCAL_WORLD_SIZE": "3"})


def test_a_task_on_each_node_starts_its_devices_and_a_task_for_each_device_is_a_rank():
    found = find(SLURM)
    assert (found.launcher, found.node, found.nodes, found.local_rank, found.devices) == ("Slurm", 1, 2, 0, None)
    assert found.address == "gpu07" and 20000 <= found.port < 30000 and found.port_from == "made of SLURM_JOB_ID"
    each = find(SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"})
    assert (each.node, each.nodes, each.local_rank, each.devices) == (1, 2, 2, 4)
    assert find(SLURM | {"SLURM_STEP_ID": "1"}).port != found.port == each.port
    named = find(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"})
    assert (named.address, named.port, named.port_from) == ("10.0.0.1", 29400, "")
    # A step on a part of the job's machines.
    step = {"SLURM_JOB_NODELIST": "gpu[06-09]", "SLURM_NNODES": "4", "SLURM_NTASKS": "4"}
    step |= {"SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert (find(SLURM | step).address, find(SLURM | step).nodes) == ("gpu08", 2)
    with pytest.raises(UserError, match="Slurm has started 3 tasks on 2 nodes: each node must have as many"):
        find(SLURM | {"SLURM_NTASKS": "3"})
    assert "srun starts them all" in find({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_ID"}).hint


def test_variables_that_a_person_sets_name_the_machine_and_where_the_first_one_is():
    by_hand = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    assert find(by_hand) == Launched("NODE_RANK", 1, address="10.0.0.1", port=29500, port_from="the default is taken")
    assert find({"RANK": "1", "MASTER_ADDR": "b", "MASTER_PORT": "7"}) == Launched("RANK", 1, address="b", port=7)
    for name, value in (("NODE_RANK", "one"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "-1")):
        with pytest.raises(UserError, match=f"{name}={value}: expected"):
            find(by_hand | {name: value})


def test_devices_and_machines_that_are_left_out_are_the_launchers(environment, capsys):
    environment(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"})
    run = parse_train(MODEL).run
    assert (run.devices, run.num_nodes, capsys.readouterr().out) == (2, 2, "")
    run = parse_train(["--devices=1", "--num_nodes=1", "--typed", *MODEL]).run
    assert (run.devices, run.num_nodes) == (2, 2)
    said = capsys.readouterr().out
    assert "note: devices=1 of the script is left out: torchrun has started 2 on each machine\n" in said
    assert "note: num_nodes=1 of the script is left out: torchrun has 2\n" in said
    # What was meant stays, and is refused where the processes meet.
    assert parse_train(["--devices=4", "--typed", *MODEL]).run.devices == 4
    assert parse_train(["--devices=1", "--typed", *MODEL, "--devices", "3"]).run.devices == 3


def test_a_task_on_each_node_uses_the_cards_that_slurm_gives_to_it(environment, capsys):
    environment(SLURM | {"SLURM_GPUS_ON_NODE": "4", "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    run = parse_train(["--devices=1", "--typed", *MODEL]).run
    assert (run.devices, run.num_nodes) == (4, 2)
    assert "devices=1 of the script is left out: Slurm gives 4 cards to this task\n" in capsys.readouterr().out
    assert parse_train([*MODEL, "--accelerator", "cpu"]).run.devices == 1


def test_one_process_of_a_run_speaks_for_all(environment):
    for values, speaks in (
        ({}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        (SLURM, False),
        ({"NODE_RANK": "one", "MASTER_ADDR": "a"}, True),
    ):
        environment(values)
        assert launched.speaks() == speaks


def test_devices_of_a_hugging_face_run_agree_with_torchrun(environment):
    environment(TORCHRUN)
    assert not finetune.launches(HfConfig("m", "d")) and not finetune.launches(HfConfig("m", "d", devices=2))
    with pytest.raises(UserError, match="--devices 3, and torchrun has started 2 processes"):
        finetune.launches(HfConfig("m", "d", devices=3))
