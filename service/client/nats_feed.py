"""The feed of revocations from a durable consumer of JetStream, which the ledger made for this subscriber.

Any two processes need a subscriber each: two that share one would get half of the feed each.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg

from .clock import boot_seconds
from .errors import SnapshotNeeded, Unreachable
from .knowledge import Knowledge, sequence_of
from .ledger import Ledger
from .sse import take_snapshot

_STREAM = "REVOCATIONS"
_BATCH = 512
_PULL_SECONDS = 30
_POSITION_SECONDS = 1.0
_ANSWER_SECONDS_MAX = 2.0
_CLOSE_SECONDS_MAX = 2.0
_BEHIND_SECONDS_MAX = 3.0  # what was announced is here within milliseconds, or it went to somebody else
_SNAPSHOT_ATTEMPTS = 50
_SNAPSHOT_PAUSE_SECONDS = 0.1


class _Position(Struct, frozen=True):
    feed: str
    ledger_seq: int
    stream_seq: int
    age_ms: float


_decode_position = msgspec.json.Decoder(_Position).decode


@dataclass(frozen=True, slots=True)
class NatsFeed:
    """Follows by NATS. `seed_file`: the nkey of the subscriber, as `token-ledger subscriber create` wrote it.

    `inbox_prefix`, `api_prefix`: what the subscriber's permissions allow; the defaults are what the ledger gives.
    """

    url: str | list[str]
    seed_file: str | Path
    subscriber_id: str
    inbox_prefix: str = ""
    api_prefix: str = "L.API"
    acknowledges: bool = field(default=True, init=False)

    async def follow(self, knowledge: Knowledge, ledger: Ledger) -> None:
        """Until something is wrong. Raises: LedgerClientError."""
        nc = Client()
        try:
            await self._connect(nc)
            await _Follower(nc, self, knowledge, ledger).run()
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"the connection to the nats-server failed: {error or type(error).__name__}") from error
        finally:
            await _end(nc)

    async def _connect(self, nc: Client) -> None:
        """Raises: Unreachable."""
        try:
            await nc.connect(
                self.url,
                nkeys_seed=str(self.seed_file),
                inbox_prefix=self.inbox_prefix or f"_INBOX_{self.subscriber_id}",
                allow_reconnect=False,  # after a new connection all is asked anew
                connect_timeout=2,
                max_reconnect_attempts=1,
                error_cb=_ignore,
            )
        except (nats.errors.Error, OSError, ValueError, TimeoutError) as error:
            raise Unreachable(
                f"the nats-server cannot be used: {error or type(error).__name__}",
                fix="look at the feed's url and seed_file; `token-ledger subscriber show` says which subscriber it is",
            ) from error


async def _end(nc: Client) -> None:
    """Closes the connection, whatever state it is in: the client leaves open what it could not write to."""
    transport = nc._transport  # noqa: SLF001 - there is no public way
    try:
        async with asyncio.timeout(_CLOSE_SECONDS_MAX):
            await nc.close()
    except (nats.errors.Error, OSError, TimeoutError):
        pass
    finally:
        if transport is not None:
            transport.close()  # type: ignore[no-untyped-call]


async def _ignore(_: Exception) -> None:
    """What fails is seen by whoever waits for it."""


class _Follower:
    """One connection. `_applied`: the stream sequence up to which everything was applied, as of `_applied_at`."""

    def __init__(self, nc: Client, feed: NatsFeed, knowledge: Knowledge, ledger: Ledger) -> None:
        self._nc = nc
        self._knowledge = knowledge
        self._ledger = ledger
        self._next = f"{feed.api_prefix}.CONSUMER.MSG.NEXT.{_STREAM}.{feed.subscriber_id}"
        self._inbox = nc.new_inbox()
        self._applied, self._applied_at = 0, boot_seconds()
        self._expected = 0  # messages that may still come for what was asked
        self._asked_at = 0.0
        self._behind: deque[tuple[_Position, float]] = deque()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        asked_at = boot_seconds()
        position = await self._position()
        if self._knowledge.needs_snapshot or position.feed != self._knowledge.feed:
            await self._start_over(position)
            asked_at = boot_seconds()
            position = await self._position()
        else:
            # What came while there was no connection was not delivered, and comes now, from where we were.
            self._applied = self._knowledge.stream_seq
        await self._nc.subscribe(self._inbox, cb=self._received)
        await self._ask_for_more()
        while True:
            self._judge(position, asked_at)
            done, _ = await asyncio.wait({self._failed}, timeout=_POSITION_SECONDS)
            if done:
                self._failed.result()
            if boot_seconds() - self._asked_at > _PULL_SECONDS + 5:
                self._expected = 0
                await self._ask_for_more()
            asked_at = boot_seconds()
            position = await self._position()

    async def _start_over(self, position: _Position) -> None:
        """A snapshot that holds at least what had been announced at `position`: whatever comes later, comes."""
        for _ in range(_SNAPSHOT_ATTEMPTS):
            if await take_snapshot(self._knowledge, self._ledger, position.ledger_seq):
                if self._knowledge.feed != position.feed:
                    raise Unreachable("the API and the nats-server are not of the same ledger")
                self._applied = self._knowledge.stream_seq = position.stream_seq
                self._applied_at = boot_seconds()
                return
            await asyncio.sleep(_SNAPSHOT_PAUSE_SECONDS)
        raise Unreachable("the ledger's view is behind its feed")

    async def _position(self) -> _Position:
        try:
            answer = await self._nc.request("feed.position", b"", timeout=_ANSWER_SECONDS_MAX)
            return _decode_position(answer.data)
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError, TimeoutError) as error:
            raise Unreachable(
                "nobody says how far the feed is; do `project revocations` and `project receipts` run?"
            ) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"the feed's position cannot be read: {error}") from error

    def _judge(self, position: _Position, asked_at: float) -> None:
        """Raises: SnapshotNeeded if the feed is another one, was longer before, or what it announced does not come."""
        if position.feed != self._knowledge.feed:
            raise self._gap("another feed answers")
        if position.stream_seq < self._applied and asked_at - position.age_ms / 1000 > self._applied_at:
            raise self._knowledge.forget("the feed ends before what is known of it")
        self._behind.append((position, asked_at))
        self._confirm()
        if self._behind and boot_seconds() - self._behind[0][1] > _BEHIND_SECONDS_MAX:
            raise self._gap("what was announced did not come; does another process use this subscriber?")

    def _confirm(self) -> None:
        while self._behind and self._behind[0][0].stream_seq <= self._applied:
            position, asked_at = self._behind.popleft()
            self._knowledge.confirm(position.ledger_seq, asked_at - position.age_ms / 1000)

    def _gap(self, why: str) -> SnapshotNeeded:
        self._knowledge.needs_snapshot = True
        return SnapshotNeeded(why)

    async def _ask_for_more(self) -> None:
        self._asked_at = boot_seconds()
        self._expected += _BATCH
        request = {"batch": _BATCH, "expires": _PULL_SECONDS * 1_000_000_000}
        await self._nc.publish(self._next, json.dumps(request).encode(), reply=self._inbox)

    async def _received(self, message: Msg) -> None:
        try:
            if message.reply:
                await self._apply(message)
            else:
                self._status(message.headers or {})
            if self._expected <= _BATCH // 2:
                await self._ask_for_more()
        except Exception as error:
            if not self._failed.done():
                self._failed.set_exception(error)
                self._failed.exception()  # `run` may have ended by itself

    async def _apply(self, message: Msg) -> None:
        """Raises: SnapshotNeeded when a message is missing before this one."""
        self._expected -= 1
        sequence = message.metadata.sequence.stream
        if sequence > self._applied + 1:
            raise self._gap(f"{sequence - self._applied - 1} messages of the feed are missing")
        if sequence == self._applied + 1:
            self._knowledge.apply(message.data)
            self._applied = self._knowledge.stream_seq = sequence
            self._applied_at = boot_seconds()
            self._confirm()
        elif sequence_of(message.data) > self._knowledge.ledger_seq:
            raise self._knowledge.forget("the feed announces again, and something else")
        await self._nc.publish(message.reply, b"+ACK")

    def _status(self, headers: dict[str, Any]) -> None:
        """A request ended before it was filled: its time is over, or the server cannot serve it."""
        status = str(headers.get("Status", ""))
        if status == "100":
            return
        self._expected = max(0, self._expected - int(headers.get("Nats-Pending-Messages", self._expected) or 0))
        if status not in {"404", "408"}:
            raise Unreachable(f"the consumer cannot be used: {status} {headers.get('Description', '')}")
