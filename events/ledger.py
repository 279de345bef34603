"""The log of everything that was issued, refreshed and revoked: append, compare-and-set, read, follow.

Concurrent appends are committed as groups: while one group is being written the next gathers. A group of more than a
dozen events is one atomic batch, which costs the server about six milliseconds whatever its size; smaller groups go
as single messages, about one millisecond each.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta

from msgspec import Struct
from nats.aio.msg import Msg

from events import codec
from events.errors import Conflict, LedgerError, LedgerUnavailable, MessageTooLarge, OutcomeUnknown
from events.publisher import DUPLICATE, WRONG_LAST_SEQUENCE, NotAcknowledged, Publisher, Refused, outcome
from events.streams import (
    LEDGER,
    LEDGER_MESSAGE_BYTES_MAX,
    Connection,
    RawMessage,
    TooManySubjects,
    direct,
    follow,
    last_on,
    parse_time,
    recorded_at,
    stream_state,
)
from events.types import LedgerEvent, Recorded

APPEND_SECONDS_MAX = 5.0
WAITING_EVENTS_MAX = 20_000
_ATTEMPT_SECONDS = 2.0
_RETRY_SECONDS = 0.02
_SINGLES_MAX = 12  # up to here single publishes are faster than an atomic batch
_BATCH_EVENTS_MAX = 1000  # the server's limit, err_code 10199
_READ_EVENTS_MAX = 100_000
_SUBJECTS_MAX = 1024  # the server answers for no more at once (ADR-31)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # JetStream counts nanoseconds since, and misreads what lies long before

MSG_ID = "Nats-Msg-Id"
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"


class Append(Struct, frozen=True, gc=False):
    """One event for one subject. `expected`: the subject's last sequence, 0 for a new subject, None for any."""

    subject: str
    event: LedgerEvent
    expected: int | None = None


class _Message(Struct, frozen=True, gc=False):
    subject: str
    data: bytes
    headers: dict[str, str]


class _Unit:
    """What one caller wants appended as a whole."""

    __slots__ = ("deadline", "done", "messages", "sent")

    def __init__(self, messages: list[_Message]) -> None:
        self.messages = messages
        self.done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.deadline = time.monotonic() + APPEND_SECONDS_MAX
        self.sent = False

    def fail(self, error: LedgerError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def succeed(self, seqs: list[int]) -> None:
        if not self.done.done():
            self.done.set_result(seqs)

    def unfinished(self, why: str) -> LedgerError:
        if self.sent:
            return OutcomeUnknown(f"{why}: the event may or may not be recorded")
        return LedgerUnavailable(f"{why}: nothing was recorded")


class Ledger:
    """The LEDGER stream, for one process."""

    def __init__(self, nc: Connection) -> None:
        self.nc = nc
        self.appended = 0  # events since this process started, and conflicts
        self.conflicts = 0
        self._publisher = Publisher(nc)
        self._waiting: deque[_Unit] = deque()
        self._waiting_events = 0
        self._writer: asyncio.Task[None] | None = None
        self._end_asked: asyncio.Task[int] | None = None
        self._end_next: asyncio.Task[int] | None = None

    async def append(self, *entries: Append) -> list[int]:
        """Appends all entries or none and returns their sequences, once they are on disk.

        Of several entries for one subject, the expectation of the first is checked.

        Raises: Conflict, LedgerUnavailable, OutcomeUnknown, StreamFull, MessageTooLarge.
        """
        if len(entries) > _BATCH_EVENTS_MAX:
            raise MessageTooLarge(f"{len(entries)} events cannot be appended as one: at most {_BATCH_EVENTS_MAX}")
        unit = _Unit(_messages(entries))
        if self._waiting_events + len(entries) > WAITING_EVENTS_MAX:
            raise LedgerUnavailable(f"{WAITING_EVENTS_MAX} events already wait to be written")
        self._waiting.append(unit)
        self._waiting_events += len(entries)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        try:
            seqs = await unit.done
        except Conflict:
            self.conflicts += 1
            raise
        self.appended += len(seqs)
        return seqs

    async def _write(self) -> None:
        while self._waiting:
            units = self._next_group()
            try:
                await self._commit(units)
            except Exception as error:
                for unit in units:
                    unit.fail(error if isinstance(error, LedgerError) else unit.unfinished(f"cannot write: {error!r}"))

    def _next_group(self) -> list[_Unit]:
        """The units that may be committed together: the server takes one expectation a subject and batch."""
        group: list[_Unit] = []
        events = 0
        conditioned: set[str] = set()
        free: set[str] = set()
        for _ in range(len(self._waiting)):
            unit = self._waiting[0]
            subjects = {message.subject for message in unit.messages}
            has_expectation = {message.subject for message in unit.messages if _EXPECTED in message.headers}
            clash = (subjects & conditioned) or (has_expectation & free)
            if group and (clash or events + len(unit.messages) > _BATCH_EVENTS_MAX):
                break
            self._waiting.popleft()
            group.append(unit)
            events += len(unit.messages)
            conditioned |= has_expectation
            free |= subjects - has_expectation
        self._waiting_events -= events
        return group

    async def _commit(self, units: list[_Unit]) -> None:
        live = []
        for unit in units:
            if unit.done.cancelled():
                continue
            if time.monotonic() > unit.deadline:
                unit.fail(unit.unfinished("the log did not answer in time"))
            else:
                live.append(unit)
        if sum(len(unit.messages) for unit in live) <= _SINGLES_MAX:
            await asyncio.gather(*(self._commit_alone(unit) for unit in live))
            return
        try:
            seqs = await self._batch([message for unit in live for message in unit.messages], live)
        except (Refused, NotAcknowledged):
            # A refused batch does not say which event was at fault, and of one without an answer nothing is known.
            # Each unit then goes alone, with the same ids, and meets its own outcome.
            await asyncio.gather(*(self._commit_alone(unit) for unit in live))
            return
        for unit in live:
            unit.succeed(seqs[: len(unit.messages)])
            seqs = seqs[len(unit.messages) :]

    async def _commit_alone(self, unit: _Unit) -> None:
        """One unit, sent again with the same ids until its outcome is known or its time is up."""
        while True:
            unsure = unit.sent
            try:
                if len(unit.messages) == 1:
                    unit.succeed([await self._single(unit)])
                else:
                    unit.succeed(await self._batch(unit.messages, [unit]))
                return
            except Refused as refused:
                with contextlib.suppress(LedgerUnavailable):  # then it is tried again: a conflict must be a certain one
                    # The server looks for duplicates after it has checked the expectation and its own limits.
                    duplicate = unsure or refused.err_code in WRONG_LAST_SEQUENCE | {DUPLICATE}
                    seqs = await self._own_seqs(unit) if duplicate else []
                    if seqs:
                        unit.succeed(seqs)
                    elif refused.err_code in WRONG_LAST_SEQUENCE:
                        unit.fail(Conflict(f"another event came first on {unit.messages[0].subject}"))
                    else:
                        unit.fail(refused.as_ledger_error())
                    return
            except NotAcknowledged:
                pass
            except LedgerUnavailable as error:
                if not unit.sent:
                    unit.fail(error)
                    return
            except LedgerError as error:
                unit.fail(error)
                return
            remaining = unit.deadline - time.monotonic()
            if remaining <= 0:
                unit.fail(unit.unfinished("the log did not answer in time"))
                return
            await asyncio.sleep(_RETRY_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.nc.back.wait(), remaining)

    async def _own_seqs(self, unit: _Unit) -> list[int]:
        """Where the unit's events stand if an earlier attempt wrote them, else an empty list.

        JetStream checks the expectation before it looks for duplicates, so a second attempt is refused with "wrong
        last sequence" although the first succeeded. Raises: LedgerUnavailable.
        """
        found = {}
        for subject in {message.subject for message in unit.messages}:
            async for message in self._stored(subject):
                found[(message.headers or {}).get(MSG_ID)] = int((message.headers or {})["Nats-Sequence"])
        seqs = [found.get(message.headers[MSG_ID]) for message in unit.messages]
        return [seq for seq in seqs if seq is not None] if None not in seqs else []

    async def _single(self, unit: _Unit) -> int:
        message = unit.messages[0]
        future = await self._publisher.publish(message.subject, message.data, message.headers)
        unit.sent = True
        ack = await outcome(future, _ATTEMPT_SECONDS)
        return int(ack["seq"])

    async def _batch(self, messages: list[_Message], units: list[_Unit]) -> list[int]:
        """All or nothing, acknowledged once, sequences without a gap."""
        future = await self._publisher.publish_together([(one.subject, one.data, one.headers) for one in messages])
        for unit in units:
            unit.sent = True
        end = int((await outcome(future, _ATTEMPT_SECONDS))["seq"])
        return list(range(end - len(messages) + 1, end + 1))

    async def read(
        self, subject: str, *, until_seq: int | None = None, events_max: int | None = None
    ) -> list[Recorded]:
        """Every event of one subject, oldest first; empty if there is none.

        `until_seq`: none after this sequence; `events_max`: the oldest so many. Raises: LedgerUnavailable.
        """
        events: list[Recorded] = []
        async with contextlib.aclosing(self._stored(subject)) as messages:
            async for message in messages:
                recorded = _recorded(message)
                if len(events) == events_max or (until_seq is not None and recorded.seq > until_seq):
                    break
                events.append(recorded)
        return events

    async def read_on(self, subject: str, after: int) -> AsyncGenerator[Recorded]:
        """The events of one subject after a sequence, one by one, however many they are. Raises: LedgerUnavailable."""
        async with contextlib.aclosing(self._stored(subject, after + 1)) as messages:
            async for message in messages:
                yield _recorded(message)

    async def get(self, seq: int) -> Recorded | None:
        """The event at one sequence, or None. Raises: LedgerUnavailable."""
        async for message in direct(self.nc, LEDGER, {"seq": seq, "batch": 1}):
            if int((message.headers or {})["Nats-Sequence"]) == seq:
                return _recorded(message)
        return None

    async def last_of(self, *subjects: str) -> list[Recorded]:
        """The last event of each subject that fits, such as `ledger.main.webhook.*`, oldest first.

        Raises: LedgerUnavailable.
        """
        query = {"multi_last": subjects, "batch": _SUBJECTS_MAX}
        found: dict[str, Recorded] = {}
        try:
            messages = [message async for message in direct(self.nc, LEDGER, query)]
        except TooManySubjects:
            messages = [message for one in subjects async for message in self._stored(one)]
        for message in messages:
            recorded = _recorded(message)
            found[recorded.subject] = recorded
        return sorted(found.values(), key=lambda recorded: recorded.seq)

    async def last_seq_of(self, subjects: str) -> int:
        """The sequence of the last event on subjects such as `ledger.main.webhook.*`, 0 if there is none.

        Raises: LedgerUnavailable.
        """
        last = await last_on(self.nc, LEDGER, subjects)
        return int((last.headers or {})["Nats-Sequence"]) if last is not None else 0

    async def position_at(self, moment: datetime) -> int:
        """The last sequence that was recorded at or before a time, 0 if there was none. Raises: LedgerUnavailable."""
        end = await self.last_seq()
        # What is recorded has its time in nanoseconds and is told in microseconds, the rest cut off.
        later = max(moment, _EPOCH) + timedelta(microseconds=1)
        async for message in direct(self.nc, LEDGER, {"start_time": later.astimezone(UTC).isoformat(), "batch": 1}):
            return int((message.headers or {})["Nats-Sequence"]) - 1
        return end

    async def _stored(self, subject: str, start: int = 1) -> AsyncGenerator[Msg]:
        query = {"next_by_subj": subject, "seq": start, "batch": _READ_EVENTS_MAX}
        async for message in direct(self.nc, LEDGER, query):
            yield message

    async def last_seq(self) -> int:
        """The stream's end, asked of its leader after this call began. Concurrent callers share one question.

        Raises: LedgerUnavailable.
        """
        # A question that is already under way may have been answered before this call began: wait for the next one.
        if self._end_asked is None or self._end_asked.done():
            self._end_asked = asyncio.create_task(self._ask_end())
            return await asyncio.shield(self._end_asked)
        if self._end_next is None or self._end_next.done():
            self._end_next = asyncio.create_task(self._ask_end_after(self._end_asked))
        return await asyncio.shield(self._end_next)

    async def _ask_end(self) -> int:
        state = await stream_state(self.nc, LEDGER, seconds=_ATTEMPT_SECONDS)
        return int(state["last_seq"])

    async def _ask_end_after(self, running: asyncio.Task[int]) -> int:
        await asyncio.wait([running])
        self._end_asked = asyncio.current_task()
        self._end_next = None
        return await self._ask_end()

    async def clock(self) -> datetime:
        """The time now, by the clock that events are stamped with when they are recorded. Raises: LedgerUnavailable."""
        state = await stream_state(self.nc, LEDGER, seconds=_ATTEMPT_SECONDS)
        return parse_time(state["ts"])

    def follow(self, after: int) -> AsyncGenerator[list[RawMessage]]:
        """Every event after `after`, in order, for ever; see `streams.follow`."""
        return follow(self.nc, LEDGER, after)


def _messages(entries: tuple[Append, ...]) -> list[_Message]:
    messages = []
    seen: set[str] = set()
    for entry in entries:
        headers = {MSG_ID: entry.event.id}
        if entry.expected is not None and entry.subject not in seen:
            headers[_EXPECTED] = str(entry.expected)
        seen.add(entry.subject)
        data = codec.encode(entry.event)
        if len(data) > LEDGER_MESSAGE_BYTES_MAX - 1024:
            raise MessageTooLarge(f"the event of {len(data)} bytes is larger than {LEDGER_MESSAGE_BYTES_MAX - 1024}")
        messages.append(_Message(entry.subject, data, headers))
    return messages


def _recorded(message: Msg) -> Recorded:
    headers = message.headers or {}
    return Recorded(
        seq=int(headers["Nats-Sequence"]),
        recorded_at=recorded_at(headers),
        subject=headers["Nats-Subject"],
        event=codec.decode(message.data),
    )
