"""A connection that a test can cut: bytes go through it both ways, or do not."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

_PART_BYTES = 65_536


class Relay:
    """Listens on a port of its own and passes everything on to `port`, unless it is cut or held."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._open:
                there, back = await asyncio.open_connection("127.0.0.1", self._to)
                try:
                    await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer))
                finally:
                    back.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(_PART_BYTES):
            await self._flowing.wait()
            sink.write(data)
            await sink.drain()
        with contextlib.suppress(OSError):
            sink.write_eof()

    async def cut(self) -> None:
        """Ends all connections and takes no new ones."""
        self._open = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def mend(self) -> None:
        self._open = True

    def hold(self) -> None:
        """Connections stay, and nothing comes through them."""
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()
