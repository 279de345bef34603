"""A request as Granian hands it over, for tests of what reads it. Source: RSGI 1.5."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from granian.rsgi import ProtocolClosed
from msgspec import Struct

from service.incoming import Incoming

END, GONE = object(), object()  # after the last part of a body: it is complete, or the client went away


class Headers:
    """As the server's: a value that is not visible ASCII is there by name only."""

    def __init__(self, pairs: Iterable[tuple[str, str | bytes]]) -> None:
        self._pairs = [(name, value if isinstance(value, bytes) else value.encode()) for name, value in pairs]

    def items(self) -> list[tuple[str, str]]:
        return [(name, value.decode()) for name, value in self._pairs if value.isascii()]

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self.items() if key == name]

    def get(self, name: str, default: str | None = None) -> str | None:
        first = next((value for key, value in self._pairs if key == name), None)
        return first.decode() if first is not None and first.isascii() else default

    def __contains__(self, name: str) -> bool:
        return any(key == name for key, _ in self._pairs)


class Scope(Struct):
    """Where the request goes and comes from. `client` is address and port."""

    method: str
    path: str
    query_string: str
    client: str
    headers: Headers
    scheme: str = "http"
    http_version: str = "1.1"


class Answer(Struct):
    status: int
    headers: dict[str, str]
    body: bytes


class Protocol:
    """Gives these parts of a body, and then `END`, `GONE` or, for ever, nothing."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = list(parts)
        self._empty = 0
        self.answer: Answer | None = None

    async def _next(self) -> Any:
        if not self._parts:
            await asyncio.Event().wait()
        return self._parts.pop(0)

    async def __call__(self) -> bytes:
        data = b""
        while True:
            part = await self._next()
            if part is GONE:
                raise ProtocolClosed
            if part is END:
                return data
            data += part

    def response_bytes(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        assert self.answer is None
        self.answer = Answer(status, dict(headers), body)

    def __aiter__(self) -> Protocol:
        return self

    async def __anext__(self) -> bytes:
        if self._empty:
            self._empty -= 1
            if not self._empty:
                raise StopAsyncIteration
            return b""
        part = await self._next()
        if part is not END and part is not GONE:
            data: bytes = part
            return data
        self._empty = 2 if part is GONE else 1
        return b""


def request(
    *headers: tuple[str, str | bytes],
    body: Iterable[Any] = (END,),
    method: str = "POST",
    path: str = "/v1/tokens",
    query: str = "",
    peer: str | None = "198.51.100.7",
) -> Incoming:
    """A request with these headers, whose body comes in these parts."""
    client = "" if peer is None else f"[{peer}]:4711" if ":" in peer else f"{peer}:4711"
    return Incoming(Scope(method, path, query, client, Headers(headers)), Protocol(body))


def answer_to(incoming: Incoming) -> Answer:
    """What was answered."""
    answer = incoming._protocol.answer
    assert isinstance(answer, Answer)
    return answer
