"""The log of every use. Uses are written in blocks: while one block is on its way the next fills.

A block costs as much as dozens of the uses in it, so that few and large ones serve more requests, and sooner. After a
block, most of those whose answers waited for it ask again at once: the next one waits for three quarters of as many
callers as usually waited together, but two milliseconds at most. A lone caller waits for nobody.

`durable`: a use is acknowledged when its block is on disk. `buffered`: it is acknowledged at once and held in a
bounded buffer; what the buffer cannot hold is dropped, counted, and the count is written with the next block.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from events import codec
from events.errors import LedgerError, LedgerUnavailable
from events.publisher import NotAcknowledged, Publisher, Refused, outcome
from events.streams import Connection
from events.types import TENANT, RefusedCount, TokenUsed, UseBlock

UseRecording = Literal["durable", "buffered"]

_BLOCK_USES_MAX = 2000  # and as many counts: with long agents they stay below the server's max_payload of 1 MiB
_BLOCK_BYTES_MAX = 900_000
_WAITING_USES_MAX = 50_000
_REFUSED_KEYS_MAX = 10_000
_REFUSED_FLUSH_SECONDS = 2.0
_DURABLE_SECONDS_MAX = 2.0
_ATTEMPT_SECONDS_MAX = 1.0
_RETRY_SECONDS = 0.2
_BUFFERED_SECONDS = 0.02
_LINGER_SECONDS = 0.002
_LINGER_WAITERS_MAX = 32
_TOGETHER_SHARE = 0.75
_TOGETHER_DECAY = 0.9
_TOGETHER_SECONDS = 0.1


class UsageLog:
    """The USAGE stream, for one writer. `writer` names the process, fit for a subject token."""

    def __init__(
        self, nc: Connection, writer: str, mode: UseRecording = "durable", *, buffered_uses_max: int = 200_000
    ) -> None:
        self.nc = nc
        self.mode = mode
        self.lost = 0
        self._writer = writer
        self._subject = f"usage.{TENANT}.{writer}"
        self._publisher = Publisher(nc)
        self._uses_max = buffered_uses_max if mode == "buffered" else _WAITING_USES_MAX
        self._uses: list[TokenUsed] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._refused: Counter[tuple[int, str, str | None, str, str]] = Counter()
        self._unreported_loss = 0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._refused_timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._together = 0.0  # callers that were usually waiting at the same time, as of `_together_at`
        self._together_at = 0.0
        self._oldest_at = 0.0  # when the first of the uses that are held came
        self._close_by: float | None = None

    @property
    def waiting(self) -> int:
        """Uses that are held and not yet on their way."""
        return len(self._uses)

    def record(self, *uses: TokenUsed) -> asyncio.Future[None] | None:
        """Takes the uses. In `durable` mode the future resolves when they are on disk, all or none.

        It fails with LedgerUnavailable when the log cannot take them in time. In `buffered` mode: None.
        """
        if len(self._uses) + len(uses) > self._uses_max:
            if self.mode == "buffered":
                self.lost += len(uses)
                self._unreported_loss += len(uses)
                return None
            return _failed(LedgerUnavailable(f"{self._uses_max} uses already wait to be written"))
        if self.mode == "durable" and not self.nc.is_connected:
            return _failed(LedgerUnavailable("the connection to the nats-server is down"))
        if not self._uses:
            self._oldest_at = time.monotonic()
        self._uses.extend(uses)
        future: asyncio.Future[None] | None = None
        if self.mode == "durable":
            future = asyncio.get_running_loop().create_future()
            self._waiters.append(future)
        self._pump()
        return future

    def count_refused(self, *, caller: str, ip: str | None, outcome: str, endpoint: str) -> None:
        """Counts a request that named no known token. Counts are written once in a few seconds, never waited for."""
        self._count((int(time.time()) // 60, caller, ip, outcome, endpoint), 1)
        self._flush_refused_later()

    def _flush_refused_later(self) -> None:
        if self._refused_timer is None:
            loop = asyncio.get_running_loop()
            self._refused_timer = loop.call_later(_REFUSED_FLUSH_SECONDS, self._flush_refused)

    def _count(self, key: tuple[int, str, str | None, str, str], count: int) -> None:
        if key not in self._refused and len(self._refused) >= _REFUSED_KEYS_MAX:
            key = (key[0], "", None, *key[3:])  # still counted, no longer attributed
        self._refused[key] += count

    def _flush_refused(self) -> None:
        self._refused_timer = None
        self._pump(force=True)

    def _pump(self, *, force: bool = False) -> None:
        if self._in_flight or not (self._uses or force):
            return
        if force or len(self._waiters) >= self._wanted:
            self._cut()
        elif self._linger is None:
            seconds = _BUFFERED_SECONDS if self.mode == "buffered" else _LINGER_SECONDS
            self._linger = asyncio.get_running_loop().call_later(seconds, self._cut)

    @property
    def _wanted(self) -> float:
        if self.mode == "buffered":
            return 1  # never: nobody waits
        if time.monotonic() - self._together_at > _TOGETHER_SECONDS:
            return 0
        return min(_LINGER_WAITERS_MAX, self._together * _TOGETHER_SHARE)

    def _cut(self) -> None:
        """Sends what is there on the next turn of the loop, so that all requests of this turn share the block."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        task = asyncio.create_task(self._send())
        self._in_flight.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if self._close_by is None:
            self._pump()
            if self._refused:  # given back, or counted meanwhile
                self._flush_refused_later()

    async def _send(self) -> None:
        if not self._uses and not self._refused and not self._unreported_loss:
            return
        uses, waiters = self._uses, self._waiters
        self._uses, self._waiters = [], []
        refused, self._refused = self._refused, Counter()
        loss, self._unreported_loss = self._unreported_loss, 0
        deadline = (self._oldest_at if uses else time.monotonic()) + _DURABLE_SECONDS_MAX
        counts = tuple(RefusedCount(*key, count) for key, count in refused.items())
        written = 0  # of the uses, and of the counts
        try:
            for start in range(0, max(len(uses), len(counts), 1), _BLOCK_USES_MAX):
                end = start + _BLOCK_USES_MAX
                await self._send_block(uses[start:end], counts[start:end], loss, deadline)
                written, loss = end, 0
        except Exception as error:
            reason = error if isinstance(error, LedgerError) else LedgerUnavailable(f"cannot write: {error}")
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(reason)
                    # A caller that went away is nobody's error.
                    waiter.exception()
            for key, count in list(refused.items())[written:]:
                self._count(key, count)
            if self.mode == "buffered":
                self.lost += len(uses[written:])
                loss += len(uses[written:])
            self._unreported_loss += loss
            if reason is not error:
                raise
        else:
            self._together = max(self._together * _TOGETHER_DECAY, len(waiters) + len(self._waiters))
            self._together_at = time.monotonic()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def _send_block(
        self, uses: list[TokenUsed], counts: tuple[RefusedCount, ...], lost: int, deadline: float
    ) -> None:
        block = UseBlock(
            block_id=secrets.token_hex(16), writer=self._writer, uses=tuple(uses), refused=counts, lost=lost
        )
        data = codec.encode_block(block)
        if len(data) > _BLOCK_BYTES_MAX and len(uses) > 1:
            half = len(uses) // 2
            await self._send_block(uses[:half], counts, lost, deadline)
            await self._send_block(uses[half:], (), 0, deadline)
            return
        while True:
            by = deadline if self.mode == "durable" else self._close_by or time.monotonic() + 2 * _ATTEMPT_SECONDS_MAX
            try:
                # The same id on every attempt: a block that was stored without an answer is not stored twice.
                future = await self._publisher.publish(self._subject, data, {"Nats-Msg-Id": block.block_id})
                await outcome(future, max(0.05, min(_ATTEMPT_SECONDS_MAX, by - time.monotonic())))
                return
            except (NotAcknowledged, Refused, LedgerUnavailable) as error:
                if self.mode == "durable" and (
                    time.monotonic() > deadline or isinstance(error, Refused | LedgerUnavailable)
                ):
                    raise LedgerUnavailable(f"the use could not be recorded: {error}") from error
                if self._close_by is not None and time.monotonic() > self._close_by:
                    raise LedgerUnavailable(f"{len(uses)} uses could not be recorded before the stop") from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def record_block(self, block_id: str, uses: Sequence[TokenUsed], *, lost: int = 0) -> None:
        """Writes uses that others report, as one block: once, however often it is sent within the stream's window.

        Waits until it is on disk, in both modes. The caller keeps `uses` small enough for one message.

        Raises: LedgerUnavailable; then it may be written or not, and sending it again is safe.
        """
        block = UseBlock(block_id=block_id, writer=self._writer, uses=tuple(uses), lost=lost)
        data = codec.encode_block(block)
        deadline = time.monotonic() + _DURABLE_SECONDS_MAX
        while True:
            try:
                future = await self._publisher.publish(self._subject, data, {"Nats-Msg-Id": block_id})
                await outcome(future, max(0.05, min(_ATTEMPT_SECONDS_MAX, deadline - time.monotonic())))
                return
            except Refused as error:
                raise LedgerUnavailable(f"the uses could not be recorded: {error}") from error
            except NotAcknowledged as error:
                if time.monotonic() > deadline:
                    raise LedgerUnavailable(f"the uses could not be recorded: {error}") from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        """Writes what is held, within three seconds or so."""
        if self._refused_timer is not None:
            self._refused_timer.cancel()
            self._refused_timer = None
        if self._linger is not None:
            self._linger.cancel()
        self._close_by = time.monotonic() + _DURABLE_SECONDS_MAX
        for _ in range(3):
            if self._in_flight:
                with contextlib.suppress(Exception):
                    await asyncio.wait(self._in_flight, timeout=_DURABLE_SECONDS_MAX)
            if self._uses or self._refused or self._unreported_loss:
                with contextlib.suppress(LedgerError):
                    await self._send()


def _failed(error: LedgerError) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    future.exception()  # a caller that went away is nobody's error
    return future
