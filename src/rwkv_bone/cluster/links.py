"""Connections between rank 0 and every other rank of a run."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rwkv_bone.cluster.process import how_it_ended
from rwkv_bone.errors import UserError
from rwkv_bone.locks import Process

if TYPE_CHECKING:
    from rwkv_bone.cluster.world import World

CONNECTING = 60.0  # seconds for them all, which have met a moment ago
MESSAGE = 1 << 20  # bytes; a longer one is none of ours

Message = dict[str, Any]


class Link:
    """A connection over which messages go, one JSON text a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self.closed = connection, False
        self.process = Process()  # the one at the other end
        self._buffer = b""
        self._lock = threading.Lock()
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[Message]:
        """The messages that have come; waits for some. ValueError for what is none."""
        data = self.socket.recv(1 << 16)
        self.closed = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MESSAGE:
            raise ValueError("a message without an end")
        for line in lines:
            yield json.loads(line)


def connect(world: World) -> dict[int, Link]:
    """rank -> the connection to it: of rank 0 to all others, of another to rank 0. UserError if one does not come."""
    assert world.store
    key, end = world.key("watch"), time.monotonic() + CONNECTING
    if world.rank:
        told = json.loads(world.get(key, "the watch", 0))
        link = Link(_reach(world, told["port"], end))
        link.process = Process(*told["process"])
        link.send({"token": told["token"], "rank": world.rank, "process": Process.current()})
        return {0: link}
    here = "127.0.0.1" if world.nodes == 1 else ""
    both = world.nodes > 1 and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server((here, 0), family=family, dualstack_ipv6=both, backlog=world.size) as server:
        token = secrets.token_hex(16)
        told = {"port": server.getsockname()[1], "token": token, "process": Process.current()}
        world.store.set(key, json.dumps(told))
        links: dict[int, Link] = {}
        try:
            _accept(world, server, token, end, links)
        except UserError as error:
            for link in links.values():
                with contextlib.suppress(OSError):
                    link.send({"end": 2, "text": f"error: {error}"})
            raise
        return links


def _reach(world: World, port: int, end: float) -> socket.socket:
    """A connection to rank 0."""
    while True:
        try:
            return socket.create_connection((world.address, port), timeout=5)
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{world.address}:{port}, where rank 0 watches over the others, cannot be reached "
                    f"({error.strerror or error}): a firewall must let these machines' connections pass"
                ) from None
            time.sleep(0.2)


def _accept(world: World, server: socket.socket, token: str, end: float, links: dict[int, Link]) -> None:
    """Add the connections of all other ranks to `links`."""
    server.settimeout(1)
    while missing := sorted(set(range(1, world.size)) - links.keys()):
        world.stop_if_failed()
        for rank, child in enumerate(world.children, 1):
            if rank in missing and child.poll() is not None:
                raise UserError(f"rank {rank} of {world.size} {how_it_ended(child.poll())}")
        if time.monotonic() > end:
            raise UserError(f"{world.name(missing[0])} has met the others, and then was not heard of again")
        # Whoever connects and is none of ours is sent away.
        with contextlib.suppress(OSError, ValueError):
            link = Link(server.accept()[0])
            link.socket.settimeout(5)
            hello = next(iter(link.receive()), {})
            if hello.get("token") == token:
                link.process = Process(*hello["process"])
                links[hello["rank"]] = link
            else:
                link.socket.close()
