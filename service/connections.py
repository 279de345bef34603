"""The TCP connections of clients, which the HTTP server keeps to itself, found by the peer's address.

The server hands bytes of a stream over without waiting for whoever reads them. What a client leaves unread is given up
here, or it would keep its memory, and a server that is to stop, for as long as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_OPEN_FILES = Path("/proc/self/fd")
_TCP_USER_TIMEOUT = 18  # Linux; Python names it there only
_TCP_INFO_BYTES, _BYTES_ACKED = 128, 120  # so much of it, and where in it that count stands; Linux 4.1
_TOGETHER_SECONDS = 0.1

_seen: dict[str, int] = {}  # peers and their files, as of when they were last looked through
_coming: asyncio.Task[None] | None = None  # the look that has not begun


async def find(peer: str) -> None:
    """Returns once the peer's connection is known to what follows, unless there is none.

    All open files are looked through for it, so those that come at once are looked for together, in a thread.
    """
    global _coming  # noqa: PLW0603 - open files are the process's
    with _connection_of(peer) as connection:
        if connection is not None:
            return
    if _coming is None:
        _coming = asyncio.create_task(_look_soon())
    await asyncio.shield(_coming)


def limit_silence(peer: str, seconds: float) -> None:
    """Has the kernel reset the peer's connection when it takes nothing of what was sent for so long. RFC 5482 §3.

    0: as long as the system's own limits are.
    """
    with _connection_of(peer) as connection:
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(seconds * 1000))


def bytes_taken(peer: str) -> int | None:
    """How much of all that it was ever sent the peer has; None if there is no connection any more."""
    with _connection_of(peer) as connection:
        if connection is not None:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            taken: int = struct.unpack_from("Q", info, _BYTES_ACKED)[0]
            return taken
    return None


def cut(peer: str) -> None:
    """Ends the peer's connection, whatever it has not read yet."""
    with _connection_of(peer) as connection:
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _connection_of(peer: str) -> Iterator[socket.socket | None]:
    """The socket whose other end is `peer` (`192.0.2.1:4711`, `[2001:db8::1]:4711`), None if gone or not known."""
    found = _opened(peer)
    try:
        with contextlib.suppress(OSError):  # closed meanwhile
            yield found
    finally:
        if found is not None:
            found.detach()  # the server closes it


def _opened(peer: str) -> socket.socket | None:
    number = _seen.get(peer)
    if number is None:
        return None
    with contextlib.suppress(OSError):  # closed meanwhile
        one = socket.socket(fileno=number)
        if _peer_of(one) == peer:
            return one
        one.detach()
    return None


async def _look_soon() -> None:
    global _coming  # noqa: PLW0603 - as above
    try:
        await asyncio.sleep(_TOGETHER_SECONDS)
    finally:
        _coming = None  # whoever comes from now on may be missed by this look
    await asyncio.to_thread(_look)


def _look() -> None:
    """Notes whose each open connection is."""
    global _seen  # noqa: PLW0603 - as above
    found = {}
    for name in os.listdir(_OPEN_FILES) if _OPEN_FILES.exists() else ():  # noqa: PTH208 - only names are wanted
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            one = socket.socket(fileno=int(name))
            peer = _peer_of(one)
            one.detach()
            if peer is not None:
                found[peer] = int(name)
    _seen = found


def _peer_of(one: socket.socket) -> str | None:
    """None for what is no connection over TCP."""
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return None
    try:
        host, port = one.getpeername()[:2]
    except OSError:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
