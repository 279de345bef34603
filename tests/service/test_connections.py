"""Connections of a server, found by their peers among the process's open files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from service import connections
from tests.logs import until

MANY = 200
_TCP_USER_TIMEOUT = 18


@contextlib.contextmanager
def connected(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Both ends of connections: the client's and the server's."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=count))
        pairs = []
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(listening.getsockname()))
            pairs.append((client, stack.enter_context(listening.accept()[0])))
        yield pairs


def name_of(client: socket.socket) -> str:
    host, port = client.getsockname()
    return f"{host}:{port}"


async def test_connections_that_come_at_once_are_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look for each through all open files would hold up everybody when many followers come again."""
    looks, listdir = 0, os.listdir

    def counted(path: Any) -> list[str]:
        nonlocal looks
        looks += 1
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    with connected(MANY) as pairs:
        names = [name_of(client) for client, _ in pairs]
        await asyncio.gather(*(connections.find(name) for name in names))
        for name in names:
            connections.limit_silence(name, 20)
        assert {server.getsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT) for _, server in pairs} == {20_000}
        await asyncio.gather(*(connections.find(name) for name in names))  # known by now
        for name in names:
            connections.limit_silence(name, 0)
    for name in names:  # gone, and looked for no more
        connections.cut(name)
    assert looks == 1


async def test_connection_tells_what_its_peer_has_taken_and_is_cut() -> None:
    with connected(2) as [(client, server), (other, _)]:
        name = name_of(client)
        assert connections.bytes_taken(name) is None
        await connections.find(name)
        before = connections.bytes_taken(name)
        assert before is not None
        server.sendall(b"x" * 1000)
        await until(lambda: connections.bytes_taken(name) == before + 1000)
        connections.cut(name)
        assert client.recv(2000) == b"x" * 1000
        assert client.recv(1) == b""
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.recv(1)


async def test_file_that_is_another_connection_by_now_is_not_taken_for_the_old_one() -> None:
    with connected(1) as [(client, _)]:
        name = name_of(client)
        await connections.find(name)
    with connected(1) as [(_, server)]:
        connections.limit_silence(name, 20)
        assert server.getsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT) == 0
