"""All processes of a run meet, before a model is read, and see that they belong together.

Each tells the store what it is: numbers of machines and devices, versions, settings. The process of rank 0 compares
them as they come. Whatever is unlike, it tells all of them, in a sentence that names the machines and the values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rwkv_bone
from rwkv_bone import console
from rwkv_bone.cluster.world import POLL, SAID_AFTER, SAID_EVERY, Failed, World
from rwkv_bone.config import TrainConfig
from rwkv_bone.config.layers import shown
from rwkv_bone.config.saved import FILES
from rwkv_bone.console import counted
from rwkv_bone.errors import UserError
from rwkv_bone.launched import Launched

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PATIENCE = 20 * 60.0  # seconds for machines that start later: one that makes its .venv first takes minutes
UNREACHABLE = 40.0  # seconds for an address that does not answer at all
ANSWER = 20  # seconds in which what listens there must answer as the store does
# Settings that may differ: folders of one machine, of which only the first machine's are used or none matters.
OWN = {"proj_dir", "cache_dir", "wandb", "cards"}
LIBRARIES = ("torch", "lightning", "deepspeed")
SAME_COMMAND = "type the same command on every machine"

Facts = dict[str, Any]


def meet(world: World, config: TrainConfig, found: Launched, listening: socket.socket | None) -> None:
    """Give `world` its store and the names of the machines. UserError on every machine if this is no run.

    listening: of the process that is to hold the store, where it can be reached.
    """
    facts = facts_of(world, config, found)
    if world.nodes > 1 and world.first_here:
        port = f" (MASTER_PORT is not set: {found.port_from})" if found.port_from else ""
        console.say(
            f"node      {world.node} of {world.nodes} ({facts['host']}), {counted(world.devices, 'device')}; the "
            f"machines meet at {world.address}:{world.port}{port}"
        )
    world.store = _store(world, found, listening)
    index = world.store.add(world.key("met"), 1) - 1
    world.store.set(world.key("met", index), json.dumps(facts))
    if world.main and world.store.compare_set(world.key("judge"), "", str(index)) == str(index).encode():
        world.store.set(world.key("verdict"), json.dumps(_judge(world, facts, found)))
    verdict = json.loads(_verdict(world))
    if verdict["sentence"]:
        raise Failed(verdict["sentence"])
    if index not in verdict["met"]:
        raise Failed(
            f"the run at {world.address}:{world.port} has all its {world.size} processes without this one, "
            f"{_name(facts)}: it is started twice, or another run uses that port: set another MASTER_PORT for one of "
            "them"
        )
    world.hosts = tuple(verdict["hosts"])


def facts_of(world: World, config: TrainConfig, found: Launched) -> Facts:
    """What this process tells of itself."""
    settings = {
        f"--{name}": _told(name, value)
        for section in asdict(config).values()
        for name, value in section.items()
        if name not in OWN | {"devices", "num_nodes"}
    }
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {
        "rank": world.rank,
        "node": world.node,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "named": found.launcher == "NODE_RANK",
        "launcher": unlike_launcher(found, config.run.devices, config.run.num_nodes),
        "counts": f"--num_nodes {world.nodes} --devices {world.devices}",
        "nodes": world.nodes,
        "code": f"{rwkv_bone.__version__}, {code_hash()}",
        "versions": {"Python": platform.python_version(), **versions},
        "settings": settings,
    }


def unlike_launcher(found: Launched, devices: int, nodes: int) -> str:
    """What is wrong if the settings have other numbers than the launcher; else nothing."""
    if found.devices and devices != found.devices:
        return (
            f"--devices {devices}, and {found.launcher} has started {found.devices} on each machine: leave the flag out"
        )
    if found.nodes and nodes != found.nodes:
        return f"--num_nodes {nodes}, and {found.launcher} has {found.nodes}: leave the flag out"
    return ""


def unlike(first: Facts, other: Facts) -> str:
    """Why these two processes cannot be of one run; else nothing."""
    for facts in (first, other):
        if facts["launcher"]:
            return f"{_name(facts)}: {facts['launcher']}"
    one, two = _name(other), _name(first)
    if first["counts"] != other["counts"]:
        return f"{one} was started with {other['counts']}, {two} with {first['counts']}: {SAME_COMMAND}"
    if other["node"] >= first["nodes"]:
        return (
            f"{one}: the {first['nodes']} machines of --num_nodes have the numbers 0 to {first['nodes'] - 1}: give "
            "each its own in NODE_RANK"
        )
    if first["rank"] == other["rank"]:
        return (
            f"{two} and {one}, processes {first['process']} and {other['process']}, are both rank {first['rank']}: "
            "give each machine its own number in NODE_RANK, and start it once"
        )
    for name, value in first["versions"].items():
        if other["versions"][name] != value:
            return f"{one} has {name} {other['versions'][name]}, {two} has {value}: install the same version on all"
    if first["code"] != other["code"]:
        return (
            f"{one} runs other code of this repository ({other['code']}) than {two} ({first['code']}): bring all "
            "machines to the same commit, without changes of their own"
        )
    settings = [name for name, value in first["settings"].items() if other["settings"].get(name) != value]
    if settings:
        values = (
            " ".join(f"{name} {facts['settings'].get(name)}" for name in settings[:4]) for facts in (other, first)
        )
        return f"{one} has {next(values)}, {two} has {next(values)}: {SAME_COMMAND}"
    return ""


def code_hash(package: Path = Path(rwkv_bone.__file__).parent) -> str:
    """A short hash of this repository's code, with its kernels."""
    cuda = package / "cuda" if (package / "cuda").is_dir() else package.parents[1] / "cuda"
    digest = hashlib.blake2b(digest_size=4)
    for folder in (package, cuda):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".json") and path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _told(name: str, value: Any) -> str:
    """A setting as one types it; of files the names alone, since their folders may differ."""
    if name in FILES:
        return shown(Path(value).name if isinstance(value, str) else tuple(Path(path).name for path in value))
    return shown(tuple(value) if isinstance(value, list) else value)


def _name(facts: Facts) -> str:
    return f"node {facts['node']} ({facts['host']})"


def _judge(world: World, own: Facts, found: Launched) -> dict[str, Any]:
    """Wait for all processes, and compare each with this one."""
    assert world.store
    there: dict[int, tuple[int, Facts]] = {}  # rank -> its place in the order of coming, and what it said
    seen, waiting = 0, _Waiting(PATIENCE)
    while len(there) < world.size:
        if not world.store.check([world.key("met", seen)]):
            nodes = sorted(set(range(world.nodes)) - {facts["node"] for _, facts in there.values()})
            names = ", ".join(map(str, nodes)) if nodes else "all of whose processes are not there yet"
            missing = (
                f"node {names} of {world.nodes}" if nodes else f"{world.size - len(there)} of {world.size} processes"
            )
            world.store.set(world.key("missing"), missing)
            if waiting.over(f"waiting   for {missing}{_for_long(found)}"):
                return {"sentence": f"{missing} did not come in {_minutes(PATIENCE)}: start the same command there"}
            time.sleep(POLL)
            continue
        facts = json.loads(world.store.get(world.key("met", seen)))
        others = [one for _, one in there.values() if one["rank"] == facts["rank"]] or [own]
        if others[0] is not own or facts != own:
            if sentence := unlike(others[0], facts):
                return {"sentence": sentence}
        there[facts["rank"]] = (seen, facts)
        seen += 1
    hosts = [there[node * world.devices][1]["host"] for node in range(world.nodes)]
    return {"sentence": "", "met": [index for index, _ in there.values()], "hosts": hosts}


def _store(world: World, found: Launched, listening: socket.socket | None) -> TCPStore:
    """The store of the run; UserError if nothing answers where it should be."""
    _reach(world, found)
    from torch.distributed import TCPStore

    options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=ANSWER)}
    if listening:
        # PyTorch's own store of the same process and port is then the same one.
        options |= {"is_master": True, "multi_tenant": True, "master_listen_fd": listening.detach()}
    made: list[TCPStore] = []

    def make() -> None:
        with contextlib.suppress(RuntimeError):
            made.append(TCPStore(world.address, world.port, **options))

    # In a thread: PyTorch waits without end for a program that takes the connection and says nothing.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(ANSWER)
    if made:
        return made[0]
    what = "on this machine, where it would listen itself," if world.main else f"of {world.address}"
    raise UserError(f"port {world.port} {what} belongs to another program: set another MASTER_PORT on all machines")


def _reach(world: World, found: Launched) -> None:
    """Wait until something listens where the store is to be."""
    waiting, dead_since = _Waiting(PATIENCE), 0.0
    where = f"{world.address}:{world.port}"
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=5).close()
            return
        except OSError as error:
            refused, why = isinstance(error, ConnectionRefusedError), (error.strerror or str(error)).lower()
        if world.main and world.nodes > 1:
            raise UserError(
                f"MASTER_ADDR {world.address} is not this machine, which is node 0 (port {world.port}: {why}): "
                "MASTER_ADDR names the machine with NODE_RANK 0, as the others reach it"
            )
        # A machine that refuses is there, and its run is not yet. One that does not answer may never do.
        dead_since = 0.0 if refused else dead_since or time.monotonic()
        if dead_since and time.monotonic() - dead_since > UNREACHABLE:
            raise UserError(
                f"node {world.node} cannot reach node 0 at {where} ({why}): check MASTER_ADDR and MASTER_PORT, that "
                "the machines see each other, and that no firewall is between them"
            )
        hint = "" if refused else f"; giving up after {UNREACHABLE:.0f} seconds of this"
        if waiting.over(f"waiting   for node 0 at {where}: {why}{hint}{_for_long(found)}", aloud=world.first_here):
            raise UserError(
                f"node 0 did not come to {where} in {_minutes(PATIENCE)} ({why}): start the same command there, with "
                "NODE_RANK 0"
            )
        time.sleep(1)


def _for_long(found: Launched) -> str:
    return f"; {found.hint}" if found.hint else ""


def _verdict(world: World) -> str:
    """What rank 0 says, once it does."""
    assert world.store
    key, waiting = world.key("verdict"), _Waiting(PATIENCE + 60)
    try:
        while not world.store.check([key]):
            missing = ""
            if waiting.is_time() and world.store.check([world.key("missing")]):
                missing = world.store.get(world.key("missing")).decode()
            if waiting.over(f"waiting   for {missing or 'node 0'}", aloud=world.first_here):
                raise Failed(f"node 0 at {world.address}:{world.port} did not answer")
            time.sleep(POLL)
        return world.store.get(key).decode()
    except RuntimeError:
        raise Failed(f"node 0 at {world.address}:{world.port} has ended; what it printed says why") from None


class _Waiting:
    """Says for whom this process waits, after some seconds and then now and again."""

    def __init__(self, seconds: float):
        self._begin, self._seconds = time.monotonic(), seconds
        self._next = self._begin + SAID_AFTER

    @property
    def passed(self) -> float:
        return time.monotonic() - self._begin

    def is_time(self) -> bool:
        return time.monotonic() >= self._next

    def over(self, line: str, aloud: bool = True) -> bool:
        """Whether it has been long enough; says so while it is not."""
        if self.is_time():
            self._next = time.monotonic() + SAID_EVERY
            if aloud:
                console.say(f"{line} ({self.passed:.0f} seconds; giving up after {_minutes(self._seconds)})")
        return self.passed > self._seconds


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
