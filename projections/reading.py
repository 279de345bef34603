"""How rows of the audit trail are asked for over NATS, and how an answer of any size comes back.

Who asks subscribes to an inbox and names it as reply subject; the answer is numbered messages to it. The other side
sends some ahead, and more only as these are acknowledged on a subject of their own, so that neither side, nor the
server between them, ever holds more than a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, Literal

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.client import Client

SUBJECT = "analytics.read"
TAKEN_SUBJECT = "analytics.taken.{read_id}"
AHEAD_MAX = 8  # messages that may be on their way
MESSAGE_BYTES = 256 * 1024
SILENT_SECONDS_MAX = 20.0  # without a word from the other side, the answer is over
GONE = b"-"  # instead of an acknowledgement: nobody wants the rest
# A message: its kind, its number from 0, and what it holds.
HEAD = struct.Struct(">cI")
BEGUN, DATA, ENDED, REFUSED, ALIVE = b"B", b"D", b"E", b"X", b"A"

QueryFormat = Literal["json", "csv", "arrow"]
ExportFormat = Literal["parquet", "csv", "ndjson"]
Dataset = Literal[
    "uses", "events", "tokens", "findings", "usage_minutes", "usage_hours", "usage_days", "refused", "gaps"
]
ExportRange = tuple[int | None, int | None]


class ExportRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All rows of a dataset for which everything holds that is given, in the order in which they were recorded.

    `from_` ≤ time < `to`, by the dataset's own time; `after_seq` < number ≤ `until_seq`, the number in LEDGER or, of
    what comes from there, in USAGE. `filters`: column to value.
    """

    dataset: Dataset
    from_: datetime | None = msgspec.field(default=None, name="from")
    to: datetime | None = None
    after_seq: int | None = None
    until_seq: int | None = None
    filters: dict[str, str] = {}


class ReadRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of `sql` and `export`. `read_id`: 32 hex digits.

    The answer holds what was recorded when the request came, if analytics is soon there; it says what it is true at.
    """

    read_id: str
    format: Literal["json", "csv", "arrow", "parquet", "ndjson"]
    sql: str | None = None
    parameters: list[Any] | dict[str, Any] | None = None
    limit: int | None = None
    export: ExportRequest | None = None


class ReadBegun(Struct, frozen=True, kw_only=True):
    """True at these positions. `statement`, `parameters`: of an export, as it is run."""

    columns: list[str]
    types: list[str]
    ledger_seq: int
    usage_seq: int
    statement: str
    parameters: dict[str, Any]


class ReadEnded(Struct, frozen=True, kw_only=True):
    """`truncated`: there are more rows. `ledger_range`, `usage_range`: of an export, its first and last number."""

    rows: int
    truncated: bool
    ledger_range: ExportRange = (None, None)
    usage_range: ExportRange = (None, None)


class ReadFailed(Exception):
    """There is no answer, or no more of it. `code` as in `sandbox.process.QueryRefused`, or `busy`."""

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.fix = fix


class Refusal(Struct, frozen=True):
    code: str
    message: str
    fix: str


async def read(nc: Client, request: ReadRequest) -> AsyncGenerator[ReadBegun | bytes | ReadEnded]:
    """How the answer begins, its bytes in pieces, and how it ended; without the last, it is not whole.

    To be closed (`contextlib.aclosing`), which ends the query. Raises: ReadFailed.
    """
    inbox = nc.new_inbox()
    taken = TAKEN_SUBJECT.format(read_id=request.read_id)
    try:
        arrived: asyncio.Queue[bytes] = asyncio.Queue()

        async def arrive(message: Any) -> None:
            arrived.put_nowait(message.data)

        subscription = await nc.subscribe(inbox, cb=arrive)
        await nc.publish(SUBJECT, msgspec.json.encode(request), reply=inbox)
    except (nats.errors.Error, OSError) as error:
        raise ReadFailed("unavailable", f"the analytics process cannot be asked: {error}") from error
    over = False
    try:
        number = 0
        while not over:
            kind, payload = await _next(arrived, number)
            over = kind in {ENDED, REFUSED}
            if kind == ALIVE:
                continue
            yield _decoded(kind, payload)
            number += 1
            if not over:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await nc.publish(taken, str(number).encode())
    finally:
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()
            if not over:
                await nc.publish(taken, GONE)


async def _next(arrived: asyncio.Queue[bytes], number: int) -> tuple[bytes, bytes]:
    try:
        async with asyncio.timeout(SILENT_SECONDS_MAX):
            data = await arrived.get()
    except TimeoutError:
        raise ReadFailed("unavailable", "the analytics process says nothing any more") from None
    if len(data) < HEAD.size:  # the server's own word that nobody listens
        raise ReadFailed("unavailable", "the analytics process does not run")
    kind, found = HEAD.unpack_from(data)
    if found != number and kind != ALIVE:
        raise ReadFailed("unavailable", "a part of the answer was lost on its way")
    return kind, data[HEAD.size :]


def _decoded(kind: bytes, payload: bytes) -> ReadBegun | bytes | ReadEnded:
    match kind:
        case b"B":
            return msgspec.json.decode(payload, type=ReadBegun)
        case b"D":
            return payload
        case b"E":
            return msgspec.json.decode(payload, type=ReadEnded)
        case _:
            refusal = msgspec.json.decode(payload, type=Refusal)
            raise ReadFailed(refusal.code, refusal.message, refusal.fix)
