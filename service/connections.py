"""The TCP connections of clients, which the HTTP server keeps to itself, found by the peer's address.

The server hands bytes of a stream over without waiting for whoever reads them. What a client leaves unread is given up
here, or it would keep its memory, and a server that is to stop, for as long as it likes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_OPEN_FILES = Path("/proc/self/fd")
_TCP_USER_TIMEOUT = 18  # Linux; Python names it there only


_seen: dict[str, int] = {}  # peers and their files, as of when they were last looked through


def limit_silence(peer: str, seconds: float) -> None:
    """Has the kernel reset the peer's connection when it takes nothing of what was sent for so long. RFC 5482 §3.

    0: as long as the system's own limits are.
    """
    with _connection_of(peer) as connection:
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, int(seconds * 1000))


def cut(peer: str) -> None:
    """Ends the peer's connection, whatever it has not read yet."""
    with _connection_of(peer) as connection:
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _connection_of(peer: str) -> Iterator[socket.socket | None]:
    """The socket whose other end is `peer` (`192.0.2.1:4711`, `[2001:db8::1]:4711`), None if there is none any more."""
    found = _opened(peer)
    if found is None:
        _look()
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


def _look() -> None:
    """Notes whose each open connection is: all at once, since many come at once when they come again."""
    _seen.clear()
    if not _OPEN_FILES.exists():
        return
    for name in os.listdir(_OPEN_FILES):  # noqa: PTH208 - only names are wanted
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            one = socket.socket(fileno=int(name))
            peer = _peer_of(one)
            one.detach()
            if peer is not None:
                _seen[peer] = int(name)


def _peer_of(one: socket.socket) -> str | None:
    """None for what is no connection over TCP."""
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return None
    try:
        host, port = one.getpeername()[:2]
    except OSError:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
