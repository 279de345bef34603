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


def limit_silence(peer: str, seconds: float) -> None:
    """Has the kernel reset the peer's connection when it takes nothing of what was sent for so long. RFC 5482 §3."""
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
    found = None
    for name in os.listdir(_OPEN_FILES) if _OPEN_FILES.exists() else ():  # noqa: PTH208 - only names are wanted
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            one = socket.socket(fileno=int(name))
            if _is(one, peer):
                found = one
                break
            one.detach()
    try:
        with contextlib.suppress(OSError):  # closed meanwhile
            yield found
    finally:
        if found is not None:
            found.detach()  # the server closes it


def _is(one: socket.socket, peer: str) -> bool:
    try:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            return False
        host, port = one.getpeername()[:2]
    except OSError:
        return False
    return peer in (f"{host}:{port}", f"[{host}]:{port}")
