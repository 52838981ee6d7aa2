"""A process finds the others of its run, and starts those of this machine that no launcher has started."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from rwkv_bone import console, launched
from rwkv_bone.cluster import meeting
from rwkv_bone.cluster.world import World
from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError
from rwkv_bone.launched import HERE, Launched

QUEUE = 4096  # processes that may connect before the first one answers
PR_SET_PDEATHSIG = 1


def join(config: TrainConfig) -> World:
    """Find the other processes of this run, on this and on other machines, and see that they belong together.

    The processes of this machine's other devices are started here, unless a launcher has done so. UserError, on every
    machine, where processes do not fit together or do not come; all other ways to end are `World`'s, as a context.
    """
    run, found = config.run, launched.find()
    if wrong := _impossible(found, run.devices, run.num_nodes):
        raise UserError(wrong)
    if run.num_nodes == 1 and found.devices is None and found.nodes is None:
        if unused := launched.by_hand():
            console.say(f"note: {', '.join(unused)} of the environment: not used, since --num_nodes is 1")
        found = Launched()
    # Of a launcher's numbers and others in the settings the meeting tells every machine.
    devices, nodes = found.devices or run.devices, found.nodes or run.num_nodes
    if devices * nodes == 1:
        return World()
    node = found.node or 0
    rank = node * devices + found.local_rank
    listening = _listen(found, nodes) if rank == 0 and not _launcher_has_store() else None
    port = found.port if found.port else listening.getsockname()[1] if listening else 0
    world = World(rank, found.local_rank, devices * nodes, node, nodes, found.address, port)
    world.launched = found.devices is not None
    # torchrun keeps its store when it starts failed processes again.
    world.prefix += os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    _set_variables(world)
    if found.devices is None:
        world.children = tuple(_start(rank, local_rank) for local_rank in range(1, devices))
    try:
        meeting.meet(world, config, found, listening)
    except BaseException:
        world.__exit__(*sys.exc_info())
        raise
    return world


def _impossible(found: Launched, devices: int, nodes: int) -> str:
    """Why this process cannot even look for others; else nothing."""
    if found.devices and found.nodes and found.devices * found.nodes == 1:
        return meeting.unlike_launcher(found, devices, nodes)
    if nodes > 1 and found.node is None:
        return (
            f"--num_nodes {nodes}: nothing says which machine this is and where the first one is: set NODE_RANK, "
            "MASTER_ADDR and MASTER_PORT, or use torchrun or srun, as docs/clusters.md shows"
        )
    if nodes == 1 and not found.nodes and found.node:
        return (
            f"{found.launcher}={found.node} says that this is machine {found.node + 1}, and --num_nodes is 1: give "
            "--num_nodes, or unset the variable"
        )
    return ""


def _launcher_has_store() -> bool:
    """Whether torchrun itself listens where the processes meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen(found: Launched, nodes: int) -> socket.socket | None:
    """Where the others can reach this process, from now on; None if another program of this machine listens there."""
    where = (HERE if nodes == 1 else "", found.port or 0)
    both = nodes > 1 and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(where, family=family, dualstack_ipv6=both, backlog=QUEUE)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise UserError(
            f"port {found.port} of this machine cannot be listened at ({error.strerror}): set MASTER_PORT"
        ) from None


def _set_variables(world: World) -> None:
    """What libraries, and the processes that are started here, look for."""
    os.environ |= {  # LOCAL_RANK and the like are torchrun's
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.devices),
        "GROUP_RANK": str(world.node),
        "MASTER_ADDR": world.address,
        "MASTER_PORT": str(world.port),
    }
    # PyTorch prints a trace of its own code for each connection that ends; what it means is said here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _start(first: int, local_rank: int) -> subprocess.Popen:
    """This command once more, for another device of this machine. first: the rank of this process."""
    own = {"RANK": str(first + local_rank), "LOCAL_RANK": str(local_rank)}
    command = [sys.executable, *sys.orig_argv[1:]]
    environment = {**os.environ, **own}  # with LOCAL_RANK
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=_dies_with_this_process())


def _dies_with_this_process() -> Callable[[], None] | None:
    """For a new process: have the system end it when this one ends, however that happens. None but on Linux."""
    if sys.platform != "linux":
        return None
    library, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # not SIGKILL: one of them tells why
        if os.getppid() != parent:
            os._exit(1)

    return ask
