"""The log of receipts: which follower of the feed has applied it up to where, and when.

Receipts are gathered for 50 ms and written as one block. Each keeps the time at which it was heard. Of one follower a
block holds so many steps and no more: further ones replace the last, so that a time that is told is never earlier
than the truth, and as a rule it is the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict

import structlog

from events import codec
from events.errors import LedgerError, LedgerUnavailable
from events.publisher import NotAcknowledged, Publisher, Refused, outcome
from events.streams import Connection
from events.types import TENANT, Receipt, ReceiptBlock

log = structlog.get_logger()

_GATHER_SECONDS = 0.05
_ATTEMPT_SECONDS_MAX = 1.0
_RETRY_SECONDS = 0.2
_WRITTEN_SECONDS_MAX = 3.0
_CLOSE_SECONDS_MAX = 2.0
_STEPS_MAX = 16  # of one follower that wait at the same time
_FOLLOWERS_MAX = 5_000
_BLOCK_RECEIPTS_MAX = 5_000  # some 60 bytes each, and the server takes 1 MiB


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


class ReceiptLog:
    """The RECEIPTS stream, for one writer. `writer` names the process, fit for a subject token."""

    def __init__(self, nc: Connection, writer: str) -> None:
        self.nc = nc
        self.lost = 0
        self._writer = writer
        self._subject = f"receipts.{TENANT}.{writer}"
        self._publisher = Publisher(nc)
        self._waiting: dict[str, list[Receipt]] = {}
        self._last: OrderedDict[str, tuple[str | None, int]] = OrderedDict()
        self._written: asyncio.Future[None] | None = None  # of what waits
        self._writing: asyncio.Future[None] | None = None  # of what is on its way
        self._task: asyncio.Task[None] | None = None
        self._close_by: float | None = None

    def record(
        self, follower: str, ledger_seq: int, applied_at_us: int | None = None, *, feed: str | None = None
    ) -> None:
        """The follower has applied all up to `ledger_seq`: now, unless a time is given. Waits for nothing.

        Without a time, what this writer recorded last of the follower is not written again; nor what lies before it in
        the same `feed`, so that a follower that goes back and forth does not fill the log.
        """
        if applied_at_us is None:
            last_feed, last_seq = self._last.get(follower, (None, -1))
            if last_feed == feed and (ledger_seq == last_seq or (feed is not None and ledger_seq < last_seq)):
                return
            applied_at_us = now_us()
        steps = self._waiting.get(follower)
        if steps is None:
            if len(self._waiting) >= _FOLLOWERS_MAX:
                self._lose()
                return
            steps = self._waiting[follower] = []
        if len(steps) >= _STEPS_MAX:
            last = steps.pop()
            ledger_seq, applied_at_us = max(ledger_seq, last.ledger_seq), max(applied_at_us, last.applied_at_us)
        steps.append(Receipt(follower, ledger_seq, applied_at_us))
        self._remember(follower, feed, ledger_seq)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._write())

    def _remember(self, follower: str, feed: str | None, ledger_seq: int) -> None:
        self._last[follower] = (feed, ledger_seq)
        self._last.move_to_end(follower)
        if len(self._last) > _FOLLOWERS_MAX:
            self._last.popitem(last=False)

    def _lose(self) -> None:
        """Receipts are cumulative: what is lost here, the follower's next one makes good."""
        if not self.lost:
            log.warning("receipts_lost", why=f"receipts of {_FOLLOWERS_MAX} followers already wait to be written")
        self.lost += 1

    async def written(self) -> None:
        """Waits until everything that was recorded before is on disk. Raises: LedgerUnavailable."""
        if self._waiting and self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        last = self._written or self._writing
        if last is None:
            return
        try:
            async with asyncio.timeout(_WRITTEN_SECONDS_MAX):
                await asyncio.shield(last)
        except TimeoutError as error:
            raise LedgerUnavailable("the receipt could not be recorded in time") from error

    async def _write(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_SECONDS)
            waiting, self._waiting = self._waiting, {}
            done = self._written or asyncio.get_running_loop().create_future()
            self._written, self._writing = None, done
            receipts = [receipt for steps in waiting.values() for receipt in steps]
            try:
                for start in range(0, len(receipts), _BLOCK_RECEIPTS_MAX):
                    await self._send(tuple(receipts[start : start + _BLOCK_RECEIPTS_MAX]))
            except LedgerError as error:
                self.lost += len(receipts)
                for follower in waiting:
                    self._last.pop(follower, None)
                log.warning("receipts_lost", receipts=len(receipts), why=str(error))
                done.set_exception(error)
                done.exception()  # nobody may be waiting
            else:
                done.set_result(None)
            self._writing = None

    async def _send(self, receipts: tuple[Receipt, ...]) -> None:
        """Raises: LedgerError when the log refuses the block for good, or at the stop."""
        data = codec.encode_receipts(ReceiptBlock(writer=self._writer, receipts=receipts))
        headers = {"Nats-Msg-Id": secrets.token_hex(16)}  # the same on every attempt
        while True:
            try:
                future = await self._publisher.publish(self._subject, data, headers)
                await outcome(future, _ATTEMPT_SECONDS_MAX)
                return
            except (NotAcknowledged, Refused, LedgerUnavailable) as error:
                if self._close_by is not None and time.monotonic() > self._close_by:
                    raise LedgerUnavailable(f"receipts could not be recorded before the stop: {error}") from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        """Writes what is held, within two seconds or so."""
        self._close_by = time.monotonic() + _CLOSE_SECONDS_MAX
        if self._task is not None and not self._task.done():
            with contextlib.suppress(Exception):
                await asyncio.wait({self._task}, timeout=_CLOSE_SECONDS_MAX + _ATTEMPT_SECONDS_MAX)


__all__ = ["ReceiptLog", "now_us"]
