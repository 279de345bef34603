"""`/v1/revocations`: the feed, for enforcement points that follow it over HTTP."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.base import boot_time_ns
from projections.revocations import CloudEvent
from service.api.routing import Call, Nothing, operation
from service.api.wire import FeedId, Seq
from service.errors import ForeignOrigin, InvalidRequest, ServiceError, Unavailable
from service.feed import Filters
from service.following import Place, Polled, events, poll
from service.outgoing import NO_STORE, FileResponse, Headers, Response, Sending, StreamResponse
from service.propagation import acknowledge
from service.rules.subscribers import Subscriber
from service.subscribers import acting_subscriber
from service.tokens import is_id
from service.validation import authenticate

FOLLOW = ("ledger:subscribe",)
NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
LIMIT_MAX = 1000
_SEQ_MAX = 2**53
_LAST_EVENT_ID = re.compile(r"[0-9]{1,16}")

_IDS: tuple[tuple[str, tuple[Literal["cli", "usr", "grt"], ...]], ...] = (
    ("client_id", ("cli",)),
    ("subject", ("usr", "cli")),
    ("grant_id", ("grt",)),
)

_After = Annotated[int, Meta(ge=0, le=_SEQ_MAX, description="The last `ledger_seq` that the follower knows of.")]
_ClientId = Annotated[str, Meta(min_length=1, max_length=64, description="What names another client is left out.")]
_Subject = Annotated[str, Meta(min_length=1, max_length=64, description="User id, or client id: as above.")]
_Subscriber = Annotated[str, Meta(min_length=1, max_length=64, description="The subscriber that follows, by its id.")]
_GrantId = Annotated[str, Meta(min_length=1, max_length=64, description="As above.")]


class Following(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What could concern the client, subject or grant that is named; what does not say whose it is could.

    `subscriber`: which of the caller's subscribers it is that follows; it is then known to live.
    """

    client_id: _ClientId | UnsetType = UNSET
    subject: _Subject | UnsetType = UNSET
    grant_id: _GrantId | UnsetType = UNSET
    subscriber: _Subscriber | UnsetType = UNSET


class StreamQuery(Following, frozen=True, kw_only=True, forbid_unknown_fields=True):
    after: _After | UnsetType = UNSET


class PollQuery(Following, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`feed`: which feed `after` is of, as the answer before said; refused if another log stands behind it now."""

    after: _After = 0
    feed: FeedId | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=LIMIT_MAX, description="Announcements at most.")] = 100
    wait_seconds: Annotated[int, Meta(ge=0, le=30, description="For how long, if there are none yet.")] = 0


class Announcements(Struct, frozen=True, kw_only=True):
    """`items` in the order of the log; `ledger_seq`: go on from here, whatever `items` holds.

    `age_ms`: whoever has all of it lacks nothing that was recorded longer ago; left out where more is behind it.
    `feed` names the log and its feed: when it is another one than before, take a snapshot.
    """

    items: list[CloudEvent]
    ledger_seq: Seq
    feed: str
    age_ms: int | UnsetType = UNSET


class FeedPosition(Struct, frozen=True, kw_only=True):
    """Everything up to `ledger_seq` is announced; that was the end of the log `age_ms` ago."""

    ledger_seq: Seq
    feed: str
    age_ms: int


class _Answered(Struct, frozen=True):
    """As `Announcements`, with the events as they are stored."""

    items: list[msgspec.Raw]
    ledger_seq: int
    feed: str
    age_ms: int | UnsetType


def filters_of(query: Following) -> Filters:
    """Raises: InvalidRequest for what is no id."""
    for name, prefixes in _IDS:
        value = getattr(query, name)
        if value is not UNSET and not any(is_id(value, prefix) for prefix in prefixes):
            kinds = " or ".join(f"{prefix}_" for prefix in prefixes)
            raise InvalidRequest(f"{name} is not an id", fix=f"give {kinds} and 32 hex digits")
    return Filters(client_id=query.client_id, subject=query.subject, grant_id=query.grant_id)


@operation(
    "GET",
    "/v1/revocations/stream",
    tag="revocations",
    needs=FOLLOW,
    query=StreamQuery,
    answer=None,
    errors=(404, 410),
    media_types=(EVENT_STREAM,),
    headers=(("Last-Event-ID", "The last id that was received. It wins over `after`."),),
)
async def stream_revocations(call: Call[None, StreamQuery]) -> StreamResponse:
    """Follow revocations as server-sent events.

    Each is a message with the CloudEvent as its data and its `ledger_seq` as its id. About every second `event:
    position` says up to where the stream is complete, with the same id, and as of when: milliseconds of the clock of
    the host, whose present time stands beside it; while it is far behind, an id alone says up to where it has read.
    Without `after` and `Last-Event-ID` it begins with what comes next.

    Streams end after 1 MiB, when the token ends and when the service stops: come again with the last id.
    """
    runtime, incoming = call.runtime, call.incoming
    _check_origin(call)
    filters, given = filters_of(call.query), _last_event_id(call)
    await _heard_of(call)
    feed = runtime.feed
    await feed.start()
    after = given if given is not None else call.query.after
    if isinstance(after, UnsetType):
        after = (await feed.read(feed.position.ledger_seq, LIMIT_MAX)).reached
    else:
        await feed.read(after, 1)  # what is wrong with the cursor is said before the stream begins

    async def allowed() -> bool:
        try:
            await authenticate(runtime, incoming, FOLLOW, record=False)
            await _heard_of(call)
        except Unavailable:
            raise
        except ServiceError:
            return False
        return True

    place = Place(runtime.followers, call.caller.subject)
    parts = events(feed, after, filters, allowed)
    return StreamResponse(200, _stream_headers(), parts, Sending(runtime.stopping, place.give_back))


async def _heard_of(call: Call[None, Any]) -> Subscriber | None:
    """The subscriber that says who it is. Raises: NotFound if the caller does not speak for it; Unavailable."""
    if isinstance(call.query.subscriber, UnsetType):
        return None
    subscriber = await acting_subscriber(call.runtime, call.caller, call.query.subscriber)
    call.runtime.signs_of_life.heard(subscriber.subscriber_id)
    return subscriber


def _stream_headers() -> Headers:
    kept = tuple(header for header in NO_STORE if header[0] != "content-type")
    # nginx would collect what is sent until it has a buffer full.
    return (*kept, ("content-type", EVENT_STREAM), ("x-accel-buffering", "no"))


def _check_origin(call: Call[None, StreamQuery]) -> None:
    """Raises: ForeignOrigin for a page of another site. Source: RFC 6454 §7."""
    issuer = urlsplit(call.runtime.settings.issuer)
    own = f"{issuer.scheme}://{issuer.netloc}"
    for origin in call.incoming.header_values("origin"):
        if origin != own:
            raise ForeignOrigin("the request comes from a page of another origin than the issuer's")


def _last_event_id(call: Call[None, StreamQuery]) -> int | None:
    """Raises: InvalidRequest if it is none of the stream's."""
    values = call.incoming.header_values("last-event-id")
    if not values:
        return None
    if len(values) > 1 or not _LAST_EVENT_ID.fullmatch(values[0]) or int(values[0]) > _SEQ_MAX:
        raise InvalidRequest(
            "Last-Event-ID is not one that this stream gave", fix="send the last id as it was received"
        )
    return int(values[0])


@operation(
    "GET",
    "/v1/revocations",
    tag="revocations",
    needs=FOLLOW,
    query=PollQuery,
    answer=Announcements,
    errors=(404, 410),
)
async def poll_revocations(call: Call[None, PollQuery]) -> Response:
    """Fetch revocations after a cursor, and wait for them.

    Without `after` it begins with the oldest that is kept. With `wait_seconds` an answer without items comes only after
    that time. A `subscriber` over HTTP says by `after` that it has applied everything up to there.
    """
    runtime, asked = call.runtime, call.query
    filters = filters_of(asked)
    await runtime.feed.check_feed(asked.feed)
    subscriber = await _heard_of(call)
    if subscriber is not None and subscriber.transport == "http" and asked.after:
        with contextlib.suppress(ServiceError):  # it fetches all the same, and acknowledges with the next cursor
            await acknowledge(runtime, subscriber.subscriber_id, asked.after)
    place = Place(runtime.followers, call.caller.subject)
    try:
        found = await call.incoming.while_connected(
            poll(runtime, asked.after, filters, asked.limit, asked.wait_seconds)
        )
    finally:
        place.give_back()
    if asked.wait_seconds:
        await authenticate(runtime, call.incoming, FOLLOW, record=False)  # it may have ended meanwhile
    return Response(200, msgspec.json.encode(_answered(found)), NO_STORE)


def _answered(found: Polled) -> _Answered:
    items = [msgspec.Raw(entry.data) for entry in found.entries]
    age = UNSET if found.as_of_ns is None else _age_ms(found.as_of_ns)
    return _Answered(items, found.ledger_seq, found.feed, age)


def _age_ms(as_of_ns: int) -> int:
    return max(0, (boot_time_ns() - as_of_ns) // 1_000_000)


@operation("GET", "/v1/revocations/position", tag="revocations", needs=FOLLOW, query=Nothing, answer=FeedPosition)
async def feed_position(call: Call[None, Nothing]) -> FeedPosition:
    """Say up to where revocations are announced, and as of when."""
    feed = call.runtime.feed
    await feed.start()
    position = feed.position
    return FeedPosition(ledger_seq=position.ledger_seq, feed=position.feed, age_ms=_age_ms(position.as_of_ns))


@operation(
    "GET",
    "/v1/revocations/snapshot",
    tag="revocations",
    needs=FOLLOW,
    query=Nothing,
    answer=None,
    media_types=(NDJSON,),
)
async def snapshot_revocations(call: Call[None, Nothing]) -> FileResponse:
    """Fetch everything that is revoked and could still matter, to go on from with the feed.

    JSON lines: first `feed`, `ledger_seq` and `taken_at`; then one revocation a line, with `what` it is; last `end` and
    how many there were. What comes after `ledger_seq` is in the feed.
    """
    runtime = call.runtime
    await runtime.feed.start()
    runtime.check_fresh(runtime.view.freshness())
    place = Place(runtime.followers, call.caller.subject)
    try:
        made = await call.incoming.while_connected(runtime.snapshots.get(runtime.feed.position.feed))
        runtime.snapshots.hold(made)
    except BaseException:
        place.give_back()
        raise

    def ended() -> None:
        runtime.snapshots.let_go(made)
        place.give_back()

    kept = tuple(header for header in NO_STORE if header[0] != "content-type")
    headers = (*kept, ("content-type", NDJSON), ("x-ledger-seq", str(made.ledger_seq)))
    return FileResponse(200, made.path, made.size, headers, Sending(runtime.stopping, ended))
