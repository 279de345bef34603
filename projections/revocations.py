"""The feed: every revocation of the log as a CloudEvent in REVOCATIONS, in the order of the log, exactly once.

The ledger's sequence is the id of an announcement, its message id, and the cursor from which followers go on. Each is
published only behind the one that was last when it was made, so that a second process that does the same writes none
of them again; it stands by. What the stream holds says where to go on after a stop; a file remembers how much of the
log was read since.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import nats.errors
import structlog
from msgspec import UNSET, Struct, UnsetType
from nats.aio.msg import Msg

from events import codec
from events.errors import LedgerError, LedgerUnavailable
from events.publisher import DUPLICATE, WRONG_LAST_SEQUENCE, NotAcknowledged, Publisher, Refused, outcome
from events.streams import (
    LEDGER,
    REVOCATIONS,
    Connection,
    RawMessage,
    direct,
    feed_fits_log,
    recorded_at,
    stream_state,
)
from events.types import (
    TENANT,
    AccessRenewed,
    AuthorizationGranted,
    ClientDisabled,
    ClientRevoked,
    CodeRedeemed,
    GrantRevoked,
    KeyRevoked,
    Reason,
    Recorded,
    SubjectRevoked,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
    UserPasswordChanged,
)
from projections import base
from projections.base import boot_time_ns
from projections.current import CurrentReader
from projections.grants import facts

log = structlog.get_logger()

POSITION_SUBJECT = "feed.position"
_MESSAGE_ID = "Nats-Msg-Id"
_EXPECTED = "Nats-Expected-Last-Sequence"
_SINGLES_MAX = 6  # up to here single publishes are faster than an atomic batch
_BATCH_MAX = 500
_ATTEMPT_SECONDS = 2.0
_ATTEMPTS_MAX = 5
_VIEW_SECONDS_MAX = 2.0
_GRANT_EVENTS_MAX = 100_000
_VIEW_POLL_SECONDS = 0.0005
_SAVE_SECONDS = 5.0
_WATCH_SECONDS = 0.5
_TOLD_AGE_MS_MAX = 10_000

What = Literal["token", "grant", "client", "subject", "key"]


class Revocation(Struct, frozen=True, kw_only=True, gc=False):
    """What an announcement says: what is good no more, and since when. No personal data.

    `token_sha256`: hex, of the token string. `issued_before`: all that the client or subject was given until then. What
    a revoked key signed is good no more, whenever it says that it was issued: who stole the key can write any time.
    `revoked_at` lies in the future for a token that was rotated with an overlap: it is refused from then on.
    """

    token_id: str | UnsetType = UNSET
    token_sha256: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    kid: str | UnsetType = UNSET
    issued_before: datetime | UnsetType = UNSET
    reason: Reason
    revoked_at: datetime
    ledger_seq: int


class CloudEvent(Struct, frozen=True, kw_only=True, gc=False):
    """Source: CloudEvents 1.0, JSON event format §3. `id`: the ledger sequence. `time`: when it was recorded."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    data: Revocation


class Known(Struct, frozen=True, gc=False):
    """What the view knows of a token and its grant. None of what it does not know."""

    token_sha256: str | None = None
    grant_id: str | None = None
    client_id: str | None = None
    subject: str | None = None


class Announcement(Struct, frozen=True, gc=False):
    """One message of the feed."""

    ledger_seq: int
    subject: str
    data: bytes


class FeedPosition(Struct, frozen=True, kw_only=True):
    """All of LEDGER up to `ledger_seq` is announced, `stream_seq` being the last announcement in REVOCATIONS.

    `age_ms`: since that was known to be the end of the log. `feed` names the log and its feed: where it is another one
    than before, sequences mean something else.
    """

    feed: str
    ledger_seq: int
    stream_seq: int
    age_ms: float


class FeedAhead(LedgerError):
    """The feed announces what the log does not hold: one of them was restored without the other."""

    fix = "stop the service and start it again: `up` begins the feed anew; with your own servers, run `provision`"


_encode = msgspec.json.Encoder().encode
decode_event = msgspec.json.Decoder(CloudEvent).decode


def revocation(recorded: Recorded, known: Known) -> tuple[What, Revocation] | None:
    """What an event of the log revokes; None for events that revoke nothing. Pure."""
    event, at, seq = recorded.event, recorded.recorded_at, recorded.seq
    owners = {name: value for name in ("client_id", "subject") if (value := getattr(known, name)) is not None}
    match event:
        case TokenRevoked() | TokenSuperseded():
            sha256 = known.token_sha256 or UNSET
            told: dict[str, Any] = {"token_id": event.token_id, "token_sha256": sha256, "grant_id": event.grant_id}
            reason, since = (
                (event.reason, at) if isinstance(event, TokenRevoked) else (Reason.ROTATED, max(event.ends_at, at))
            )
            return "token", Revocation(**told, **owners, reason=reason, revoked_at=since, ledger_seq=seq)
        case GrantRevoked():
            return "grant", Revocation(
                grant_id=event.grant_id, **owners, reason=event.reason, revoked_at=at, ledger_seq=seq
            )
        case ClientRevoked(client_id=client_id, reason=reason) | ClientDisabled(client_id=client_id, reason=reason):
            return "client", Revocation(
                client_id=client_id, issued_before=at, reason=reason, revoked_at=at, ledger_seq=seq
            )
        case SubjectRevoked(user_id=user_id, reason=reason) | UserDisabled(user_id=user_id, reason=reason):
            return "subject", _of_subject(user_id, reason, recorded)
        case UserPasswordChanged(user_id=user_id):
            return "subject", _of_subject(user_id, Reason.PASSWORD_CHANGED, recorded)
        case KeyRevoked(kid=kid, reason=reason):
            return "key", Revocation(kid=kid, issued_before=at, reason=reason, revoked_at=at, ledger_seq=seq)
        case _:
            return None


def _of_subject(user_id: str, reason: Reason, recorded: Recorded) -> Revocation:
    at = recorded.recorded_at
    return Revocation(subject=user_id, issued_before=at, reason=reason, revoked_at=at, ledger_seq=recorded.seq)


def cloud_event(what: What, revoked: Revocation, at: datetime, issuer: str) -> CloudEvent:
    """The announcement as the contract has it. `at`: when the event was recorded."""
    return CloudEvent(
        id=str(revoked.ledger_seq),
        source=issuer,
        type=f"token-ledger.{what}.revoked.v1",
        time=at,
        data=revoked,
    )


class Feed:
    """The projection of LEDGER into REVOCATIONS. `view` tells whose a token is; it is waited for if it lives."""

    name = "revocations"

    def __init__(self, nc: Connection, view: CurrentReader, issuer: str, file: Path) -> None:
        self._nc = nc
        self._view = view
        self._issuer = issuer
        self._file = file
        self._publisher = Publisher(nc)
        self._ledger_created = self._feed_created = ""
        self._position = 0  # in LEDGER: announced up to here
        self._read_at = ""  # when the event at it was recorded, of those that this process has read
        self._stream_seq = 0  # in REVOCATIONS: the last announcement
        self._confirmed: tuple[int, int, int] | None = None  # LEDGER's end, boot time, REVOCATIONS' end as of then
        self._stuck_at: int | None = None  # where the view was seen to stand still
        self._saved_at = 0.0

    async def run(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Announces for ever. Raises as `base.run` and `start`; called again, it goes on."""
        await self.start()
        log.info("projector_started", projector=self.name, position=self._position)
        tasks = [
            asyncio.create_task(base.run(self._nc, self, (LEDGER,), progress=progress)),
            asyncio.create_task(self._watch()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await base.end_all(tasks)

    async def _watch(self) -> None:
        """Notices that the stream was begun anew, also while there is nothing to announce. Raises: LedgerUnavailable"""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            announced = self._stream_seq
            try:
                state = await stream_state(self._nc, REVOCATIONS, seconds=1)
            except LedgerUnavailable:
                continue
            if state["created"] != self._feed_created or int(state["last_seq"]) < announced:
                break
        raise LedgerUnavailable("the feed's stream is another one than before")

    async def start(self) -> None:
        """Finds out where to go on. Raises: LedgerUnavailable, FeedAhead."""
        ledger, feed = await asyncio.gather(stream_state(self._nc, LEDGER), stream_state(self._nc, REVOCATIONS))
        self._ledger_created, self._feed_created = ledger["created"], feed["created"]
        self._confirmed = None
        self._stream_seq = int(feed["last_seq"])
        last = await self._last() if feed["messages"] else None
        if not await feed_fits_log(self._nc):
            raise FeedAhead("the feed has announced last what the log does not hold")
        self._read_at = ""
        read = await self._remembered(int(ledger["last_seq"]))
        self._position = max(read, last.data.ledger_seq if last is not None else 0)

    async def _last(self) -> CloudEvent | None:
        async for message in direct(self._nc, REVOCATIONS, {"seq": self._stream_seq, "batch": 1}):
            return decode_event(message.data)
        return None

    async def _remembered(self, end: int) -> int:
        """Up to where the log was read, by the file; 0 if that was another log or feed, or one that was put back."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(self._file.read_bytes())
            same = (told["ledger"], told["feed"]) == (self._ledger_created, self._feed_created)
            if not same or told["stream_seq"] > self._stream_seq or told["ledger_seq"] > end:
                return 0
            async for message in direct(self._nc, LEDGER, {"seq": told["ledger_seq"], "batch": 1}):
                # Of a log that was put back and has grown since, the same number is another event.
                headers = message.headers or {}
                number, at = int(headers["Nats-Sequence"]), recorded_at(headers).isoformat()
                return number if (number, at) == (told["ledger_seq"], told["recorded_at"]) else 0
        return 0

    def save(self) -> None:
        """Notes how far the log was read. What is lost of it is read again."""
        if not self._read_at:
            return
        told = {
            "ledger": self._ledger_created,
            "feed": self._feed_created,
            "ledger_seq": self._position,
            "recorded_at": self._read_at,
            "stream_seq": self._stream_seq,
        }
        self._saved_at = time.monotonic()
        written = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            written.write_text(json.dumps(told))
            written.replace(self._file)
        except OSError as error:
            # The announcements do not depend on it.
            log.warning("feed_position_not_saved", file=str(self._file), error=str(error))

    def position(self, stream: str) -> int:
        return self._position if stream == LEDGER else 0

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        return (created == self._ledger_created and self._position <= end) or not self._position

    def reset(self) -> None:
        raise FeedAhead("the log is another one than that whose revocations the feed announces")

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        if self._position >= end:
            self._confirmed = (end, asked_at_ns, self._stream_seq)
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def answer(self) -> FeedPosition | None:
        """None until the end of the log was reached for the first time."""
        if self._confirmed is None:
            return None
        end, asked_at_ns, stream_seq = self._confirmed
        return FeedPosition(
            feed=feed_id(self._ledger_created, self._feed_created),
            ledger_seq=end,
            stream_seq=stream_seq,
            age_ms=round((boot_time_ns() - asked_at_ns) / 1e6, 3),
        )

    async def publish(self, stream: str, batch: list[RawMessage]) -> None:
        news: list[Announcement] = []
        for message in batch:
            if message.seq <= self._position:
                continue
            event = codec.decode(message.data)
            recorded = Recorded(seq=message.seq, recorded_at=message.recorded_at, subject=message.subject, event=event)
            found = revocation(recorded, await self._known(recorded))
            if found is not None:
                what, revoked = found
                data = _encode(cloud_event(what, revoked, recorded.recorded_at, self._issuer))
                news.append(Announcement(message.seq, f"revocations.{TENANT}.{what}", data))
        for start in range(0, len(news), _BATCH_MAX):
            await self._announce(news[start : start + _BATCH_MAX])
        if batch and batch[-1].seq > self._position:
            self._position, self._read_at = batch[-1].seq, batch[-1].recorded_at.isoformat()

    async def _known(self, recorded: Recorded) -> Known:
        """Whose the token or grant is: by the view, which is waited for as long as it moves on; else by the log."""
        event = recorded.event
        if not isinstance(event, TokenRevoked | TokenSuperseded | GrantRevoked):
            return Known()
        token_id = None if isinstance(event, GrantRevoked) else event.token_id
        await self._view_at(recorded.seq)
        known = self._known_to_view(event.grant_id, token_id)
        if known.subject is None or (token_id is not None and known.token_sha256 is None):
            known = await self._known_to_log(event.grant_id, token_id) or known
        return known

    async def _view_at(self, seq: int) -> None:
        """Waits until the view has reached an event, or stands still; then not again until it has moved."""
        position, moved_at = -1, time.monotonic()
        while (now_at := self._view.freshness().position) < seq and now_at != self._stuck_at:
            if now_at != position:
                position, moved_at = now_at, time.monotonic()
            elif time.monotonic() - moved_at > _VIEW_SECONDS_MAX:
                self._stuck_at = position
                log.warning("view_stands_still", ledger_seq=seq, position=position)
            await asyncio.sleep(_VIEW_POLL_SECONDS)

    def _known_to_view(self, grant_id: str, token_id: str | None) -> Known:
        if token_id is None:
            grant, sha256 = facts(self._view.family(grant_id).grant), None
        else:
            hit = self._view.hit(token_id)
            grant, sha256 = (facts(hit.grant), hit.token.sha256.hex()) if hit is not None else (None, None)
        if grant is None:
            return Known(sha256, grant_id)
        return Known(sha256, grant_id, grant.client_id, grant.subject)

    async def _known_to_log(self, grant_id: str, token_id: str | None) -> Known | None:
        """By the grant's own subject. The issue of an access-only token stands elsewhere: only the view knows it."""
        known: Known | None = None
        query = {"next_by_subj": f"ledger.{TENANT}.grant.{grant_id}", "seq": 1, "batch": _GRANT_EVENTS_MAX}
        async for message in direct(self._nc, LEDGER, query):
            event = codec.decode(message.data)
            if isinstance(event, TokenIssued | AuthorizationGranted):
                known = Known(None, grant_id, event.client_id, event.subject)
            if known is not None and isinstance(event, TokenIssued | CodeRedeemed | AccessRenewed | TokenRefreshed):
                minted = next((token for token in event.tokens if token.token_id == token_id), None)
                if minted is not None:
                    return Known(minted.sha256, grant_id, known.client_id, known.subject)
        return known

    async def _announce(self, news: Sequence[Announcement]) -> None:
        """Publishes what is not there yet. Raises: LedgerUnavailable; called again, it goes on."""
        for _ in range(_ATTEMPTS_MAX):
            try:
                if len(news) <= _SINGLES_MAX:
                    for one in news:
                        await self._single(one)
                else:
                    await self._batch(news)
                return
            except Refused as refused:
                if refused.err_code not in WRONG_LAST_SEQUENCE | {DUPLICATE}:
                    raise refused.as_ledger_error() from refused
            except NotAcknowledged as error:
                # Whether it was stored, the stream says.
                log.info("feed_asks_again", why=str(error))
            announced = await self._catch_up()
            news = [one for one in news if one.ledger_seq > announced]
        raise LedgerUnavailable(f"{len(news)} revocations could not be announced in {_ATTEMPTS_MAX} attempts")

    async def _single(self, one: Announcement) -> None:
        headers = {_MESSAGE_ID: str(one.ledger_seq), _EXPECTED: str(self._stream_seq)}
        ack = await outcome(await self._publisher.publish(one.subject, one.data, headers), _ATTEMPT_SECONDS)
        self._stream_seq = int(ack["seq"])

    async def _batch(self, news: Sequence[Announcement]) -> None:
        """All or nothing. Only the first of them may expect the stream's last sequence."""
        messages = [(one.subject, one.data, {_MESSAGE_ID: str(one.ledger_seq)}) for one in news]
        messages[0][2][_EXPECTED] = str(self._stream_seq)
        ack = await outcome(await self._publisher.publish_together(messages), _ATTEMPT_SECONDS)
        self._stream_seq = int(ack["seq"])

    async def _catch_up(self) -> int:
        """Reads where the stream ends by now, written by whomever: the last ledger sequence that was announced."""
        state = await stream_state(self._nc, REVOCATIONS)
        if state["created"] != self._feed_created:
            raise LedgerUnavailable("the feed's stream is another one than before")
        self._stream_seq = int(state["last_seq"])
        last = await self._last() if state["messages"] else None
        return last.data.ledger_seq if last is not None else 0


def feed_id(ledger_created: str, feed_created: str) -> str:
    """Names a log and its feed, 16 hex digits."""
    return hashlib.sha256(f"{ledger_created} {feed_created}".encode()).hexdigest()[:16]


async def serve_position(nc: Connection, feed: Feed) -> None:
    """Answers `feed.position` from now on, once the end of the log was reached: until then nobody does.

    Nor for as long as that is long ago: another such process may know more.
    """

    async def answer(message: Msg) -> None:
        told = feed.answer()
        if told is not None and told.age_ms <= _TOLD_AGE_MS_MAX and message.reply:
            with contextlib.suppress(nats.errors.Error):
                await message.respond(_encode(told))

    await nc.subscribe(POSITION_SUBJECT, cb=answer)
