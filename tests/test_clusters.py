"""docs/clusters.md: two nodes on this machine, by every launcher, train the adapter of one machine with two devices.

torchrun is the real one; srun and scontrol are stand-ins that set Slurm's variables and start the tasks.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, clean_environment
from tests.nvidia import write_program

PAGE = REPOSITORY / "docs" / "clusters.md"
HERE = "127.0.0.1"
FILES = {"my-model.pth": "assets/rwkv7-tiny.pth", "mine.jsonl": "assets/numbers_train.jsonl"}
SHORT = "--accelerator cpu --ctx_len 64 --micro_bsz 2 --epoch_count 1 --epoch_steps 3 --eval_samples 0 --bone_r 64"
SHORT += " --lr_init 2e-4 --lr_final 2e-5 --warmup_steps 0"
SRUN = """
task=0
while [ "$task" -lt "$SLURM_NTASKS" ]; do
    each=$((SLURM_NTASKS / SLURM_NNODES))
    SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_NODEID=$((task / each)) SLURM_LOCALID=$((task % each)) \\
        SLURM_LAUNCH_NODE_IPADDR=10.255.255.1 "$@" > "$OUT/task$task" 2>&1 &
    pids="${pids:-} $!"
    task=$((task + 1))
done
if [ -n "${SIGNALLED:-}" ]; then # what --signal does
    until [ -s "$OUT/out/train_log.jsonl" ] && [ "$(wc -l < "$OUT/out/train_log.jsonl")" -ge 2 ]; do sleep 0.1; done
    kill -USR1 $pids
fi
status=0
for pid in $pids; do wait "$pid" || status=$?; done
exit "$status"
"""
pytestmark = pytest.mark.slow


def blocks() -> dict[str, str]:
    """The page's shell blocks, by their first word."""
    found = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return {block.split()[0]: block for block in found}


def changed(words: list[str], **values: str) -> list[str]:
    """The command with other values for some of its flags, each of which it must have."""
    words = [FILES.get(word, word) for word in words]
    for flag, value in values.items():
        words[words.index(f"--{flag}") + 1] = value
    return words


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind((HERE, 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def short(cache):
    return [*SHORT.split(), "--cache_dir", cache]


def environment(**variables: str) -> dict[str, str]:
    return clean_environment() | {"RWKV_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables


def start(command: list[str], folder: Path = REPOSITORY, **variables: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment(**variables), stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def ended(*nodes: subprocess.Popen) -> list[str]:
    """What each has printed, when all have ended well."""
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n---\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def expected(tmp_path_factory, short):
    """The adapter of one machine with two devices."""
    folder = tmp_path_factory.mktemp("alone")
    words = ["--load_model", FILES["my-model.pth"], "--data_file", FILES["mine.jsonl"], "--proj_dir", str(folder)]
    ended(start([sys.executable, "train.py", *words, "--devices", "2", *short]))
    return torch.load(folder / "rwkv-0.pth")


def is_same(folder: Path, expected: dict) -> bool:
    found = torch.load(folder / "rwkv-0.pth")
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_two_nodes_by_torchrun_train_the_adapter_of_one_machine_to_the_bit(tmp_path, port, short, expected):
    words = shlex.split(blocks()["torchrun"].replace("\\\n", ""))
    nodes = []
    for rank in ("0", "1"):
        # A folder for each: only the first machine's is used.
        here = {"nproc_per_node": "1", "master_addr": HERE, "master_port": port, "node_rank": rank}
        node = changed(words, **here, proj_dir=str(tmp_path / f"node{rank}"))
        nodes.append(start([sys.executable, "-m", "torch.distributed.run", *node[1:], *short]))
    outputs = ended(*nodes)
    assert "step 3/3" in outputs[0] and "step" not in outputs[1]
    assert not (tmp_path / "node1").exists() and is_same(tmp_path / "node0", expected)


def test_torchrun_starts_the_script_whose_devices_are_left_out(tmp_path, port, short, expected):
    script = ["--no-python", "sh", "scripts/run_bone.sh", "--proj_dir", str(tmp_path / "x"), "--eval_data=", *short]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    (output,) = ended(start([sys.executable, *torchrun, *script]))
    assert output.count("note: devices=1 of the script is left out: torchrun has started 2 on each machine") == 1
    assert is_same(tmp_path / "x", expected)


def by_hand(tmp_path, port, short, *flags: tuple[str, ...], ranks=("0", "1")) -> list[subprocess.Popen]:
    """The page's first command on two nodes, with more flags for each."""
    words = shlex.split(blocks()["NODE_RANK=0"].replace("\\\n", ""))
    words = changed(words[words.index("sh") :], devices="1")
    nodes = []
    for node, rank in enumerate(ranks):
        own = changed(words, proj_dir=str(tmp_path / f"node{node}"))
        variables = {"NODE_RANK": rank, "MASTER_ADDR": HERE, "MASTER_PORT": port}
        nodes.append(start([*own, "--eval_data=", *short, *(flags[node] if flags else ())], **variables))
    return nodes


def test_the_script_once_on_each_node_trains_the_same(tmp_path, port, short, expected):
    outputs = ended(*by_hand(tmp_path, port, short))
    assert f"node      1 of 2 ({socket.gethostname()}), 1 device; the machines meet at {HERE}:{port}\n" == outputs[1]
    assert not (tmp_path / "node1").exists() and is_same(tmp_path / "node0", expected)


OTHER = "assets/numbers_heldout.jsonl"


@pytest.mark.parametrize(
    ("flags", "ranks", "sentence"),
    [
        ((("--devices", "2"), ()), "01", "node 1 (HOST) was started with --num_nodes 2 --devices 1, node 0 "),
        (((), ("--lr_init", "1")), "01", "node 1 (HOST) has --lr_init 1, node 0 (HOST) has --lr_init 0.0002: "),
        (((), ()), "00", "node 0 (HOST) and node 0 (HOST), processes "),
        (((), ("--load_model", "nowhere/rwkv7-tiny.pth")), "01", "nowhere/rwkv7-tiny.pth does not exist"),
        (((), ("--data_file", "OTHER")), "01", "--data_file: node 1 (HOST) has 2:"),
    ],
)  # fmt: skip
def test_what_is_unlike_ends_both_nodes_with_a_sentence(flags, ranks, sentence, tmp_path, port, short):
    other = tmp_path / "numbers_train.jsonl"
    shutil.copy(REPOSITORY / OTHER, other)
    flags = [[word.replace("OTHER", str(other)) for word in words] for words in flags]
    nodes = by_hand(tmp_path, port, short, *flags, ranks=ranks)
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], "\n---\n".join(outputs)
    for output in outputs:
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert sentence.replace("HOST", socket.gethostname()) in line
        assert "Traceback" not in output
    assert not (tmp_path / "node0").exists()


class Planted:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def job(tmp_path, port, short):
    """A function: a job by the page's script, with so many nodes and tasks, ended well."""
    write_program(tmp_path / "srun", SRUN)
    write_program(tmp_path / "scontrol", 'echo "$@" >> "$OUT/requeued"')
    text = blocks()["#!/bin/sh"].replace("scripts/run_bone.sh", shlex.quote(str(REPOSITORY / "scripts/run_bone.sh")))
    for name, path in FILES.items():
        text = text.replace(name, shlex.quote(str(REPOSITORY / path)))
    text = text.replace(
        "--proj_dir out/cluster", f"--proj_dir {shlex.quote(str(tmp_path))}/out --eval_data= {shlex.join(short)}"
    )
    (tmp_path / "job.sh").write_text(text)

    def run(nodes: int, tasks: int, *flags: str, **variables: str) -> None:
        (tmp_path / "job.sh").write_text(text.replace(" || status", f" {shlex.join(flags)} || status"))
        slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(tasks), "MASTER_PORT": port}
        slurm |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NAME": "train"}
        slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), **variables}
        ended(start(["sh", str(tmp_path / "job.sh")], tmp_path, **slurm))

    return run


@pytest.mark.parametrize(("nodes", "tasks"), [(2, 2), (1, 2)])
def test_the_script_for_slurm_trains_the_same_with_a_task_for_each_node_or_device(
    nodes, tasks, job, tmp_path, expected
):
    torch.save(Planted(tmp_path / "was read"), tmp_path / "hpc_ckpt_1.ckpt")
    job(nodes, tasks)
    assert "step 3/3" in (tmp_path / "task0").read_text() and "step" not in (tmp_path / "task1").read_text()
    assert is_same(tmp_path / "out", expected)
    assert not (tmp_path / "was read").exists() and not (tmp_path / "requeued").exists()


def test_a_job_whose_time_is_over_is_requeued_and_then_continues(job, tmp_path):
    """The second start of the same script goes on where the first was stopped, and ends as if it had not been."""
    # The later value counts; three steps would be over before the signal is sent.
    steps = ["--epoch_steps", "40"]
    job(2, 2, *steps, SIGNALLED="1")
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    first = (tmp_path / "task0").read_text()
    assert "step 40/40" not in first
    job(2, 2, *steps)
    assert "step 40/40" in (tmp_path / "task0").read_text() and "step 1/40" not in (tmp_path / "task0").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
