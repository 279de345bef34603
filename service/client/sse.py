"""The feed of revocations by server-sent events. Source: HTML Living Standard §9.2."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import msgspec
from msgspec import Struct

from .clock import boot_seconds
from .errors import Refused, Unreachable
from .knowledge import Knowledge
from .ledger import Ledger

_EVENT_BYTES_MAX = 1024 * 1024
# The first position of a stream ties the server's clock to ours; in ten minutes they drift apart by milliseconds.
_STREAM_SECONDS_MAX = 600.0
_AHEAD_SECONDS_MAX = 1.0
_STUCK_SECONDS_MAX = 10.0  # another worker or host of the ledger may know more
_SILENCE_SECONDS_MAX = 4.0  # positions come every second
_SNAPSHOT_SECONDS_MAX = 120.0
_TOO_OLD = 410
_FEED_CHANGED = "feed_changed"


class _Position(Struct, frozen=True):
    ledger_seq: int
    feed: str
    as_of_ms: float
    now_ms: float


_decode_position = msgspec.json.Decoder(_Position).decode


@dataclass(frozen=True, slots=True)
class SseFeed:
    """Follows by `GET /v1/revocations/stream`. `subscriber_id`: as whom to acknowledge, if registered as one."""

    subscriber_id: str | None = None

    async def follow(self, knowledge: Knowledge, ledger: Ledger) -> None:
        """Until the stream ends. Raises: LedgerClientError."""
        if knowledge.needs_snapshot and not await take_snapshot(knowledge, ledger):
            raise Unreachable("the ledger's view is behind its feed")
        cursor = str(knowledge.ledger_seq)
        who = {"subscriber": self.subscriber_id} if self.subscriber_id else {}
        asked_at = boot_seconds()
        first: _Position | None = None
        timeout = httpx.Timeout(_SILENCE_SECONDS_MAX)
        try:
            async with ledger.lines(
                "/v1/revocations/stream", params=who, headers={"last-event-id": cursor}, timeout=timeout
            ) as lines:
                async for kind, data in _messages(lines):
                    if kind == "message":
                        knowledge.apply(data)
                    elif kind == "position":
                        position = _read_position(data)
                        if position.feed != knowledge.feed:
                            knowledge.needs_snapshot = True
                            return
                        first = first or position
                        complete_at = asked_at + (position.as_of_ms - first.now_ms) / 1000
                        if complete_at > boot_seconds() + _AHEAD_SECONDS_MAX:
                            # This machine was stopped, and its clock with it: it no longer tells how old this is.
                            raise Unreachable("the ledger's clock goes on while this host's stood still")
                        knowledge.confirm(position.ledger_seq, complete_at)
                    now = boot_seconds()
                    stuck = now - max(asked_at, knowledge.complete_at) > _STUCK_SECONDS_MAX
                    if stuck or now - asked_at > _STREAM_SECONDS_MAX:
                        return
        except Refused as error:
            if error.status == _TOO_OLD:
                knowledge.needs_snapshot = True
            elif error.code == _FEED_CHANGED:
                raise knowledge.forget("the ledger ends before what is known of it") from error
            raise


async def take_snapshot(knowledge: Knowledge, ledger: Ledger, ledger_seq_min: int = 0) -> bool:
    """See `Knowledge.replace`. Raises: LedgerClientError."""
    timeout = httpx.Timeout(_SILENCE_SECONDS_MAX, read=_SNAPSHOT_SECONDS_MAX)
    async with ledger.lines("/v1/revocations/snapshot", timeout=timeout) as lines:
        return await knowledge.replace(lines, ledger_seq_min)


def _read_position(data: bytes) -> _Position:
    try:
        return _decode_position(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreachable(f"a position of the feed cannot be read: {error}") from error


async def _messages(lines: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, bytes]]:
    """Type and data of each message. Ids are not needed: what is acknowledged stands in the data."""
    kind = "message"
    data: list[bytes] = []
    size = 0
    async for line in lines:
        if not line:
            if data:
                yield kind, b"\n".join(data)
            kind, data, size = "message", [], 0
            continue
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        size += len(line)
        if size > _EVENT_BYTES_MAX:
            raise Unreachable("a message of the feed is too long")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value.decode(errors="replace")
