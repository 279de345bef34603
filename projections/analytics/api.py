"""What the analytics process answers over NATS (`nats.micro`, service `analytics`); `projections/asking.py` asks it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

import duckdb
import msgspec
import nats.errors
import nats.micro
import structlog
from msgspec import UNSET, Struct, UnsetType
from nats.aio.client import Client
from nats.micro.request import Request, ServiceError

from events.errors import LedgerUnavailable
from events.streams import LEDGER, USAGE, stream_state
from projections.analytics.blast_radius import Radius
from projections.analytics.found import evidence, finding_facts, findings_sql
from projections.analytics.readers import Readers, ReadLimits
from projections.analytics.rows import uuid_hex
from projections.analytics.schema import SCHEMA_VERSION
from projections.analytics.store import STREAMS, Analytics, set_aside_files
from projections.analytics.tokens import scopes_sql, scopes_used, token_usage, tokens_sql
from projections.analytics.usage import usage_answer, usage_sql
from projections.asking import (
    QUERY_SECONDS_MAX,
    SERVICE,
    SUBJECTS,
    AuditEvent,
    AuditUse,
    EventsAnswer,
    EventsRequest,
    StatusAnswer,
    StatusRequest,
    StreamStatus,
    TokenAnswer,
    TokenFacts,
    TokenRequest,
    UsageRequest,
    UsageSql,
    UsesAnswer,
    UsesRequest,
)
from projections.asking_findings import EvidenceAnswer, EvidenceRequest, FindingsAnswer, FindingsRequest
from projections.asking_tokens import (
    NamedSql,
    RadiusAnswer,
    RadiusReport,
    RadiusRequest,
    RadiusUse,
    ScopesAnswer,
    ScopesRequest,
    TokensAnswer,
    TokensRequest,
)

log = structlog.get_logger()

_WAIT_SECONDS_MAX = 2.0
_REQUESTS_MAX = 64  # at once; more are told to come back
_THREADS = 2
_REPLY_MARGIN_BYTES = 16 * 1024  # headers and what stands around the items

A = TypeVar("A", bound=Struct)
T = TypeVar("T")


Others = Mapping[type[Struct], Callable[[Any], Awaitable[Struct]]]


async def serve_queries(
    nc: Client, analytics: Analytics, others: Others | None = None, limits: ReadLimits | None = None
) -> None:
    """Answers until it is cancelled; `others`: what else in this process answers which requests.

    `limits` are those of auditors' SQL.

    Raises: whatever stopped the analytics' writer.
    """
    queries = _Queries(nc, analytics)
    readers = Readers(nc, analytics, queries.catch_up, limits or ReadLimits())
    try:
        service = await nats.micro.add_service(
            nc, name=SERVICE, version=f"{SCHEMA_VERSION}.0.0", description="audit queries of the token ledger"
        )
    except BaseException:
        queries.close()
        raise
    try:
        group = service.add_group(name=SERVICE)
        for name, handler in (queries.handlers() | queries.handlers_of(others or {})).items():
            await group.add_endpoint(name=name, handler=handler)
        await readers.start()
        await nc.flush()
        while True:
            analytics.check()
            await queries.changed()
    finally:
        with contextlib.suppress(nats.errors.Error, OSError):
            await service.stop()
        await readers.stop()
        await queries.stop()


class _Queries:
    def __init__(self, nc: Client, analytics: Analytics) -> None:
        self._nc = nc
        self._analytics = analytics
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="analytics-query")
        self._next: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        analytics.listeners.append(self._tell)

    def handlers(self) -> dict[str, Callable[[Request], Awaitable[None]]]:
        return {
            "events": self._handler(EventsRequest, self._events),
            "uses": self._handler(UsesRequest, self._uses),
            "tokens": self._handler(TokenRequest, self._token),
            "usage": self._handler(UsageRequest, self._usage),
            "token_usage": self._handler(TokensRequest, self._token_usage),
            "scopes": self._handler(ScopesRequest, self._scopes),
            "blast_radius": self._handler(RadiusRequest, self._blast_radius),
            "findings": self._handler(FindingsRequest, self._findings),
            "evidence": self._handler(EvidenceRequest, self._evidence),
            "status": self._handler(StatusRequest, self._status),
        }

    def handlers_of(self, others: Others) -> dict[str, Callable[[Request], Awaitable[None]]]:
        return {
            SUBJECTS[kind].removeprefix(f"{SERVICE}."): self._handler(kind, answer) for kind, answer in others.items()
        }

    def close(self) -> None:
        if self._tell in self._analytics.listeners:
            self._analytics.listeners.remove(self._tell)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.close()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closing
            self._loop.call_soon_threadsafe(self._tick)

    def _tick(self) -> None:
        present, self._next = self._next, self._loop.create_future()
        present.set_result(None)

    async def changed(self) -> None:
        """Returns after the next commit or failure."""
        await asyncio.shield(self._next)

    def _handler(
        self, kind: type[T], answer: Callable[[T], Awaitable[Struct | bytes]]
    ) -> Callable[[Request], Awaitable[None]]:
        decoder = msgspec.json.Decoder(kind)

        async def respond(request: Request) -> None:
            try:
                reply = await answer(decoder.decode(request.data or b"{}"))
                await request.respond(reply if isinstance(reply, bytes) else msgspec.json.encode(reply))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                await _refuse(request, ServiceError("400", str(error)))
            except ServiceError as error:
                await _refuse(request, error)
            except Exception as error:
                log.exception("analytics_query_failed", subject=request.subject)
                self._analytics.report(error)
                await _refuse(request, ServiceError("500", "the query failed; the analytics process logged why"))

        async def handle(request: Request) -> None:
            # The client hands over one request of an endpoint at a time; none may hold up the next.
            if len(self._tasks) >= _REQUESTS_MAX:
                await _refuse(request, ServiceError("503", f"{_REQUESTS_MAX} queries are already being answered"))
                return
            task = asyncio.create_task(respond(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return handle

    async def _query(self, query: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """Runs the query in one transaction of a thread, so that rows and positions belong together."""
        cursor = self._analytics.cursor()

        def run() -> T:
            try:
                cursor.begin()
                try:
                    return query(cursor)
                except duckdb.OutOfMemoryException as error:
                    raise ServiceError("504", "the query took too much memory; ask for less") from error
                finally:
                    with contextlib.suppress(duckdb.Error):
                        cursor.rollback()
            finally:
                cursor.close()

        future = self._loop.run_in_executor(self._threads, run)
        try:
            return await asyncio.wait_for(asyncio.shield(future), QUERY_SECONDS_MAX)
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.cancel():  # it waited for a thread
                cursor.close()
            else:
                future.add_done_callback(lambda done: done.exception())  # nobody else will look
                with contextlib.suppress(duckdb.Error):
                    cursor.interrupt()
            if isinstance(error, TimeoutError):
                raise ServiceError("504", f"the query took over {QUERY_SECONDS_MAX:g} s; ask for less") from error
            raise

    async def _reach(self, stream: str, seq: int) -> None:
        if self._analytics.position(stream) >= seq:
            return
        self._analytics.hasten(stream, seq)
        deadline = self._loop.time() + _WAIT_SECONDS_MAX
        with contextlib.suppress(TimeoutError):
            while self._analytics.position(stream) < seq:
                await asyncio.wait_for(self.changed(), deadline - self._loop.time())
        position = self._analytics.position(stream)
        if position < seq:
            raise ServiceError("503", f"analytics has reached {stream} {position} and not yet {seq}; retry")

    async def catch_up(self, stream: str) -> None:
        """Waits for what is recorded by now, and not for long."""
        with contextlib.suppress(ServiceError):
            await self._reach(stream, await self._end(stream))

    async def _events(self, request: EventsRequest) -> EventsAnswer:
        await self._reach(LEDGER, request.min_seq)
        sql, parameters = _events_sql(request)

        def read(cursor: duckdb.DuckDBPyConnection) -> tuple[list[AuditEvent], int]:
            position = _position(cursor, LEDGER)
            return [_audit_event(row) for row in cursor.execute(sql, parameters).fetchall()], position

        found, position = await self._query(read)
        items = self._page(found, request.limit)
        more = len(items) < len(found)
        return EventsAnswer(items=items, next_after_seq=items[-1].ledger_seq if more else None, position=position)

    async def _uses(self, request: UsesRequest) -> UsesAnswer:
        occurred_at, block_seq, use_index = _parse_cursor(request.cursor)
        await self._reach(USAGE, await self._end(USAGE))

        def read(cursor: duckdb.DuckDBPyConnection) -> tuple[list[AuditUse], int]:
            rows = cursor.execute(
                _SELECT_USES,
                [uuid_hex(request.token_id), occurred_at, occurred_at, block_seq, use_index, request.limit + 1],
            ).fetchall()
            return [_audit_use(row) for row in rows], _position(cursor, USAGE)

        found, position = await self._query(read)
        items = self._page(found, request.limit)
        more = len(items) < len(found)
        return UsesAnswer(items=items, next_cursor=_cursor(items[-1]) if more else None, usage_position=position)

    async def _token(self, request: TokenRequest) -> TokenAnswer:
        await self._reach(LEDGER, request.min_seq)

        def read(cursor: duckdb.DuckDBPyConnection) -> tuple[TokenFacts | None, int]:
            row = cursor.execute(_SELECT_ISSUED, [uuid_hex(request.token_id)]).fetchone()
            return (_token_facts(row) if row else None), _position(cursor, LEDGER)

        token, position = await self._query(read)
        if token is None:
            raise ServiceError("404", f"no token {request.token_id} was issued until sequence {position}")
        return TokenAnswer(token=token, position=position)

    async def _usage(self, request: UsageRequest) -> bytes:
        sql, parameters = usage_sql(request)
        rows, ledger_seq, usage_seq = await self._at(lambda cursor: cursor.execute(sql, parameters).fetchall())
        answer = usage_answer(request, rows, ledger_seq=ledger_seq, usage_seq=usage_seq)
        return self._encoded(answer, "ask for fewer groups or intervals")

    async def _token_usage(self, request: TokensRequest) -> TokensAnswer:
        sql, parameters = tokens_sql(request)
        rows, ledger_seq, usage_seq = await self._at(lambda cursor: cursor.execute(sql, parameters).fetchall())
        items = self._page([token_usage(row) for row in rows], request.limit)
        return TokensAnswer(
            items=items,
            more=len(items) < len(rows),
            ledger_seq=ledger_seq,
            usage_seq=usage_seq,
            sql=UsageSql(sql, parameters) if request.explain else UNSET,
        )

    async def _scopes(self, request: ScopesRequest) -> ScopesAnswer:
        sql, parameters = scopes_sql(request)
        rows, ledger_seq, usage_seq = await self._at(lambda cursor: cursor.execute(sql, parameters).fetchall())
        found = scopes_used(request, rows)
        items = self._page(found, request.limit)
        return ScopesAnswer(
            items=items,
            more=len(items) < len(found),
            ledger_seq=ledger_seq,
            usage_seq=usage_seq,
            sql=UsageSql(sql, parameters) if request.explain else UNSET,
        )

    async def _blast_radius(self, request: RadiusRequest) -> bytes:
        def read(cursor: duckdb.DuckDBPyConnection) -> tuple[RadiusReport | UnsetType, list[RadiusUse], list[NamedSql]]:
            radius = Radius(cursor, request)
            if not radius.found():
                raise ServiceError("404", "nothing of the kind was issued")
            report = radius.report() if request.after is None else UNSET
            return report, radius.uses(), radius.ran

        (report, found, ran), ledger_seq, usage_seq = await self._at(read)
        answer = RadiusAnswer(
            report=report,
            more=False,
            ledger_seq=ledger_seq,
            usage_seq=usage_seq,
            sql=ran if request.explain else UNSET,
        )
        around = self._encoded(answer, "ask for interval=day, or for a token or grant instead of a client")
        items = self._page(found, request.limit, beside=len(around))
        return msgspec.json.encode(msgspec.structs.replace(answer, items=items, more=len(items) < len(found)))

    async def _findings(self, request: FindingsRequest) -> FindingsAnswer:
        await self._reach(LEDGER, request.min_seq)
        sql, parameters = findings_sql(request)
        rows, ledger_seq, _ = await self._at(lambda cursor: cursor.execute(sql, parameters).fetchall())
        items = self._page([finding_facts(row) for row in rows], request.limit)
        return FindingsAnswer(items=items, more=len(items) < len(rows), ledger_seq=ledger_seq)

    async def _evidence(self, request: EvidenceRequest) -> EvidenceAnswer:
        items, ledger_seq, usage_seq = await self._at(lambda cursor: evidence(cursor, request.places))
        return EvidenceAnswer(items=items, ledger_seq=ledger_seq, usage_seq=usage_seq)

    async def _at(self, read: Callable[[duckdb.DuckDBPyConnection], T]) -> tuple[T, int, int]:
        """What is read, after analytics has caught up or nearly so, and where in LEDGER and USAGE it is true."""
        await asyncio.gather(self.catch_up(LEDGER), self.catch_up(USAGE))
        return await self._query(lambda cursor: (read(cursor), _position(cursor, LEDGER), _position(cursor, USAGE)))

    def _encoded(self, answer: Struct, fix: str) -> bytes:
        """Raises: ServiceError if no message may be as large."""
        encoded = msgspec.json.encode(answer)
        if len(encoded) > self._nc.max_payload - _REPLY_MARGIN_BYTES:
            raise ServiceError("400", f"the answer is larger than a message may be; {fix}")
        return encoded

    async def _status(self, _: StatusRequest) -> StatusAnswer:
        def read(cursor: duckdb.DuckDBPyConnection) -> list[tuple[str, int, datetime | None]]:
            return cursor.execute("SELECT stream, seq, recorded_at FROM positions").fetchall()

        positions = {stream: (seq, moment) for stream, seq, moment in await self._query(read)}
        streams = []
        for stream in STREAMS:
            position, moment = positions[stream]
            end = None
            with contextlib.suppress(ServiceError):
                end = await self._end(stream)
            streams.append(
                StreamStatus(
                    stream=stream,
                    position=position,
                    recorded_at=_utc(moment),
                    end=end,
                    lag=None if end is None else max(0, end - position),
                )
            )
        return StatusAnswer(
            version=SCHEMA_VERSION,
            streams=streams,
            file_bytes=self._analytics.file_bytes(),
            set_aside=[file.name for file in set_aside_files(self._analytics.path)],
        )

    async def _end(self, stream: str) -> int:
        """The last sequence that can still be had; 0 when retention has taken all."""
        try:
            state = await stream_state(self._nc, stream, seconds=2)
        except LedgerUnavailable as error:
            raise ServiceError("503", str(error)) from error
        return int(state["last_seq"]) if state["messages"] else 0

    def _page(self, found: list[A], limit: int, *, beside: int = 0) -> list[A]:
        """The items that fit into the limit and, with `beside` bytes, into a message; at least one if there is any."""
        room = self._nc.max_payload - _REPLY_MARGIN_BYTES - beside
        for index, item in enumerate(found[:limit]):
            room -= len(msgspec.json.encode(item)) + 1
            if room < 0 and index > 0:
                return found[:index]
        return found[:limit]


async def _refuse(request: Request, error: ServiceError) -> None:
    with contextlib.suppress(nats.errors.Error, ValueError):  # the connection is gone, or nobody wants an answer
        await request.respond_error(error.code, " ".join(error.description.split()))


def _events_sql(request: EventsRequest) -> tuple[str, list[Any]]:
    conditions, parameters = ["ledger_seq > ?"], [request.after_seq]
    given: list[tuple[str, Any]] = [
        ("type = ?", request.type),
        ("subject = ?", request.subject),
        ("client_id = ?", request.client_id),
        ("list_contains(token_ids, ?::UUID)", request.token_id and uuid_hex(request.token_id)),
        ("grant_id = ?::UUID", request.grant_id and uuid_hex(request.grant_id)),
        ("recorded_at >= ?", request.from_ and _naive(request.from_)),
        ("recorded_at < ?", request.to and _naive(request.to)),
    ]
    for condition, value in given:
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    sql = (
        "SELECT ledger_seq, recorded_at, occurred_at, type, done_by, request_id, subject, client_id, user_id, "  # noqa: S608 - constants
        f"grant_id, token_ids, body FROM events WHERE {' AND '.join(conditions)} "
        "ORDER BY ledger_seq LIMIT ?"
    )
    return sql, [*parameters, request.limit + 1]


# In two steps: a token's uses lie in many places, and whole rows are read only of those that the page shows.
_SELECT_USES = """
WITH page AS (
    SELECT block_seq, use_index FROM uses
    WHERE token_no = (SELECT token_no FROM used_tokens WHERE token_id = ?::UUID)
        AND occurred_at >= ? AND (occurred_at, block_seq, use_index) > (?, ?, ?)
    ORDER BY occurred_at, block_seq, use_index LIMIT ?
)
SELECT occurred_at, recorded_at, block_seq, use_index, outcome, endpoint, caller, scope, audience,
    ip, user_agent, method, path
FROM uses JOIN page USING (block_seq, use_index) JOIN origins USING (origin_no)
ORDER BY occurred_at, block_seq, use_index
"""

_SELECT_ISSUED = """
SELECT token_id, grant_id, ledger_seq, grant_seq, kind, client_id, subject, scope, audience, issued_at, expires_at,
    spent_at, ended_at, reason, ended_seq, kid, rotated_from
FROM tokens WHERE token_id = ?::UUID
"""


def _position(cursor: duckdb.DuckDBPyConnection, stream: str) -> int:
    row = cursor.execute("SELECT seq FROM positions WHERE stream = ?", [stream]).fetchone()
    assert row is not None
    return int(row[0])


def _audit_event(row: tuple[Any, ...]) -> AuditEvent:
    seq, recorded_at, occurred_at, kind, by, request_id, subject, client_id, user_id, grant_id, token_ids, body = row
    return AuditEvent(
        ledger_seq=seq,
        recorded_at=_zoned(recorded_at),
        occurred_at=_zoned(occurred_at),
        type=kind,
        by=by,
        request_id=request_id,
        subject=subject,
        client_id=client_id,
        user_id=user_id,
        grant_id=grant_id and f"grt_{grant_id.hex}",
        token_ids=tuple(f"tok_{token_id.hex}" for token_id in token_ids),
        body=msgspec.Raw(body.encode()),
    )


def _audit_use(row: tuple[Any, ...]) -> AuditUse:
    names = AuditUse.__struct_fields__
    fields = dict(zip(names, row, strict=True))
    return AuditUse(**fields | {"occurred_at": _zoned(row[0]), "recorded_at": _zoned(row[1])})


def _token_facts(row: tuple[Any, ...]) -> TokenFacts:
    fields = dict(zip(TokenFacts.__struct_fields__, row, strict=True))
    for name in ("issued_at", "expires_at", "spent_at", "ended_at"):
        fields[name] = _utc(fields[name])
    fields["token_id"] = f"tok_{fields['token_id'].hex}"
    fields["grant_id"] = f"grt_{fields['grant_id'].hex}"
    fields["rotated_from"] = fields["rotated_from"] and f"tok_{fields['rotated_from'].hex}"
    fields["audience"] = tuple(fields["audience"])
    return TokenFacts(**fields)


def _cursor(use: AuditUse) -> str:
    return f"{_naive(use.occurred_at).isoformat()}_{use.block_seq}_{use.use_index}"


def _parse_cursor(cursor: str | None) -> tuple[datetime, int, int]:
    if cursor is None:
        return datetime.min, -1, -1  # noqa: DTZ901 - DuckDB's TIMESTAMP has no zone
    try:
        moment, block_seq, use_index = cursor.split("_")
        return _naive(datetime.fromisoformat(moment)), int(block_seq), int(use_index)
    except ValueError as error:
        raise ServiceError("400", "cursor is not one that an earlier answer gave") from error


def _naive(moment: datetime) -> datetime:
    """For DuckDB: UTC, without zone."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _zoned(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC)


def _utc(moment: datetime | None) -> datetime | None:
    return moment and _zoned(moment)
