"""The fold of RECEIPTS: up to where each follower has applied the feed, and when each announcement was applied.

It lives in memory, in the process `project receipts`, and is built anew from the stream whenever that starts. Of
REVOCATIONS it holds where the newest announcements stand: NATS subscribers acknowledge positions of that stream, and
everybody else positions of LEDGER.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from datetime import datetime

import msgspec
import structlog
from msgspec import Struct

from events import codec
from events.errors import UndecodableEvent
from events.streams import RECEIPTS, REVOCATIONS, RawMessage

log = structlog.get_logger()

VERSION = 1
_FIX = "run the same version everywhere: a newer one has written what this one cannot read"
ANNOUNCEMENTS_MAX = 100_000  # the newest that are held
_AT_ONCE = 20  # messages; a block of receipts has up to some thousands, and seldom more than one a follower
_STEPS_MAX = 4_096  # of one follower that are held
_FOLLOWERS_MAX = 10_000
_ABOVE_MAX = 10_000  # acknowledgements of one consumer beyond one that is missing


class _Id(Struct):
    id: str


_decode_id = msgspec.json.Decoder(_Id).decode


def announced_seq(data: bytes) -> int:
    """The ledger sequence that an announcement is about. Raises: UndecodableEvent."""
    try:
        return int(_decode_id(data).id)
    except (msgspec.DecodeError, ValueError) as error:
        raise UndecodableEvent(f"cannot read an announcement of {len(data)} bytes: {error}") from error


def moment_us(text: str) -> int:
    """Microseconds since 1970 of a time as the server writes it: UTC, nanoseconds whose trailing zeros are cut."""
    main, _, fraction = text.rstrip("Z").partition(".")
    return int(datetime.fromisoformat(f"{main}+00:00").timestamp()) * 1_000_000 + int((fraction + "000000")[:6])


class Steps:
    """How one follower got on: pairs of a ledger sequence and the time at which it was first known to be reached.

    Both rise from pair to pair, so that the first pair at or behind a sequence has the time at which it was applied.
    `recorded_at_ns`: when the last pair was written into the log.
    """

    __slots__ = ("_at_us", "_seqs", "forgotten", "recorded_at_ns")

    def __init__(self) -> None:
        self._seqs = array("q")
        self._at_us = array("q")
        self.forgotten = -1  # up to here something was applied, and when is no longer known
        self.recorded_at_ns = 0

    @property
    def acknowledged(self) -> int:
        """All up to here has been applied."""
        return self._seqs[-1]

    @property
    def last_at_us(self) -> int:
        """When `acknowledged` was reached."""
        return self._at_us[-1]

    def add(self, ledger_seq: int, at_us: int) -> bool:
        """Whether it says anything new. The order in which receipts come does not matter."""
        seqs, times = self._seqs, self._at_us
        if not seqs or (ledger_seq > seqs[-1] and at_us > times[-1]):  # as nearly always
            seqs.append(ledger_seq)
            times.append(at_us)
            self._trim()
            return True
        end = bisect_left(seqs, ledger_seq)
        if end < len(seqs) and times[end] <= at_us:
            return False  # what reaches as far was heard before
        start = bisect_left(times, at_us, 0, end)  # those before it that were heard no earlier
        if end < len(seqs) and seqs[end] == ledger_seq:
            end += 1
        seqs[start:end] = array("q", [ledger_seq])
        times[start:end] = array("q", [at_us])
        self._trim()
        return True

    def _trim(self) -> None:
        if len(self._seqs) > _STEPS_MAX:
            count = _STEPS_MAX // 4
            self.forgotten = self._seqs[count - 1]
            del self._seqs[:count], self._at_us[:count]

    def applied_at_us(self, ledger_seq: int) -> int | None:
        """When the follower had applied it; None if it has not, or if that is no longer known."""
        found = bisect_left(self._seqs, ledger_seq)
        if found == len(self._seqs) or ledger_seq <= self.forgotten:
            return None
        return self._at_us[found]


class Announcements:
    """The newest of REVOCATIONS, whose sequences have no gaps: their ledger sequences, and when they were stored."""

    def __init__(self) -> None:
        self._first = 1
        self._ledger_seqs = array("q")
        self._stored_ns = array("q")

    def add(self, stream_seq: int, ledger_seq: int, stored_ns: int) -> None:
        if stream_seq != self.end + 1:  # the first that is held, or retention was faster
            self._first, self._ledger_seqs, self._stored_ns = stream_seq, array("q"), array("q")
        self._ledger_seqs.append(ledger_seq)
        self._stored_ns.append(stored_ns)
        if len(self._ledger_seqs) > 2 * ANNOUNCEMENTS_MAX:
            del self._ledger_seqs[:ANNOUNCEMENTS_MAX], self._stored_ns[:ANNOUNCEMENTS_MAX]
            self._first += ANNOUNCEMENTS_MAX

    @property
    def first(self) -> int:
        """The stream sequence of the oldest that is held."""
        return self._first

    @property
    def end(self) -> int:
        """The stream sequence of the newest."""
        return self._first + len(self._ledger_seqs) - 1

    @property
    def last_ledger_seq(self) -> int:
        return self._ledger_seqs[-1] if self._ledger_seqs else 0

    def ledger_seq(self, stream_seq: int) -> int | None:
        """None for one that is not held."""
        return self._ledger_seqs[stream_seq - self._first] if self._first <= stream_seq <= self.end else None

    def stored_ns(self, stream_seq: int) -> int | None:
        """None for one that is not held."""
        return self._stored_ns[stream_seq - self._first] if self._first <= stream_seq <= self.end else None

    def announced_at_us(self, ledger_seq: int) -> int | None:
        """When it was announced; None if it was not, or long ago."""
        found = bisect_left(self._ledger_seqs, ledger_seq)
        if found == len(self._ledger_seqs) or self._ledger_seqs[found] != ledger_seq:
            return None
        return self._stored_ns[found] // 1000

    def after(self, ledger_seq: int) -> tuple[int, int | None]:
        """How many were announced behind `ledger_seq`, and when the first of them."""
        found = bisect_right(self._ledger_seqs, ledger_seq)
        count = len(self._ledger_seqs) - found
        return count, self._stored_ns[found] // 1000 if count else None


class ReceiptsFold:
    """A projection of RECEIPTS and REVOCATIONS into memory. `changed` is called when something was applied.

    A block of receipts that it cannot read is left out: what stood in it is pending until its followers' next ones.
    """

    name = "receipts"
    version = VERSION

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.followers: dict[str, Steps] = {}
        self.announced = Announcements()
        self.caught_up: set[str] = set()
        self._positions: dict[str, int] = {}
        self._created: dict[str, str] = {}
        self.unreadable = 0  # blocks
        self._whole = True  # nothing of RECEIPTS has left the stream
        self._feed_began_ns = 0
        self._changed = changed

    def position(self, stream: str) -> int:
        return self._positions.get(stream, 0)

    async def publish(self, stream: str, batch: list[RawMessage]) -> None:
        """As `apply`, a little at a time: whoever asks this process must not wait for all of it."""
        for start in range(0, len(batch), _AT_ONCE):
            self.apply(stream, batch[start : start + _AT_ONCE])
            await asyncio.sleep(0)

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        """Folds the batch."""
        for message in batch:
            if message.seq <= self.position(stream):
                continue
            if stream == RECEIPTS:
                if not self.position(stream):
                    self._whole = message.seq == 1
                self._take(message)
            else:
                self.announced.add(message.seq, announced_seq(message.data), message.recorded_at_ns)
            self._positions[stream] = message.seq
        if batch:
            self._changed()

    def _take(self, message: RawMessage) -> None:
        if message.recorded_at_ns < self._feed_began_ns:
            return  # of the feed of another log, which had other sequences
        try:
            receipts = codec.decode_receipts(message.data).receipts
        except UndecodableEvent as error:
            if not self.unreadable:
                log.error("receipts_unreadable", alarm=True, seq=message.seq, why=str(error), fix=_FIX)  # noqa: TRY400 - where says nothing
            self.unreadable += 1
            return
        for receipt in receipts:
            steps = self.followers.get(receipt.follower)
            if steps is None:
                if len(self.followers) >= _FOLLOWERS_MAX:
                    continue
                steps = self.followers[receipt.follower] = Steps()
                if not self._whole:  # what it applied before has left the stream, and the times with it
                    steps.forgotten = receipt.ledger_seq - 1
            steps.add(receipt.ledger_seq, receipt.applied_at_us)
            if receipt.ledger_seq >= steps.acknowledged:
                steps.recorded_at_ns = message.recorded_at_ns

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        if stream not in self.caught_up:
            self.caught_up.add(stream)
            self._changed()

    @property
    def complete(self) -> bool:
        """Whether everything has been read that there was at the start."""
        return self.caught_up == {RECEIPTS, REVOCATIONS}

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        known = self._created.setdefault(stream, created)
        if known != created or self.position(stream) > end:
            return False
        if stream == REVOCATIONS and stream not in self._positions:
            self._positions[stream] = max(0, end - ANNOUNCEMENTS_MAX)
            self._feed_began_ns = moment_us(created) * 1000
        return True

    @property
    def feed(self) -> str:
        """When the feed was created that this is about, as its stream says; empty while that is not known."""
        return self._created.get(REVOCATIONS, "")

    def reset(self) -> None:
        self.followers.clear()
        self.announced = Announcements()
        self.caught_up.clear()
        self._positions.clear()
        self._created.clear()

    def forget(self, follower: str) -> None:
        """It was removed."""
        self.followers.pop(follower, None)


class Acknowledged:
    """What a durable consumer's owner has acknowledged, in sequences of REVOCATIONS: all up to `floor`, some above.

    `floor` is None until the server was asked for it. What the owner refused for good (`+TERM`) it has not applied:
    the floor never passes it, although the server's does.
    """

    __slots__ = ("above", "floor", "refused")

    def __init__(self) -> None:
        self.floor: int | None = None
        self.above: set[int] = set()
        self.refused: int | None = None  # the first

    def acknowledge(self, stream_seq: int) -> bool:
        """Whether the floor rose."""
        if self.floor is not None and stream_seq <= self.floor:
            return False
        if len(self.above) < _ABOVE_MAX:
            self.above.add(stream_seq)
        return self._close_up()

    def refuse(self, stream_seq: int) -> None:
        if stream_seq not in self.above and (self.floor is None or stream_seq > self.floor):
            self.refused = min(stream_seq, self.refused or stream_seq)

    def raise_to(self, floor: int) -> bool:
        """The server's own floor. Whether this one rose."""
        if self.refused is not None:
            floor = min(floor, self.refused - 1)
        if self.floor is not None and floor <= self.floor:
            return False
        self.floor = floor
        self.above = {seq for seq in self.above if seq > floor}
        self._close_up()
        return True

    def _close_up(self) -> bool:
        if self.floor is None or self.floor + 1 not in self.above:
            return False
        while self.floor + 1 in self.above:
            self.floor += 1
            self.above.remove(self.floor)
        return True
