"""What this process knows of revocations, up to which position of the ledger, and how old that knowledge is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from .clock import boot_seconds
from .errors import SnapshotNeeded, Unreachable
from .revoked import Revocation, RevokedSet

_TURN_LINES = 2_000
_LINE_BYTES_MAX = 65_536
# A JWT's end is judged by this host's clock, so that nothing can be said while that is further from the ledger's.
CLOCK_SECONDS_MAX = 60.0
_CLOCK_ASKED_SECONDS = 60.0
_TYPE_START, _TYPE_END = "token-ledger.", ".revoked.v1"


class CloudEvent(Struct, frozen=True, gc=False):
    """As it stands in the feed. `time` and the times in `data` are of one clock."""

    id: str
    type: str
    time: datetime
    data: Revocation


class _SnapshotLine(Struct, frozen=True, gc=False):
    feed: str | None = None
    ledger_seq: int = 0
    taken_at: datetime | None = None
    end: bool = False
    revocations: int = -1


_decode_event = msgspec.json.Decoder(CloudEvent).decode
_decode_line = msgspec.json.Decoder(_SnapshotLine).decode
_decode_revocation = msgspec.json.Decoder(Revocation).decode


def sequence_of(data: bytes) -> int:
    """The ledger's, of an event of the feed. Raises: Unreachable."""
    return _event(data).data.ledger_seq


def _event(data: bytes) -> CloudEvent:
    try:
        return _decode_event(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreachable(f"an event of the feed cannot be read: {error}") from error


class Knowledge:
    """All revocations up to `ledger_seq`, in what `feed` is; known to be complete as of `complete_at`.

    `complete_at` is by this host's boot clock. It is always a time before which every revocation is surely known here:
    whoever sets it begins with the moment at which he asked, and adds nothing but what another clock says has passed
    since. So an answer that lay in a buffer while this process was stopped is as old as it is.
    `clock_offset`: the ledger's clock less this host's boot clock, by the last snapshot; not a number until then.
    """

    def __init__(self) -> None:
        self.feed: str | None = None
        self.ledger_seq = 0
        self.stream_seq = 0  # of the feed's stream, for who follows by NATS
        self._known_at = -float("inf")  # when `ledger_seq` was heard of
        self.complete_at = -float("inf")
        self.revoked = RevokedSet()
        self.applied = asyncio.Event()  # set with each revocation, for who acknowledges it
        self.clock_offset = float("nan")
        self._clock_asked_at = 0.0
        self.snapshots = 0
        self.needs_snapshot = True
        self.problem = "it has not reached the feed yet"

    @property
    def age_seconds(self) -> float:
        return boot_seconds() - self.complete_at

    def apply(self, data: bytes) -> int:
        """One event of the feed; again is as good as once. Answers its sequence. Raises: Unreachable."""
        event = _event(data)
        one = event.data
        if not (event.type.startswith(_TYPE_START) and event.type.endswith(_TYPE_END)):
            raise Unreachable(f"an event of the feed is of an unknown type: {event.type[:100]}")
        what: Any = event.type[len(_TYPE_START) : -len(_TYPE_END)]
        one = _readable(msgspec.structs.replace(one, what=what))
        now, announced_at = boot_seconds(), event.time.timestamp()
        late = now + self.clock_offset - announced_at
        self.revoked.add(one, announced_at, now, late_seconds=late if late > 0 else 0.0)
        self._reach(one.ledger_seq)
        self.applied.set()
        return one.ledger_seq

    def confirm(self, ledger_seq: int, complete_at: float) -> None:
        """Everything up to `ledger_seq` was applied, and that was all there was at `complete_at`.

        Raises: SnapshotNeeded if the ledger was longer before; and now and then while the clocks differ: it may be the
        ledger's that was set right.
        """
        if ledger_seq < self.ledger_seq and complete_at > self._known_at:
            raise self.forget("the ledger ends before what is known of it")
        self.revoked.advance(boot_seconds())
        self._reach(ledger_seq)
        self.complete_at = max(self.complete_at, min(complete_at, boot_seconds()))
        self.problem = ""
        if abs(self.clock_ahead) > CLOCK_SECONDS_MAX and boot_seconds() - self._clock_asked_at > _CLOCK_ASKED_SECONDS:
            self.needs_snapshot = True
            raise SnapshotNeeded(f"the ledger's clock and this host's differ by {abs(self.clock_ahead):.0f} s")

    @property
    def clock_ahead(self) -> float:
        """Seconds by which this host's clock is ahead of the ledger's; not a number if that is not known."""
        return time.time() - boot_seconds() - self.clock_offset

    def _reach(self, ledger_seq: int) -> None:
        if ledger_seq > self.ledger_seq:
            self.ledger_seq, self._known_at = ledger_seq, boot_seconds()

    def forget(self, why: str) -> SnapshotNeeded:
        """The ledger is not the one that this was known of, though it says so: it was restored from a backup.

        What is known stays in force until there is a snapshot.
        """
        self.feed = None
        self.complete_at = -float("inf")
        self.needs_snapshot = True
        return SnapshotNeeded(why)

    async def replace(self, lines: AsyncIterator[bytes], ledger_seq_min: int = 0) -> bool:
        """Starts over from a snapshot. What was known is in force until all of it has been read.

        False if the snapshot is older than that, or than what is known: to forget what was revoked since, if only for
        a moment, would let it in again. Then nothing changes. Raises: Unreachable.
        """
        head = None
        fresh = RevokedSet(self.revoked.generation + 1)
        count, taken_at, now = 0, 0.0, boot_seconds()
        async for line in lines:
            if head is None:
                head = _read_head(line)
                taken_at = head.taken_at.timestamp() if head.taken_at else 0.0
                continue
            if line.startswith(b'{"end"'):
                if _decode_line(line).revocations != count:
                    raise Unreachable("the snapshot is not whole")
                break
            try:
                one = _readable(_decode_revocation(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Unreachable(f"the snapshot cannot be read: {error}") from error
            count += 1
            if fresh.matters(one, taken_at):
                fresh.add(one, taken_at, now)
            if count % _TURN_LINES == 0:
                await asyncio.sleep(0)
        else:
            raise Unreachable("the snapshot broke off")
        assert head is not None
        self.clock_offset, self._clock_asked_at = taken_at - now, now
        known = self.ledger_seq if head.feed == self.feed else 0
        if head.ledger_seq < max(ledger_seq_min, known):
            return False
        if head.feed != self.feed:
            self.complete_at = -float("inf")  # that was about another ledger
        fresh.generation = max(fresh.generation, self.revoked.generation + 1)
        self.revoked = fresh
        self.feed = head.feed
        self.ledger_seq, self._known_at = head.ledger_seq, boot_seconds()
        self.applied.set()
        self.snapshots += 1
        self.needs_snapshot = False
        return True


def _readable(one: Revocation) -> Revocation:
    """Raises: Unreachable for one whose reach is not known here: to pass over it could lose what it revokes."""
    names = {
        "token": one.token_id or one.token_sha256,
        "grant": one.grant_id,
        "client": one.client_id,
        "subject": one.subject,
        "key": one.kid,
    }
    if not names.get(str(one.what)):
        raise Unreachable(
            f"the ledger revoked a {str(one.what)[:100]}, or something without a name, which this version cannot tell",
            fix="install the version of the library that belongs to the ledger's",
        )
    return one


def _read_head(line: bytes) -> _SnapshotLine:
    try:
        head = _decode_line(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreachable(f"the snapshot cannot be read: {error}") from error
    if head.feed is None or head.taken_at is None:
        raise Unreachable("the snapshot does not say which feed it is of, and when it was taken")
    return head


async def lines_of(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body, without their ends. Raises: Unreachable for one that is too long."""
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > _LINE_BYTES_MAX:
            raise Unreachable("a line of the answer is too long")
    if rest:
        yield rest
