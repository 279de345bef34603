"""Requests over ASGI, in the shape of RSGI, for where proxies are trusted.

RSGI hands over no header value that is not ASCII, and no trace of it. So whoever sent one could hide the line of
X-Forwarded-For to which a proxy appended the true address, and pass for another.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]  # it has no stub

_PART_BYTES = 256 * 1024


class Headers:
    """All of them, as Latin-1 (RFC 9110 §5.5)."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in raw]
        self._first = dict(reversed(self._pairs))

    def get(self, name: str, default: str | None = None) -> str | None:
        return self._first.get(name, default)

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]

    def items(self) -> list[tuple[str, str]]:
        return self._pairs

    def __contains__(self, name: str) -> bool:
        return name in self._first


class Scope:
    """Where a request goes and comes from."""

    def __init__(self, scope: Any) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: str = scope["query_string"].decode("latin-1")
        self.http_version: str = scope["http_version"]
        self.scheme: str = scope["scheme"]
        self.headers = Headers(scope["headers"])
        host, port = scope.get("client") or ("", "")
        self.client = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Stream:
    """Sends parts of an answer at once."""

    def __init__(self, status: int, headers: Any, send: Any) -> None:
        self._start: Any = {"type": "http.response.start", "status": status, "headers": _raw(headers)}
        self._send = send

    async def send_bytes(self, part: bytes) -> None:
        await self._begin()
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        await self._begin()
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)


class Protocol:
    """Gives the body, and keeps the answer until it is sent; a stream is sent as its parts come."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive = receive
        self._send = send
        self._more = True
        self._answer: tuple[int, Any, bytes | Path] | Stream | None = None

    async def __call__(self) -> bytes:
        return b"".join([part async for part in self])

    def __aiter__(self) -> Protocol:
        return self

    async def __anext__(self) -> bytes:
        if not self._more:
            raise StopAsyncIteration
        message = await self._receive()
        if message["type"] != "http.request":
            raise ProtocolClosed
        self._more = message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    async def client_disconnect(self) -> None:
        """Ends when the client has hung up. Only after the body was read, of which it would take parts."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def response_bytes(self, status: int, headers: Any, body: bytes) -> None:
        self._answer = (status, headers, body)

    def response_file(self, status: int, headers: Any, path: str) -> None:
        self._answer = (status, headers, Path(path))

    def response_stream(self, status: int, headers: Any) -> Stream:
        self._answer = Stream(status, headers, self._send)
        return self._answer

    async def send_answer(self) -> None:
        """Sends what was answered, or the end of a stream."""
        send = self._send
        assert self._answer is not None
        if isinstance(self._answer, Stream):
            await self._answer.end()
            return
        status, headers, body = self._answer
        raw = _raw(headers)
        if isinstance(body, Path):
            await send({"type": "http.response.start", "status": status, "headers": raw})
            with await asyncio.to_thread(body.open, "rb") as file:
                while part := await asyncio.to_thread(file.read, _PART_BYTES):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        raw.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def _raw(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers]
