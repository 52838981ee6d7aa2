"""docs/clusters.md: its torchrun command, with two nodes on this machine, trains what two devices of one do."""

import re
import shlex
import socket
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY, clean_environment

PAGE = REPOSITORY / "docs" / "clusters.md"
SHORT = "--accelerator cpu --ctx_len 64 --micro_bsz 2 --epoch_steps 3 --eval_samples 0".split()
FILES = {"my-model.pth": "assets/rwkv7-tiny.pth", "mine.jsonl": "assets/numbers_train.jsonl"}


def command_of_the_page() -> list[str]:
    (block,) = re.findall(r"```sh\n(torchrun .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return shlex.split(block.replace("\\\n", ""))


def changed(words: list[str], **values: str) -> list[str]:
    """The command with other values for some of its flags, each of which it must have."""
    words = [FILES.get(word, word) for word in words]
    for flag, value in values.items():
        words[words.index(f"--{flag}") + 1] = value
    return words


@pytest.mark.slow
def test_two_nodes_by_torchrun_train_the_adapter_of_one_machine_to_the_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = command_of_the_page()
    here = {"nproc_per_node": "1", "devices": "1", "master_addr": "127.0.0.1", "master_port": port}
    short = [*SHORT, "--cache_dir", str(tmp_path)]
    nodes = []
    for rank in ("0", "1"):
        # A folder for each: only the first machine's is used.
        node = changed(words, **here, node_rank=rank, proj_dir=str(tmp_path / f"node{rank}"))
        torchrun = [sys.executable, "-m", "torch.distributed.run", *node[1:], *short]
        nodes.append(
            subprocess.Popen(
                torchrun, cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [node.communicate(timeout=300)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "step 3/3" in outputs[0] and "step" not in outputs[1]
    assert not (tmp_path / "node1").exists()

    train = words[words.index("train.py") :]
    alone = changed(train, num_nodes="1", devices="2", proj_dir=str(tmp_path / "alone"))
    subprocess.run(
        [sys.executable, *alone, *short], cwd=REPOSITORY, env=clean_environment(), capture_output=True, check=True
    )
    found, expected = (torch.load(tmp_path / name / "rwkv-0.pth") for name in ("node0", "alone"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
