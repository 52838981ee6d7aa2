"""Processes meet before anything is read: what is unlike or missing is a sentence on every one of them.

Here they are threads of one process, at a real store; tests/test_clusters.py starts real ones.
"""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rwkv_bone.cluster import join as join_file
from rwkv_bone.cluster import links, meeting
from rwkv_bone.cluster.join import join
from rwkv_bone.cluster.meeting import code_hash, facts_of, unlike, unlike_launcher
from rwkv_bone.cluster.world import World
from rwkv_bone.config.flags import parse_train
from rwkv_bone.errors import UserError
from rwkv_bone.launched import HERE, Launched
from tests.test_launched import SLURM, TORCHRUN

CONFIG = parse_train(["--load_model", "here/m.pth", "--data_file", "d.jsonl", "--num_nodes", "2"])
FIRST = facts_of(World(0, size=2, nodes=2), CONFIG, Launched())
SECOND = FIRST | {"rank": 1, "node": 1, "host": "other"}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind((HERE, 0))
        return free.getsockname()[1]


def process(port: int, node: int, nodes: int = 2, config=CONFIG) -> World:
    """What `join` does in a process of its own, but for the environment, which threads share."""
    world = World(node, size=nodes, node=node, nodes=nodes, address=HERE, port=port)
    found = Launched("NODE_RANK", node, address=HERE, port=port)
    try:
        meeting.meet(world, config, found, join_file._listen(found, nodes) if node == 0 else None)
    except UserError:
        world.__exit__(*sys.exc_info())
        raise
    return world


def together(*calls):
    """What each call returns, or the message with which it ends, where they run at the same time."""

    def caught(call):
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


def test_processes_that_fit_together_know_each_other_in_whatever_order_they_come(port, capsys):
    second = lambda: process(port, 1)  # noqa: E731
    worlds = together(second, lambda: time.sleep(0.2) or process(port, 0))
    assert [world.rank for world in worlds] == [1, 0]
    assert worlds[0].hosts == worlds[1].hosts == (socket.gethostname(),) * 2
    assert f"node      1 of 2 ({socket.gethostname()}), 1 device; the machines meet at" in capsys.readouterr().out
    # A third one, started by mistake, leaves them alone.
    (late,) = together(second)
    assert late.startswith(f"the run at {HERE}:{port} has all its 2 processes without this one, node 1 (")

    def told(world, value):
        world.agree("--data_file", value, "copy it")

    one, two = together(*(lambda w=w: told(w, f"data {w.rank}") for w in worlds))
    assert one == two and "has data 1, node 0" in one and one.endswith("has data 0: copy it")
    assert together(*(lambda w=w: w.from_first("folder", lambda: {"step": 7}) for w in worlds)) == [{"step": 7}] * 2
    # What one raises ends the others' wait.
    worlds[0].fail("no such file")
    (ended,) = together(lambda: worlds[1].get(worlds[1].key("never"), "a test", 0))
    assert ended == f"node 1 ({socket.gethostname()}): no such file"


def test_every_process_is_told_what_is_unlike(port):
    other = replace(CONFIG, optim=replace(CONFIG.optim, lr_init=0.5))
    found = together(lambda: process(port, 0), lambda: process(port, 1, config=other))
    assert found[0] == found[1] and "has --lr_init 0.5, node 0 (" in found[0]
    found = together(lambda: process(port, 0), lambda: process(port, 0))
    assert found[0] == found[1] and "are both rank 0: give each machine its own number" in found[0]
    found = together(lambda: process(port, 0), lambda: process(port, 1, nodes=3))
    assert found[0] == found[1] and "--num_nodes 3 --devices 1, node 0" in found[0]


def test_a_process_that_is_lost_as_soon_as_it_has_met_the_others_is_named_to_all(port, monkeypatch):
    worlds = together(*(lambda node=node: process(port, node, nodes=3) for node in range(3)))
    now, connected = [0.0], threading.Event()
    monkeypatch.setattr(links, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))

    def second():
        link = links.connect(worlds[1])[0]
        connected.set()
        link.socket.settimeout(30)
        return next(iter(link.receive()))

    def somebody_else():
        told = json.loads(worlds[1].get(worlds[1].key("watch"), "a test", 0))
        connected.wait()
        with socket.create_connection((HERE, told["port"]), timeout=30) as stranger:
            stranger.sendall(b'{"token": "guessed", "rank": 2, "process": []}\n')
            assert stranger.recv(1) == b""
        now[0] = links.CONNECTING + 1

    first, told, _ = together(lambda: links.connect(worlds[0]), second, somebody_else)
    assert first == f"node 2 ({socket.gethostname()}) has met the others, and then was not heard of again"
    assert told == {"end": 2, "text": f"error: {first}"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": FIRST["versions"] | {"torch": "2.1"}}, "node 1 (other) has torch 2.1, node 0 (HOST) has TORCH: "),
        ({"versions": FIRST["versions"] | {"Python": "3.9"}}, "node 1 (other) has Python 3.9, node 0 (HOST) has "),
        ({"code": "0.2.0, 00"}, "node 1 (other) runs other code of this repository (0.2.0, 00) than node 0 (HOST) ("),
        ({"counts": "--num_nodes 2 --devices 4"}, "node 1 (other) was started with --num_nodes 2 --devices 4, node 0 "),
        ({"node": 2, "rank": 2}, "node 2 (other): the 2 machines of --num_nodes have the numbers 0 to 1: "),
        ({"node": 0, "rank": 0}, "node 0 (HOST) and node 0 (other), processes "),
        ({"launcher": "--devices 3, and torchrun has started 2"}, "node 1 (other): --devices 3, and torchrun has "),
        ({"settings": FIRST["settings"] | {"--quant": "nf4"}}, "node 1 (other) has --quant nf4, node 0 (HOST) has --"),
    ],
)  # fmt: skip
def test_what_is_unlike_is_named_with_the_machines_and_both_values(change, sentence):
    assert unlike(FIRST, SECOND) == ""
    expected = sentence.replace("HOST", FIRST["host"]).replace("TORCH", FIRST["versions"]["torch"])
    assert unlike(FIRST, SECOND | change).startswith(expected)


def test_folders_of_one_machine_may_differ_and_files_have_the_same_names():
    words = ["--load_model", "/there/m.pth", "--data_file", "d.jsonl", "--num_nodes", "2"]
    second = World(1, size=2, node=1, nodes=2)
    there = parse_train([*words, "--proj_dir", "x", "--cache_dir", "y"])
    assert unlike(FIRST, facts_of(second, there, Launched())) == ""
    words[1] = "/there/n.pth"
    assert "has --load_model n.pth, " in unlike(FIRST, facts_of(second, parse_train(words), Launched()))


def test_a_change_of_the_code_or_of_a_kernel_is_another_code(tmp_path):
    package = tmp_path / "src" / "rwkv_bone"
    for name in ("src/rwkv_bone/a.py", "cuda/cpu/b.cpp", "cuda/c.cuh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    hashes = [code_hash(package)]
    for name in ("src/rwkv_bone/a.py", "cuda/cpu/b.cpp", "cuda/c.cuh"):
        (tmp_path / name).write_text("2")
        hashes.append(code_hash(package))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("3")
    assert len(set(hashes)) == 4 and code_hash(package) == hashes[-1]


def test_who_is_missing_is_said_and_in_the_end_given_up(port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SAID_AFTER", 0.1)
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    world = World(0, size=4, nodes=2, address=HERE, port=port)
    found = Launched("Slurm", 0, address=HERE, port=port, hint="srun starts them")
    with pytest.raises(UserError) as ended:
        meeting.meet(world, CONFIG, found, join_file._listen(found, 2))
    assert str(ended.value) == "node 1 of 2 did not come in 0 seconds: start the same command there"
    assert (
        "waiting   for node 1 of 2; srun starts them (0 seconds; giving up after 0 seconds)" in capsys.readouterr().out
    )


def test_a_first_machine_that_is_not_there_is_waited_for_and_one_that_does_not_exist_is_not(port, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SAID_AFTER", 0.1)
    monkeypatch.setattr(meeting, "PATIENCE", 1.5)
    (refused,) = together(lambda: process(port, 1))
    assert refused.startswith(f"node 0 did not come to {HERE}:{port} in 2 seconds (connection refused): start the same")
    assert f"waiting   for node 0 at {HERE}:{port}: connection refused (" in capsys.readouterr().out
    monkeypatch.setattr(meeting, "UNREACHABLE", 0.5)

    def lookup(*address, timeout):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(meeting.socket, "create_connection", lookup)
    (unknown,) = together(lambda: process(port, 1))
    assert unknown.startswith(
        f"node 1 cannot reach node 0 at {HERE}:{port} (name or service not known): check MASTER_ADDR"
    )
    (elsewhere,) = together(lambda: process(port, 0))
    assert elsewhere.startswith(
        f"MASTER_ADDR {HERE} is not this machine, which is node 0 (port {port}: name or service"
    )


def test_a_port_of_another_program_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER", 1)
    with socket.create_server((HERE, 0)) as other:
        port = other.getsockname()[1]
        held: list[socket.socket] = []
        threading.Thread(target=lambda: [held.append(other.accept()[0]) for _ in range(4)], daemon=True).start()
        first, second = together(lambda: process(port, 0), lambda: process(port, 1))
        for connection in held:
            connection.close()
    assert first.startswith(f"port {port} on this machine, where it would listen itself, belongs to another program")
    assert second.startswith(f"port {port} of {HERE} belongs to another program: set another MASTER_PORT")


def test_several_machines_need_something_that_says_which_one_this_is(monkeypatch):
    for name in ("MASTER_ADDR", "NODE_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--num_nodes 2: nothing says which machine this is"):
        join(CONFIG)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("NODE_RANK", "1")
    alone = replace(CONFIG, run=replace(CONFIG.run, num_nodes=1))
    with pytest.raises(UserError, match="NODE_RANK=1 says that this is machine 2, and --num_nodes is 1: give"):
        join(alone)


def test_variables_of_several_machines_are_not_used_by_a_run_on_one_and_that_is_said(monkeypatch, capsys):
    for name in (*TORCHRUN, *SLURM, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = replace(CONFIG, run=replace(CONFIG.run, num_nodes=1))
    assert join(alone) == World() and capsys.readouterr().out == ""
    # Of another machine: two processes of this one must not look for each other there.
    for name, value in {"NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)
    assert join(alone) == World()
    note = "note: NODE_RANK, MASTER_ADDR, MASTER_PORT of the environment: not used, since --num_nodes is 1\n"
    assert capsys.readouterr().out == note
    met: list[World] = []
    monkeypatch.setattr(join_file, "_start", lambda first, local_rank: None)
    monkeypatch.setattr(join_file, "_set_variables", lambda world: None)
    monkeypatch.setattr(meeting, "meet", lambda world, config, found, listening: listening.close() or met.append(world))
    join(replace(alone, run=replace(alone.run, devices=2)))
    assert (met[0].address, met[0].port != 29400, capsys.readouterr().out) == (HERE, True, note)
    monkeypatch.setenv("LOCAL_RANK", "0")  # as an earlier run of this process leaves them
    monkeypatch.setenv("RANK", "0")
    assert join(alone) == World() and capsys.readouterr().out == ""


def test_a_launcher_that_has_started_another_number_is_named():
    assert unlike_launcher(Launched("torchrun", 0, 2, 0, 2), 2, 2) == ""
    for devices in (1, 3):
        sentence = unlike_launcher(Launched("torchrun", 0, 2, 0, 2), devices, 2)
        assert sentence.startswith(f"--devices {devices}, and torchrun has started 2 on each machine: leave")
    assert unlike_launcher(Launched("Slurm", 0, 2), 4, 3) == "--num_nodes 3, and Slurm has 2: leave the flag out"
