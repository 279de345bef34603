"""Real nats-servers for tests of the log: start, provision, connect, kill, pause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path

from events import streams
from events.ledger import Append, Ledger
from events.server import EmbeddedServer
from events.streams import Connection, StreamLimits
from events.types import RefreshReplayed
from tests.golden.expected import AT

LIMITS = StreamLimits()
SECONDS_MAX = 30.0
_numbers = count(1)


@contextlib.asynccontextmanager
async def server_with_streams(directory: Path, limits: StreamLimits = LIMITS) -> AsyncIterator[EmbeddedServer]:
    """A nats-server of its own, as the service runs it, with all streams."""
    server = EmbeddedServer(directory, 0)
    await server.start()
    try:
        async with connected(server, "admin") as admin:
            await streams.provision(admin, limits)
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def connected(server: EmbeddedServer, role: str = "service") -> AsyncIterator[Connection]:
    nc = await streams.connect(server.url, server.creds(role), name=f"test-{role}")
    try:
        yield nc
    finally:
        await nc.close()


async def until(probe: Callable[[], object], *, seconds: float = SECONDS_MAX, what: str = "") -> None:
    """Returns when the probe is true. Raises: AssertionError when it is not in time."""
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or probe}")
        await asyncio.sleep(0.005)


async def kill(server: EmbeddedServer) -> None:
    """kill -9; returns when another process has taken its place."""
    killed = server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await until(lambda: server.pid not in {None, killed}, what="the server was started again")
    await server.wait_ready(SECONDS_MAX)


@contextlib.contextmanager
def paused(server: EmbeddedServer) -> Iterator[None]:
    """The server is there, holds its connections, and does nothing: SIGSTOP, and SIGCONT at the end."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def unique(prefix: str = "t") -> str:
    """A ledger subject that no other test uses."""
    return f"ledger.main.grant.{prefix}{os.getpid()}n{next(_numbers)}"


def event(number: int = 0) -> RefreshReplayed:
    """A small event with an id of its own."""
    return RefreshReplayed(
        id=f"{os.getpid():016x}{next(_numbers):016x}",
        occurred_at=AT,
        by="system",
        grant_id=f"grt_{number:032x}",
        token_id=f"tok_{number:032x}",
        answered=True,
    )


def first(subject: str, number: int = 0) -> Append:
    """An event that must be the first of its subject."""
    return Append(subject, event(number), 0)


async def ids_of(ledger: Ledger, subject: str) -> list[str]:
    return [recorded.event.id for recorded in await ledger.read(subject)]
