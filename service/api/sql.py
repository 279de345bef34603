"""`/v1/audit/query`: auditors' own SQL."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.reading import QueryFormat, ReadBegun, ReadEnded, ReadFailed, ReadRequest, read
from service.api.audit import AUDIT
from service.api.routing import Call, Nothing, operation
from service.api.wire import Seq
from service.auditing import Reading, Statement, record_reading
from service.errors import InvalidRequest, QueryTooHeavy, ServiceError, SqlInvalid, SqlNotAllowed, TooManyRequests
from service.errors import Unavailable as ServiceUnavailable
from service.outgoing import NO_STORE, Headers, Response
from service.runtime import Runtime

ROWS = 1000
CSV = "text/csv; charset=utf-8; header=present"
ARROW = "application/vnd.apache.arrow.stream"
_BUSY_SECONDS = 2
_UNPRESENTABLE = {"content-type", "pragma"}


class QueryBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One SELECT over the views of the README. `parameters`: for `?` a list, for `$name` an object."""

    sql: Annotated[str, Meta(min_length=1, max_length=100_000)]
    parameters: list[Any] | dict[str, Any] | UnsetType = UNSET
    format: Annotated[QueryFormat, Meta(description="`csv` and `arrow` say in headers what JSON says.")] = "json"
    limit: Annotated[int, Meta(ge=1, description="Rows. The most is a setting, 100,000 by default.")] = ROWS


class QueryAnswer(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE. `truncated`: there are more rows.

    DECIMAL, whole numbers of more than 64 bits, NaN and infinities are texts; times are UTC. `read_seq`: of the event
    that this was read.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    row_count: int
    truncated: bool
    ledger_seq: Seq
    usage_seq: int
    read_seq: Seq
    elapsed_ms: float


@operation(
    "POST",
    "/v1/audit/query",
    tag="audit",
    needs=AUDIT,
    body=QueryBody,
    query=Nothing,
    answer=QueryAnswer,
    media_types=("text/csv", ARROW),
)
async def query_audit(call: Call[QueryBody, Nothing]) -> Response:
    """Run an auditor's SQL.

    It runs in a process of its own that can read nothing but the documented views. That it was asked is recorded in
    the ledger before, the statement sealed.
    """
    started = time.perf_counter()
    asked = call.body
    most = call.runtime.settings.audit_query_rows_max
    if asked.limit > most:
        raise InvalidRequest(f"limit is more than {most:,}", fix="ask for fewer rows, or use /v1/audit/export")
    parameters = asked.parameters or None
    statement = Statement(sql=asked.sql, parameters=parameters, limit=asked.limit)
    reading = await record_reading(call.runtime, call.asker, statement, asked.format)
    request = ReadRequest(
        read_id=reading.read_id.removeprefix("qry_"),
        format=asked.format,
        sql=asked.sql,
        parameters=parameters,
        limit=asked.limit,
    )
    begun, data, ended = await call.incoming.while_connected(_collected(call.runtime, request))
    elapsed_ms = round((time.perf_counter() - started) * 1000, 1)
    if asked.format == "json":
        return Response(200, _json(begun, data, ended, reading, elapsed_ms), NO_STORE)
    return Response(200, b"".join(data), _headers(asked.format, begun, ended, reading, elapsed_ms))


async def _collected(runtime: Runtime, request: ReadRequest) -> tuple[ReadBegun, list[bytes], ReadEnded]:
    """The whole answer, which is limited: what goes wrong in its last row is an error and no torn answer."""
    begun: ReadBegun | None = None
    parts: list[bytes] = []
    try:
        async with contextlib.aclosing(read(runtime.nc, request)) as answer:
            async for part in answer:
                match part:
                    case ReadBegun():
                        begun = part
                    case ReadEnded():
                        assert begun is not None
                        return begun, parts, part
                    case _:
                        parts.append(part)
    except ReadFailed as error:
        refuse(error)
    raise ServiceUnavailable("the answer broke off")


def refuse(error: ReadFailed) -> NoReturn:
    """Raises: what a failed reading means to the caller of the API."""
    kinds: dict[str, type[ServiceError]] = {
        "sql_invalid": SqlInvalid,
        "sql_not_allowed": SqlNotAllowed,
        "query_too_heavy": QueryTooHeavy,
    }
    if error.code in kinds:
        raise kinds[error.code](str(error), fix=error.fix or None) from error
    if error.code == "busy":
        raise TooManyRequests(str(error), headers={"Retry-After": str(_BUSY_SECONDS)}) from error
    raise ServiceUnavailable(str(error)) from error


def _json(begun: ReadBegun, data: list[bytes], ended: ReadEnded, reading: Reading, elapsed_ms: float) -> bytes:
    """The rows are JSON already."""
    head = msgspec.json.encode({"columns": begun.columns, "types": begun.types})
    tail = msgspec.json.encode(
        {
            "row_count": ended.rows,
            "truncated": ended.truncated,
            "ledger_seq": begun.ledger_seq,
            "usage_seq": begun.usage_seq,
            "read_seq": reading.seq,
            "elapsed_ms": elapsed_ms,
        }
    )
    return b"".join([head[:-1], b',"rows":[', *data, b"],", tail[1:]])


def _headers(form: str, begun: ReadBegun, ended: ReadEnded, reading: Reading, elapsed_ms: float) -> Headers:
    kept = tuple(header for header in NO_STORE if header[0] != "content-type")
    return (
        *kept,
        ("content-type", CSV if form == "csv" else ARROW),
        ("content-disposition", f'attachment; filename="audit-{reading.seq}.{form}"'),
        ("x-row-count", str(ended.rows)),
        ("x-truncated", str(ended.truncated).lower()),
        ("x-ledger-seq", str(begun.ledger_seq)),
        ("x-usage-seq", str(begun.usage_seq)),
        ("x-read-seq", str(reading.seq)),
        ("x-elapsed-ms", str(elapsed_ms)),
    )
