"""How the feed is handed to followers over HTTP: as server-sent events, or by polls that wait.

A follower that does not read, or not fast enough, is no burden: the HTTP server takes whatever it is given, so a stream
ends by itself after so many bytes, and the follower comes again with the last id that it has seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from msgspec import Struct

from projections.base import boot_time_ns
from service import metrics
from service.errors import ServiceError, Unavailable
from service.feed import Entry, Feed, Filters, Page, Position, matches
from service.runtime import Places, Runtime

STREAM_BYTES_MAX = 1024**2
_RETRY = b"retry: 250\n\n"  # milliseconds after which a client that lost its stream comes again
_POSITION_SECONDS = 1.0
_UNCHECKED_SECONDS_MAX = 30.0  # how long a stream goes on while nobody can say whether its follower still may
_READ_MAX = 500
_SCANNED_PAGES_MAX = 20  # that a poll reads without finding what it was asked for
_LOOK_SECONDS = 0.25  # how late a poll notices that it is to end

_encode = msgspec.json.Encoder().encode

Allowed = Callable[[], Awaitable[bool]]  # raises Unavailable while that cannot be said


class Told(Struct, frozen=True):
    """The follower has all announcements up to `ledger_seq`, and so all of what was recorded until `as_of_ms`.

    Both times are milliseconds of the clock of that host, which counts from its start. `feed` names the log and its
    feed: of another one, sequences mean something else.
    """

    ledger_seq: int
    feed: str
    as_of_ms: int
    now_ms: int


class Polled(Struct, frozen=True, gc=False):
    """What a poll found, and where to go on. All that was recorded until `as_of_ns` is in it, unless that is None."""

    entries: list[Entry]
    feed: str
    ledger_seq: int
    as_of_ns: int | None


class Place:
    """One follower's place among those that this process serves; `who` follows.

    Raises: Unavailable when there is none; TooManyRequests when they have enough.
    """

    def __init__(self, places: Places, who: str) -> None:
        places.take("there are too many followers of the feed", who)
        self._places: Places | None = places
        self._who = who
        metrics.following(places.taken)

    def give_back(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.give_back(self._who)
            metrics.following(places.taken)


async def events(feed: Feed, after: int, filters: Filters, allowed: Allowed) -> AsyncGenerator[bytes]:
    """The stream: announcements behind `after` as they come, and every second how far it is complete.

    While it is far behind it says every second at least how far it has read, as an id without data: whoever comes again
    goes on from there. It ends when it is full, when another log stands behind the feed, when nothing more can be read
    for the cursor, and when the follower is no longer `allowed` to, or that could not be said for too long.
    """
    permission = _Permission(allowed)
    position, place = feed.position, None
    sent, told_at = 0, 0.0
    yield _RETRY
    while sent < STREAM_BYTES_MAX:
        try:
            page = await feed.read(after, _READ_MAX, place)
            now_at = feed.position
        except Unavailable:
            # The log is away. That its position grows old tells the follower.
            page, now_at = Page([], after), position
            await asyncio.sleep(_LOOK_SECONDS)
        except ServiceError:
            return
        if now_at.feed != position.feed:
            return
        position, after, place = now_at, page.reached, _place(page)
        parts = [_event(entry) for entry in page.entries if matches(entry.revocation, filters)]
        left = told_at + _POSITION_SECONDS - time.monotonic()
        if left <= 0:
            if not await permission.holds():
                return
            parts.append(_position(position, after) if after >= position.ledger_seq else b"id: %d\n\n" % after)
            told_at, left = time.monotonic(), _POSITION_SECONDS
        if parts:
            part = b"".join(parts)
            sent += len(part)
            yield part
        if not page.entries:
            await feed.wait(after, left if left > 0 else _LOOK_SECONDS)


class _Permission:
    """Whether the follower still may. A view that stands still for a moment ends no stream."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._known_at = time.monotonic()

    async def holds(self) -> bool:
        try:
            held = await self._allowed()
        except Unavailable:
            return time.monotonic() - self._known_at < _UNCHECKED_SECONDS_MAX
        self._known_at = time.monotonic()
        return held


def _place(page: Page) -> int | None:
    """Where in the stream its last announcement stands, for who reads on."""
    return page.entries[-1].stream_seq if page.entries else None


def _position(position: Position, after: int) -> bytes:
    told = Told(after, position.feed, position.as_of_ns // 1_000_000, boot_time_ns() // 1_000_000)
    return b"event: position\nid: %d\ndata: %b\n\n" % (after, _encode(told))


def _event(entry: Entry) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (entry.ledger_seq, entry.data)


async def poll(runtime: Runtime, after: int, filters: Filters, limit: int, seconds: float) -> Polled:
    """What is behind `after`, waited for as long as that.

    Raises: CursorTooOld; FeedChanged if the log is not that long; Unavailable.
    """
    feed, deadline = runtime.feed, time.monotonic() + seconds
    scanned, place = 0, None
    while True:
        page = await feed.read(after, limit, place)
        position = feed.position
        entries = [entry for entry in page.entries if matches(entry.revocation, filters)]
        after, place, scanned = page.reached, _place(page), scanned + bool(page.entries)
        left = deadline - time.monotonic()
        if entries or left <= 0 or scanned >= _SCANNED_PAGES_MAX or runtime.stopping.is_set():
            as_of = position.as_of_ns if after >= position.ledger_seq else None
            return Polled(entries, position.feed, after, as_of)
        if not page.entries:
            await feed.wait(after, min(left, _LOOK_SECONDS))
