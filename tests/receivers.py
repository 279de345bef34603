"""Receivers of webhooks for tests: real sockets that answer, hang, drip or flood as they are told."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from tests.running import RECEIVERS_ADDRESS

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
Behaviour = Callable[[socket.socket, "Received"], None]


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.time)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


def signed_by(received: Received, secret: str) -> bool:
    """Whether one of the signatures is of this secret, as the specification says, written down anew."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = b".".join([received.id.encode(), received.headers["webhook-timestamp"].encode(), received.body])
    wanted = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    given = [part.split(",") for part in received.headers["webhook-signature"].split(" ")]
    return any(version == "v1" and hmac.compare_digest(wanted, signature) for version, signature in given)


class Receiver:
    """Listens until it is closed. `statuses`: what is answered first; then `behave`, which answers 204."""

    def __init__(self, behave: Behaviour | None = None, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.behave = behave or answer_ok
        self.statuses: list[int] = []
        self.received: list[Received] = []
        self.connections = 0
        self._tls = tls
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((RECEIVERS_ADDRESS, port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def url(self, path: str = "/hook", host: str = RECEIVERS_ADDRESS, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def ids(self) -> list[str]:
        return [one.id for one in list(self.received)]

    def seqs(self) -> set[int]:
        """The ledger sequences of the revocations that came."""
        return {int(one.event["id"]) for one in list(self.received) if one.event["type"].endswith(".revoked.v1")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float) -> bool:
        """Waits, and says whether the receiver is still wanted."""
        return not self._ended.wait(seconds)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._open.add(connection)
            try:
                with connection.makefile("rb") as stream:
                    while (received := _read(stream)) is not None:
                        self.received.append(received)
                        if self.statuses:
                            connection.sendall(status(self.statuses.pop(0)))
                        else:
                            self.behave(connection, received)
            finally:
                self._open.discard(connection)
                connection.close()


def _read(stream: Any) -> Received | None:
    line = stream.readline().decode("latin-1")
    if not line:
        return None
    headers = {}
    while (header := stream.readline().decode("latin-1").strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    return Received(line.split(" ")[1], headers, stream.read(int(headers.get("content-length", "0"))))


def status(code: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {code} Status", "Content-Length: 0", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer_ok(connection: socket.socket, _: Received) -> None:
    connection.sendall(OK)


def answering(data: bytes) -> Behaviour:
    return lambda connection, _: connection.sendall(data)


def closing(connection: socket.socket, _: Received) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def flooding(head: bytes) -> Behaviour:
    """Sends `head`, and then zeros for as long as somebody takes them."""

    def behave(connection: socket.socket, _: Received) -> None:
        connection.sendall(head)
        for _ in range(1024):
            connection.sendall(bytes(1024 * 1024))

    return behave


@contextlib.contextmanager
def hanging() -> Iterator[Receiver]:
    """A receiver that takes requests and says nothing."""
    receiver = Receiver()
    receiver.behave = lambda *_: _until_closed(receiver)
    with receiver:
        yield receiver


def _until_closed(receiver: Receiver) -> None:
    while receiver.pause(1.0):
        pass


@contextlib.contextmanager
def dripping(head: bytes) -> Iterator[Receiver]:
    """A receiver that answers a byte of `head` every tenth of a second, and goes on with zeros."""
    receiver = Receiver()

    def behave(connection: socket.socket, _: Received) -> None:
        for byte in head + bytes(10_000):
            if not receiver.pause(0.1):
                return
            connection.sendall(bytes([byte]))

    receiver.behave = behave
    with receiver:
        yield receiver
