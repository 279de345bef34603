"""An HTTP server that answers what a test wants: for what no healthy ledger ever sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from service.client.clock import boot_seconds


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Scripted:
    """`answers` by path: bytes of a JSON body, a status, or a function that writes what it likes."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def requests(self, path: str) -> list[Asked]:
        return [one for one in self.asked if one.path.partition("?")[0] == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while (asked := await _read(reader)) is not None:
                self.asked.append(asked)
                answer = self.answers.get(asked.path.partition("?")[0], 404)
                if callable(answer):
                    await answer(asked, writer)
                    return
                status, body = (answer, b"{}") if isinstance(answer, int) else (200, _encoded(answer))
                writer.write(head(status, f"Content-Length: {len(body)}\r\n") + body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


def _encoded(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = text.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, body)


def head(status: int, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{more}\r\n".encode()


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def body_of(lines: Callable[[], AsyncIterator[bytes]]) -> Answer:
    """An answer that ends with its connection."""

    async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200))
        with contextlib.suppress(ConnectionError):
            async for line in lines():
                writer.write(line + b"\n")
                await writer.drain()

    return answer


def position(ledger_seq: int, *, feed: str = "feed", behind_seconds: float = 0.0) -> bytes:
    """A message of the stream. `behind_seconds`: so long ago it was true."""
    now = boot_seconds() * 1000
    told = {"ledger_seq": ledger_seq, "feed": feed, "as_of_ms": now - behind_seconds * 1000, "now_ms": now}
    return b"id: %d\nevent: position\ndata: %b\n" % (ledger_seq, json.dumps(told).encode())


def message(data: bytes) -> bytes:
    return b"id: 1\ndata: %b\n" % data
