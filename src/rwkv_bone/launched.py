"""How this process was started, by the variables that launchers set: torchrun, Slurm, or a person on each machine.

Only the standard library is needed, so that a command line can be read with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_bone.errors import UserError

HERE = "127.0.0.1"
PORT = 29500  # torchrun's own
BY_HAND = ("NODE_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT")  # what a person sets on each of several machines


@dataclass(frozen=True)
class Launched:
    """What a launcher says. A number that it does not say is None.

    devices: processes on this machine; None: one, which is to start those of its other devices itself. address, port:
    where the processes meet; the port is None where the first process is to take any that is free.
    """

    launcher: str = ""  # for messages: torchrun, Slurm, NODE_RANK; "" = a person at a terminal
    node: int | None = None
    nodes: int | None = None
    local_rank: int = 0
    devices: int | None = None
    cards: int | None = None  # of this machine that the launcher gives to its one process
    address: str = HERE
    port: int | None = None
    port_from: str = ""  # where the port is from, if nobody named it
    hint: str = ""  # what may be wrong if others do not come


def speaks() -> bool:
    """Whether this process prints what concerns all processes of its run."""
    try:
        found = find()
    except UserError:
        return True
    return not found.node and found.local_rank == 0


def by_hand(environment: Mapping[str, str] = os.environ) -> list[str]:  # MASTER_ADDR and others
    """Those of BY_HAND that are set, unless an earlier run of this process has left them."""
    return [name for name in BY_HAND if name in environment and "LOCAL_RANK" not in environment]


def find(environment: Mapping[str, str] = os.environ) -> Launched:  # MASTER_ADDR and others, of launchers
    """How this process was started. UserError for variables that cannot be meant."""
    has = environment.__contains__
    if has("RANK") and has("LOCAL_RANK") and (has("TORCHELASTIC_RUN_ID") or _number(environment, "WORLD_SIZE", 1) > 1):
        return _by_rank(environment)
    if has("SLURM_PROCID") and _of_step(environment, "NUM_TASKS", "SLURM_NTASKS") > 1:
        return _by_slurm(environment)
    if has("MASTER_ADDR") and (has("NODE_RANK") or has("RANK")):
        name = "NODE_RANK" if has("NODE_RANK") else "RANK"
        if not has("NODE_RANK") and _number(environment, "WORLD_SIZE", 1) == 1 and has("LOCAL_RANK"):
            return Launched()  # left by an earlier run in this process
        port, said = _port(environment, PORT, "the default is taken")
        return Launched(
            launcher=name,
            node=_number(environment, name),
            address=environment["MASTER_ADDR"],
            port=port,
            port_from=said,
        )
    return Launched()


def _by_rank(environment: Mapping[str, str]) -> Launched:
    """torchrun, or what sets the same variables: each process is started by it."""
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE"
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local = _number(environment, "LOCAL_RANK")
    devices = _number(environment, "LOCAL_WORLD_SIZE", 0) or None
    if devices is None:
        raise UserError(
            "RANK, LOCAL_RANK and WORLD_SIZE are set, and LOCAL_WORLD_SIZE is not: set it too, or use torchrun"
        )
    if size % devices:
        raise UserError(
            f"{name} has started {size} processes, {devices} of them on this machine: each machine must have as many"
        )
    port, said = _port(environment, PORT, "the default is taken")
    return Launched(
        launcher=name,
        node=_number(environment, "GROUP_RANK", rank // devices),
        nodes=size // devices,
        local_rank=local,
        devices=devices,
        address=environment.get("MASTER_ADDR", HERE),
        port=port,
        port_from=said,
    )


def _by_slurm(environment: Mapping[str, str]) -> Launched:
    """A task of srun: one on each node, or one for each device."""
    tasks = _of_step(environment, "NUM_TASKS", "SLURM_NTASKS")
    nodes = max(_of_step(environment, "NUM_NODES", "SLURM_NNODES"), 1)
    if tasks % nodes:
        raise UserError(
            f"Slurm has started {tasks} tasks on {nodes} nodes: each node must have as many: give srun "
            "--ntasks-per-node"
        )
    devices = None if tasks == nodes else tasks // nodes
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = environment.get("MASTER_ADDR") or (host_names(names) or [HERE])[0] if nodes > 1 else HERE
    job = _number(environment, "SLURM_JOB_ID", 0)
    # Two steps of a job may run at once.
    default = 20000 + (job * 16 + _number(environment, "SLURM_STEP_ID", 0)) % 10000
    port, said = _port(environment, default, "made of SLURM_JOB_ID")
    cards = environment.get("SLURM_GPUS_ON_NODE", "")
    in_step = "SLURM_STEP_ID" in environment
    return Launched(
        launcher="Slurm",
        node=_number(environment, "SLURM_NODEID", 0),
        nodes=nodes,
        local_rank=_number(environment, "SLURM_LOCALID", 0) if devices else 0,
        devices=devices,
        cards=int(cards) if devices is None and cards.isdecimal() else None,
        address=address,
        port=port,
        port_from=said,
        hint="" if in_step else f"Slurm says this is one of {tasks} tasks: srun starts them all",
    )


def host_names(text: str) -> list[str]:
    """The names in a node list of Slurm: `a[01-03,7],b` -> a01 a02 a03 a7 b."""
    names = []
    for word in re.findall(r"(?:\[[^\]]*\]|[^,\s\[])+", text):
        made = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", word):
            ends = [plain] if plain else [name for part in ranges.split(",") for name in _range(part)]
            made = [begin + end for begin in made for end in ends]
        names += made
    return names


def _range(part: str) -> list[str]:
    """`01-03` -> 01 02 03; `7` -> 7."""
    first, dash, last = part.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)] if dash else [part]


def _of_step(environment: Mapping[str, str], name: str, of_job: str) -> int:
    """A number of the step, in which this process is a task, or else of the job."""
    return _number(environment, f"SLURM_STEP_{name}", _number(environment, of_job, 1))


def _port(environment: Mapping[str, str], default: int, said: str) -> tuple[int, str]:
    if "MASTER_PORT" not in environment:
        return default, said
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={port}: expected a port, 1 to 65535")
    return port, ""


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UserError(f"{name}={text or ''}: expected a whole number; the launcher sets it")
    return int(text)
