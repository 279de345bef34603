"""The log of attempts to deliver, which stream DELIVERIES keeps for a while.

It is written beside the work, a tenth of a second later: what a killed process tried last may be missing from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from datetime import datetime

import msgspec
import structlog
from msgspec import Struct
from nats.aio.msg import Msg

from events.errors import LedgerError
from events.publisher import NotAcknowledged, Outgoing, Publisher, Refused, outcome
from events.streams import DELIVERIES, Connection, direct, last_on
from events.types import TENANT
from service.webhooks.sender import Outcome

log = structlog.get_logger()

WAITING_MAX = 10_000
_GATHER_SECONDS = 0.1
_ACKNOWLEDGED_SECONDS_MAX = 3.0
_RETRY_SECONDS = 0.5
_SINGLES_MAX = 12  # up to here single publishes are faster than an atomic batch
_BATCH_MAX = 500
_READ_MAX = 100_000
_CLOSE_SECONDS_MAX = 1.5


class Attempt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request that was sent, or could not be, for a webhook.

    `message_id`: the `webhook-id` that was sent; `ledger_seq` of the revocation, none for other messages. `number`
    counts from 1. `failing_since`: when the first of the attempts failed that have all failed since.
    """

    message_id: str
    number: int
    at: datetime
    outcome: Outcome
    seconds: float
    ledger_seq: int | None = None
    status: int | None = None
    error: str = ""
    next_at: datetime | None = None
    failing_since: datetime | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Attempt).decode


def _seq(message: Msg) -> int:
    return int((message.headers or {})["Nats-Sequence"])


def _subject(webhook_id: str) -> str:
    return f"deliveries.{TENANT}.{webhook_id}"


class AttemptLog:
    """Writes attempts, many at once."""

    def __init__(self, nc: Connection) -> None:
        self._nc = nc
        self._publisher = Publisher(nc)
        self._waiting: deque[tuple[str, bytes]] = deque(maxlen=WAITING_MAX)
        self._task: asyncio.Task[None] | None = None

    def record(self, webhook_id: str, attempt: Attempt) -> None:
        """Waits for nothing."""
        self._waiting.append((_subject(webhook_id), _encode(attempt)))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Writes what waits, if it can be written soon."""
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=_CLOSE_SECONDS_MAX)
            self._task.cancel()

    async def _write(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            taken = [self._waiting.popleft() for _ in range(min(_BATCH_MAX, len(self._waiting)))]
            try:
                await self._publish(taken)
            except (LedgerError, Refused, NotAcknowledged) as error:
                # Written twice is better than not: it is a log for people.
                log.warning("delivery_log_waits", why=str(error))
                self._waiting.extendleft(reversed(taken[: WAITING_MAX - len(self._waiting)]))
                await asyncio.sleep(_RETRY_SECONDS)

    async def _publish(self, taken: list[tuple[str, bytes]]) -> None:
        if len(taken) <= _SINGLES_MAX:
            futures = [await self._publisher.publish(subject, data, {}) for subject, data in taken]
            await asyncio.gather(*(outcome(future, _ACKNOWLEDGED_SECONDS_MAX) for future in futures))
            return
        together: list[Outgoing] = [(subject, data, {}) for subject, data in taken]
        await outcome(await self._publisher.publish_together(together), _ACKNOWLEDGED_SECONDS_MAX)


async def last_attempt(nc: Connection, webhook_id: str) -> Attempt | None:
    """The newest attempt that is in the log. Raises: LedgerUnavailable."""
    found = await last_on(nc, DELIVERIES, _subject(webhook_id))
    return _decode(found.data) if found is not None else None


async def attempts(nc: Connection, webhook_id: str, *, before: int | None, limit: int) -> list[tuple[int, Attempt]]:
    """The newest attempts before position `before` of the log, newest first, with their positions.

    Raises: LedgerUnavailable.
    """
    newest = await last_on(nc, DELIVERIES, _subject(webhook_id))
    if newest is None:
        return []
    end = _seq(newest) + 1
    end = end if before is None else min(end, before)
    # There is no reading backwards: what lies before the end is read in windows that double until there is enough.
    window = 4 * limit
    while True:
        start = max(1, end - window)
        found = await _window(nc, webhook_id, start, end)
        if len(found) >= limit or start == 1:
            return found[::-1][:limit]
        window *= 4


async def _window(nc: Connection, webhook_id: str, start: int, end: int) -> list[tuple[int, Attempt]]:
    found: list[tuple[int, Attempt]] = []
    query = {"next_by_subj": _subject(webhook_id), "seq": start, "batch": min(end - start, _READ_MAX)}
    async with contextlib.aclosing(direct(nc, DELIVERIES, query)) as messages:
        async for message in messages:
            seq = _seq(message)
            if seq >= end:
                break
            found.append((seq, _decode(message.data)))
    return found


async def delivered_since(nc: Connection, webhook_id: str, moment: datetime) -> bool:
    """Whether anything was delivered since, by any process. Raises: LedgerUnavailable."""
    query = {"next_by_subj": _subject(webhook_id), "start_time": moment.isoformat(), "batch": _READ_MAX}
    async with contextlib.aclosing(direct(nc, DELIVERIES, query)) as messages:
        async for message in messages:
            if _decode(message.data).outcome == "delivered":
                return True
    return False
