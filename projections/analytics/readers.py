"""Answers what `projections/reading.py` asks: publishes, runs the query in a process of its own, and streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import duckdb
import msgspec
import nats.errors
import structlog
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.streams import LEDGER, USAGE
from projections.analytics.publication import Publication, Publisher
from projections.analytics.store import Analytics
from projections.reading import (
    AHEAD_MAX,
    ALIVE,
    BEGUN,
    DATA,
    ENDED,
    GONE,
    HEAD,
    REFUSED,
    SILENT_SECONDS_MAX,
    SUBJECT,
    TAKEN_SUBJECT,
    ReadBegun,
    ReadEnded,
    ReadRequest,
    Refusal,
)
from projections.sandbox import exports, process, views
from projections.sandbox.process import Job, QueryRefused

log = structlog.get_logger()

EXPORT_SECONDS_MAX = 3_600.0
_ALIVE_SECONDS = SILENT_SECONDS_MAX / 4
_QUEUE = "analytics"
_PLACE_SECONDS_MAX = 2.0  # that a query waits for one before it to end
CatchUp = Callable[[str], Awaitable[None]]


class ReadLimits(Struct, frozen=True, kw_only=True):
    """Of one query each, but `at_once_max`: queries, and beside them as many exports."""

    seconds_max: float = 20.0
    memory_bytes_max: int = 512 * 1024**2
    answer_bytes_max: int = 16 * 1024**2
    at_once_max: int = 2
    threads: int = 2


class Readers:
    """All readings under way. `catch_up` waits until a stream's present end is folded in, and not for long."""

    def __init__(self, nc: Client, analytics: Analytics, catch_up: CatchUp, limits: ReadLimits) -> None:
        self._nc = nc
        self._analytics = analytics
        self._catch_up = catch_up
        self._limits = limits
        self._publisher = Publisher(analytics, published_directory(analytics.path))
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = {what: asyncio.Semaphore(limits.at_once_max) for what in ("query", "export")}
        self._subscription: Any = None

    async def start(self) -> None:
        self._subscription = await self._nc.subscribe(SUBJECT, queue=_QUEUE, cb=self._begin)

    async def stop(self) -> None:
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _begin(self, message: Msg) -> None:
        # The client hands over one message at a time; none may hold up the next.
        task = asyncio.create_task(self._read(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, message: Msg) -> None:
        try:
            request = msgspec.json.decode(message.data, type=ReadRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            await _Answer(self._nc, message.reply, "").refuse(QueryRefused("sql_invalid", str(error)))
            return
        what = "query" if request.export is None else "export"
        answer = _Answer(self._nc, message.reply, request.read_id)
        try:
            # In this order: who waits for a place may go away meanwhile.
            async with answer, self._place(what):
                await self._answer(request, answer)
        except QueryRefused as error:
            await answer.refuse(error)
        except _Gone:
            pass
        except (duckdb.Error, OSError, ValueError) as error:
            log.exception("reading_failed", what=what)
            self._analytics.report(error)
            await answer.refuse(
                QueryRefused("unavailable", "the analytics process could not publish; its log says why")
            )

    @contextlib.asynccontextmanager
    async def _place(self, what: str) -> AsyncIterator[None]:
        """Raises: QueryRefused."""
        try:
            async with asyncio.timeout(_PLACE_SECONDS_MAX):
                await self._places[what].acquire()
        except TimeoutError:
            raise QueryRefused("busy", f"{self._limits.at_once_max} of these are running already") from None
        try:
            yield
        finally:
            self._places[what].release()

    async def _answer(self, request: ReadRequest, answer: _Answer) -> None:
        await asyncio.gather(self._catch_up(LEDGER), self._catch_up(USAGE))
        publication = await self._published()
        try:
            job, parameters = self._job(request, publication)
            async with contextlib.aclosing(process.run(job)) as frames:
                async for frame in frames:
                    match frame.kind:
                        case "H":
                            begun = msgspec.json.decode(frame.data, type=dict[str, list[str]])
                            told = ReadBegun(
                                columns=begun["columns"],
                                types=begun["types"],
                                ledger_seq=publication.ledger_seq,
                                usage_seq=publication.usage_seq,
                                statement=job.sql,
                                parameters=parameters,
                            )
                            await answer.send(BEGUN, msgspec.json.encode(told))
                        case "D":
                            await answer.send(DATA, frame.data)
                        case _:
                            await answer.send(ENDED, msgspec.json.encode(_ended(request, frame.data)))
        finally:
            self._publisher.release(publication)

    async def _published(self) -> Publication:
        future = asyncio.get_running_loop().run_in_executor(None, self._publisher.publish)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread goes on, and nobody will read what it publishes.
            future.add_done_callback(self._give_back)
            raise

    def _give_back(self, done: asyncio.Future[Publication]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._publisher.release(done.result())

    def _job(self, request: ReadRequest, publication: Publication) -> tuple[Job, dict[str, Any]]:
        limits = self._limits
        directory = published_directory(self._analytics.path)
        common: dict[str, Any] = {
            "format": request.format,
            "directory": str(directory),
            "files": sorted({path.name for paths in publication.files.values() for path in paths}),
            "views": views.statements(publication.files),
            "names": views.VIEWS,
            "memory_bytes_max": limits.memory_bytes_max,
            "threads": limits.threads,
        }
        if request.export is None:
            job = Job(
                sql=request.sql or "",
                parameters=request.parameters,
                limit=request.limit,
                bytes_max=limits.answer_bytes_max,
                seconds_max=limits.seconds_max,
                cpu_seconds_max=limits.seconds_max * limits.threads + 5,
                **common,
            )
            return job, {}
        sql, parameters = exports.export_sql(request.export)
        job = Job(
            sql=sql,
            parameters=parameters or None,
            limit=None,
            bytes_max=None,
            seconds_max=EXPORT_SECONDS_MAX,
            cpu_seconds_max=EXPORT_SECONDS_MAX * limits.threads,
            trusted=True,
            sequence=exports.DATASETS[request.export.dataset].sequence,
            **common,
        )
        return job, parameters


def published_directory(store: Path) -> Path:
    """Where the files are that queries read."""
    # Absolute: the process that reads it works elsewhere.
    return store.absolute().with_name(store.name + ".published")


def _ended(request: ReadRequest, data: bytes) -> ReadEnded:
    told = msgspec.json.decode(data)
    ends = (told["first"], told["last"])
    stream = exports.DATASETS[request.export.dataset].stream if request.export is not None else None
    return ReadEnded(
        rows=told["rows"],
        truncated=told["truncated"],
        ledger_range=ends if stream == LEDGER else (None, None),
        usage_range=ends if stream == USAGE else (None, None),
    )


class _Gone(Exception):
    """Nobody reads the answer any more."""


class _Answer:
    """Numbered messages to an inbox, only a few more than were taken, and a sign of life while there is nothing."""

    def __init__(self, nc: Client, inbox: str, read_id: str) -> None:
        self._nc = nc
        self._inbox = inbox
        self._read_id = read_id
        self._number = 0
        self._taken = 0
        self._gone = False
        self._changed = asyncio.Event()
        self._subscription: Any = None
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if not self._read_id.isalnum():
            raise QueryRefused("sql_invalid", "read_id must be letters and digits")
        subject = TAKEN_SUBJECT.format(read_id=self._read_id)
        self._subscription = await self._nc.subscribe(subject, cb=self._note)
        self._beating = asyncio.create_task(self._beat(asyncio.current_task()))
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._beating is not None:
            self._beating.cancel()
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._subscription.unsubscribe()

    async def _note(self, message: Msg) -> None:
        if message.data == GONE:
            self._gone = True
        elif message.data.isdigit():
            self._taken = max(self._taken, int(message.data[:12]))
        self._changed.set()

    async def _beat(self, reading: asyncio.Task[Any] | None) -> None:
        """Says that the query still runs; ends it when nobody reads any more."""
        while not self._gone:
            with contextlib.suppress(TimeoutError, nats.errors.Error, OSError):
                async with asyncio.timeout(_ALIVE_SECONDS):
                    while not self._gone:
                        self._changed.clear()
                        await self._changed.wait()
            if not self._gone:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await self._nc.publish(self._inbox, HEAD.pack(ALIVE, 0))
        if reading is not None:
            reading.cancel()

    async def send(self, kind: bytes, payload: bytes) -> None:
        """Raises: _Gone."""
        deadline = asyncio.get_running_loop().time() + SILENT_SECONDS_MAX
        while self._number - self._taken >= AHEAD_MAX:
            if asyncio.get_running_loop().time() > deadline:
                raise _Gone
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    self._changed.clear()
                    await self._changed.wait()
        try:
            await self._nc.publish(self._inbox, HEAD.pack(kind, self._number) + payload)
        except (nats.errors.Error, OSError) as error:
            raise _Gone from error
        self._number += 1

    async def refuse(self, error: QueryRefused) -> None:
        if not self._inbox:
            return
        data = msgspec.json.encode(Refusal(error.code, str(error), error.fix))
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._nc.publish(self._inbox, HEAD.pack(REFUSED, self._number) + data)
