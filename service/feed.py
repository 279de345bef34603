"""The feed as this process hands it on: the newest announcements in memory, older ones from the stream.

Begun with the first follower. Nothing is held for a follower: each says where it stands and is given what comes then.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator

import msgspec
import nats.errors
import structlog
from msgspec import UNSET, Struct, UnsetType

from events.errors import LedgerError, LedgerUnavailable
from events.streams import LEDGER, REVOCATIONS, Connection, RawMessage, direct, follow, stream_state
from projections.base import boot_time_ns
from projections.revocations import POSITION_SUBJECT, FeedPosition, Revocation, decode_event, feed_id
from service.errors import InvalidRequest, ServiceError, Unavailable

log = structlog.get_logger()

_HELD_MAX = 10_000
_POSITION_SECONDS = 1.0
_ANSWER_SECONDS_MAX = 1.0
_RETRY_SECONDS = 0.3
_START_SECONDS_MAX = 5.0

_decode_position = msgspec.json.Decoder(FeedPosition).decode


class Entry(Struct, frozen=True, gc=False):
    """One announcement. `data` is the CloudEvent as it is stored, `revocation` what stands in it."""

    ledger_seq: int
    stream_seq: int
    data: bytes
    revocation: Revocation


class Page(Struct, frozen=True, gc=False):
    """Announcements in order, and the ledger sequence that they are complete up to: where to go on from."""

    entries: list[Entry]
    reached: int


class Position(Struct, frozen=True, gc=False):
    """This process has all announcements up to `ledger_seq`, which was the log's end at boot time `as_of_ns`.

    `feed`: which log and feed that is.
    """

    feed: str
    ledger_seq: int
    as_of_ns: int


class Filters(Struct, frozen=True, kw_only=True, gc=False):
    """What a follower is concerned with. All that is given must fit."""

    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET


class CursorTooOld(ServiceError):
    """Announcements behind the cursor may have been dropped since."""

    status, code, title = 410, "cursor_too_old", "The feed no longer reaches back that far"

    def __init__(self, after: int) -> None:
        super().__init__(
            f"announcements after {after} may have been dropped",
            fix="take GET /v1/revocations/snapshot, and go on from its ledger_seq",
        )


class FeedChanged(InvalidRequest):
    """What the follower says that it knows is not of this log: another one was put in its place."""

    code, title = "feed_changed", "Another log stands behind the feed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, fix="take GET /v1/revocations/snapshot, and go on from its ledger_seq")


def matches(revocation: Revocation, filters: Filters) -> bool:
    """Whether it could concern who asks: it does not if it names another client, subject or grant than theirs.

    One that does not say whose it is could concern anybody.
    """
    wanted = (
        (filters.client_id, revocation.client_id),
        (filters.subject, revocation.subject),
        (filters.grant_id, revocation.grant_id),
    )
    return all(asked is UNSET or told is UNSET or asked == told for asked, told in wanted)


async def ask_position(nc: Connection, seconds: float = _ANSWER_SECONDS_MAX) -> FeedPosition:
    """How far the announcements are. Raises: LedgerUnavailable if nobody says."""
    try:
        reply = await nc.request(POSITION_SUBJECT, b"", timeout=seconds)
        return _decode_position(reply.data)
    except (nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError) as error:
        raise LedgerUnavailable(f"the process that announces revocations does not answer: {error}") from error


class Feed:
    """The feed for the followers of one process."""

    def __init__(self, nc: Connection) -> None:
        self._nc = nc
        self._held: deque[Entry] = deque(maxlen=_HELD_MAX)
        self._held_after = 0  # all announcements behind this ledger sequence are held
        self._stream_seq = 0  # of the newest
        self._feed = ""  # whose announcements are followed
        self._position: Position | None = None
        self._waiting: FeedPosition | None = None  # told, and not yet reached here
        self._waiting_at = 0
        self._news = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns once announcements are followed and their position is known. Again, it does nothing.

        Raises: Unavailable.
        """
        if self._position is not None:
            return
        begun = self._starting
        if begun is None or (begun.done() and (begun.cancelled() or begun.exception() is not None)):
            begun = self._starting = asyncio.create_task(self._start())
        try:
            async with asyncio.timeout(_START_SECONDS_MAX):
                await asyncio.shield(begun)
        except (TimeoutError, LedgerError) as error:
            raise Unavailable(
                "the process that announces revocations does not answer, or the log cannot be read",
                private=str(error),
                fix="`token-ledger doctor` says why",
            ) from error

    async def _start(self) -> None:
        asked_at, told = await self._ask_patiently()
        ledger, state = await asyncio.gather(stream_state(self._nc, LEDGER), stream_state(self._nc, REVOCATIONS))
        self._feed = feed_id(ledger["created"], state["created"])
        if told.feed != self._feed:
            raise LedgerUnavailable("another feed is taking the place of the one that was announced to")
        self._stream_seq = int(state["last_seq"])
        last = [entry async for entry in self._stored(self._stream_seq, 1)] if state["messages"] else []
        # Of a stream that has lost all that it had, only what is told now is known to be complete.
        self._held_after = last[0].ledger_seq if last else told.ledger_seq if self._stream_seq else 0
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._watch_position())]
        self._take(told, asked_at)
        while self._position is None:
            await self._changed()

    def stop(self) -> None:
        """Ends what follows the stream."""
        for task in (*self._tasks, self._starting):
            if task is not None:
                task.cancel()

    @property
    def position(self) -> Position:
        """Raises: Unavailable before `start`."""
        if self._position is None:
            raise Unavailable("the feed of revocations is not known yet")
        return self._position

    # Following

    async def _follow(self) -> None:
        """Until another feed is followed: a cancellation alone may be swallowed by the NATS client."""
        mine = self._tasks
        while mine is self._tasks:
            try:
                async with contextlib.aclosing(follow(self._nc, REVOCATIONS, self._stream_seq)) as batches:
                    async for batch in batches:
                        if mine is not self._tasks or not self._hold(batch):
                            return
            except Exception:
                log.exception("feed_not_followed", alarm=True)
                await asyncio.sleep(_RETRY_SECONDS)

    def _hold(self, batch: list[RawMessage]) -> bool:
        """False if something is missing before it: then all is begun anew."""
        for message in batch:
            if message.seq <= self._stream_seq:
                continue
            if message.seq != self._stream_seq + 1:
                self._begin_anew()
                return False
            data = decode_event(message.data).data
            self._held.append(Entry(data.ledger_seq, message.seq, message.data, data))
            self._stream_seq = message.seq
        if len(self._held) == _HELD_MAX:
            self._held_after = max(self._held_after, self._held[0].ledger_seq)
        if batch:
            self._settle()
            self._tell()
        return True

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _changed(self) -> None:
        await self._news.wait()

    async def _watch_position(self) -> None:
        mine = self._tasks
        while mine is self._tasks:
            asked_at = boot_time_ns()
            with contextlib.suppress(LedgerUnavailable):
                self._take(await ask_position(self._nc), asked_at)
            await asyncio.sleep(_POSITION_SECONDS)

    async def _ask_patiently(self) -> tuple[int, FeedPosition]:
        """While it has not reached the end of the log, the process that announces does not answer."""
        while True:
            asked_at = boot_time_ns()
            with contextlib.suppress(LedgerUnavailable):
                return asked_at, await ask_position(self._nc, _RETRY_SECONDS)
            await asyncio.sleep(_RETRY_SECONDS / 10)

    def _take(self, told: FeedPosition, asked_at_ns: int) -> None:
        self._waiting, self._waiting_at = told, asked_at_ns - int(told.age_ms * 1e6)
        self._settle()

    def _settle(self) -> None:
        """What was told holds here as soon as the announcements up to it have arrived."""
        told = self._waiting
        if told is not None and told.feed != self._feed:
            self._begin_anew()
        elif told is not None and told.stream_seq <= self._stream_seq:
            self._waiting = None
            # Of two that announce, one may be slower: what it says later is no news.
            if self._position is None or self._waiting_at > self._position.as_of_ns:
                self._position = Position(told.feed, told.ledger_seq, self._waiting_at)
                self._tell()

    def _begin_anew(self) -> None:
        """What was read so far may lack something, or is of another log. The next follower begins again."""
        self.stop()
        self._held.clear()
        self._tasks, self._starting, self._position, self._waiting = [], None, None, None
        self._tell()

    # Reading

    async def read(self, after: int, limit: int, stream_seq: int | None = None) -> Page:
        """Announcements behind `after`, at most `limit`, in order.

        `stream_seq`: where in the stream the announcement at `after` stands, for whoever has just read it; else, or if
        it does not stand there, the place is looked for.

        Raises: CursorTooOld; FeedChanged if nothing in the log is that far; Unavailable.
        """
        await self.start()
        position = self.position
        if after > max(position.ledger_seq, self._newest()):
            await self._check_reached(after)
            return Page([], after)
        if after >= self._held_after:
            start = bisect_right(self._held, after, key=lambda entry: entry.ledger_seq)
            entries = [self._held[index] for index in range(start, min(start + limit, len(self._held)))]
            complete = start + limit >= len(self._held)
            reached = max(position.ledger_seq, self._newest(), after) if complete else entries[-1].ledger_seq
            return Page(entries, reached)
        try:
            entries, first = [], 0
            if stream_seq is not None:
                entries, first = await self._read_behind(stream_seq, after, limit), stream_seq + 1
            if not entries:
                first = await self.stream_seq_after(after)
                entries = [entry async for entry in self._stored(first, limit)]
        except LedgerUnavailable as error:
            raise Unavailable("the feed of revocations cannot be read", private=str(error)) from error
        if entries and entries[0].stream_seq != first:
            raise CursorTooOld(after)  # what stood there was dropped meanwhile
        entries = [entry for entry in entries if entry.ledger_seq > after]
        return Page(entries, entries[-1].ledger_seq if entries else after)

    async def _read_behind(self, stream_seq: int, after: int, limit: int) -> list[Entry]:
        """Nothing, unless the announcement at `after` stands there still: it may be dropped, or the feed another."""
        entries = [entry async for entry in self._stored(stream_seq, limit + 1)]
        fits = entries and (entries[0].stream_seq, entries[0].ledger_seq) == (stream_seq, after)
        return entries[1:] if fits else []

    def _newest(self) -> int:
        return self._held[-1].ledger_seq if self._held else self._held_after

    async def _check_reached(self, after: int) -> None:
        """Raises: FeedChanged if the log does not reach as far; Unavailable."""
        try:
            end = int((await stream_state(self._nc, LEDGER))["last_seq"])
        except LedgerUnavailable as error:
            raise Unavailable("the log cannot be asked where it ends", private=str(error)) from error
        if after > end:
            raise FeedChanged(f"the log ends at {end}, before {after}")

    async def check_feed(self, feed: str | UnsetType) -> None:
        """Raises: FeedChanged if it is another one than this, so that its sequences mean something else."""
        if isinstance(feed, UnsetType):
            return
        await self.start()
        if feed != self.position.feed:
            raise FeedChanged(f"this feed is {self.position.feed} and not {feed}")

    async def announced_of(self, ledger_seq: int) -> int:
        """How much of the log up to `ledger_seq` is announced by now: all of it, or up to an earlier place.

        A snapshot reaches further than the announcements for a moment.

        Raises: FeedChanged if the log does not reach as far; Unavailable.
        """
        await self.start()
        reached = max(self.position.ledger_seq, self._newest())
        if ledger_seq <= reached:
            return ledger_seq
        await self._check_reached(ledger_seq)
        with contextlib.suppress(LedgerUnavailable):
            # Another worker may have it a moment before this one, and the stream before its end is known.
            state = await stream_state(self._nc, REVOCATIONS)
            last = [entry async for entry in self._stored(int(state["last_seq"]), 1)] if state["messages"] else []
            reached = max(reached, last[0].ledger_seq if last else 0)
            if ledger_seq > reached:
                reached = max(reached, (await ask_position(self._nc)).ledger_seq)
        return min(ledger_seq, reached)

    async def stream_seq_after(self, after: int) -> int:
        """The place in REVOCATIONS of the first announcement behind `after`, or of the one that comes next.

        Raises: CursorTooOld, LedgerUnavailable.
        """
        state = await stream_state(self._nc, REVOCATIONS)
        low, high = max(1, int(state["first_seq"])), int(state["last_seq"]) + 1  # an empty stream says 0
        oldest = low
        while low < high:
            middle = (low + high) // 2
            found = [entry async for entry in self._stored(middle, 1)]
            if found and found[0].stream_seq == middle and found[0].ledger_seq <= after:
                low = middle + 1
            else:
                high = middle
        if low == oldest and oldest > 1:
            # What stood before may have been behind the cursor.
            raise CursorTooOld(after)
        return low

    async def _stored(self, stream_seq: int, limit: int) -> AsyncGenerator[Entry]:
        async for message in direct(self._nc, REVOCATIONS, {"seq": stream_seq, "batch": limit}):
            seq = int((message.headers or {})["Nats-Sequence"])
            data = decode_event(message.data).data
            yield Entry(data.ledger_seq, seq, message.data, data)

    async def wait(self, after: int, seconds: float) -> None:
        """Returns as soon as there is an announcement behind `after`, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._newest() <= after:
                    await self._changed()
