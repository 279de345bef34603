"""How receipts are asked for over NATS, and who is registered to follow the feed."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from typing import Annotated, Literal

import msgspec
import nats.errors
from msgspec import Meta, Struct
from nats.aio.client import Client

from events.ledger import Ledger
from events.types import (
    TENANT,
    SubscriberRegistered,
    SubscriberRemoved,
    WebhookChanged,
    WebhookMetadata,
    WebhookRegistered,
    WebhookRemoved,
)

RECEIPTS_SUBJECT = "feed.receipts"
SEEN_SUBJECT = "feed.seen"
ASKED_SUBJECT = "feed.asked"  # what subscribers in account APPS ask as `feed.position`
WAIT_SECONDS_MAX = 1.0  # of one question; who wants to wait longer asks again
_ANSWER_SECONDS_MAX = 3.0
_FIRST_SEQS_MAX = 10_000
_HEARD_MAX = 5_000
_TELL_SECONDS = 1.0


class ReceiptsRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`ledger_seq`: a revocation whose receipts are asked for.

    With `wait_seconds` the answer waits until it was announced and all of `followers` have applied it, or until that
    time is over.
    """

    ledger_seq: Annotated[int, Meta(ge=0)] | None = None
    followers: tuple[str, ...] = ()
    wait_seconds: Annotated[float, Meta(ge=0, le=WAIT_SECONDS_MAX)] = 0.0


class FollowerStanding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one follower stands. Times are microseconds since 1970, UTC.

    `acknowledged_seq`: it has applied everything up to there. `applied`: the revocation that was asked for, and
    `applied_at_us` when that was first known, if it still is. `pending`: announcements behind what it has
    acknowledged, and `pending_since_us` when the first of them was made. `silent_since_us`: since when nothing was
    heard of it that should have been, if that is longer than it may be.
    """

    follower: str
    acknowledged_seq: int | None = None
    applied: bool = False
    applied_at_us: int | None = None
    last_seen_at_us: int | None = None
    pending: int = 0
    pending_since_us: int | None = None
    silent_since_us: int | None = None


class ReceiptsAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of every follower that is registered or has acknowledged something.

    `registered`: how many are. Announced is everything up to `announced_seq`; `announced_at_us`: of what was asked for,
    if that is not long ago. `complete`: everything was read that there was when the process started.
    `heard_since_us`: what a follower said before that is only known if it was recorded.
    """

    followers: list[FollowerStanding]
    registered: int
    announced_seq: int
    announced_at_us: int | None = None
    complete: bool
    heard_since_us: int


class Seen(Struct, frozen=True):
    """These followers were heard of in the last second."""

    followers: tuple[str, ...]


class SignsOfLife:
    """Tells the process that keeps the receipts, about once a second, whom this one has heard of over HTTP."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._heard: set[str] = set()
        self._telling: asyncio.Task[None] | None = None

    def heard(self, follower: str) -> None:
        """A request of the follower came, or its stream is open."""
        if len(self._heard) < _HEARD_MAX:
            self._heard.add(follower)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        while self._heard:
            heard, self._heard = self._heard, set()
            if self._nc.is_connected:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await self._nc.publish(SEEN_SUBJECT, msgspec.json.encode(Seen(tuple(heard))))
            await asyncio.sleep(_TELL_SECONDS)

    def stop(self) -> None:
        if self._telling is not None:
            self._telling.cancel()


class ReceiptsUnavailable(Exception):
    """Nobody says who has applied what. Nothing is known of the followers, for good or ill."""

    fix = "`token-ledger project receipts` must run on one host, as it does under `token-ledger up`"


async def ask_receipts(nc: Client, request: ReceiptsRequest, *, seconds: float = _ANSWER_SECONDS_MAX) -> ReceiptsAnswer:
    """Raises: ReceiptsUnavailable."""
    if not nc.is_connected:  # the client would hold the request until it is connected again
        raise ReceiptsUnavailable("the connection to the nats-server is down")
    try:
        data = msgspec.json.encode(request)
        reply = await nc.request(RECEIPTS_SUBJECT, data, timeout=request.wait_seconds + seconds)
        return msgspec.json.decode(reply.data, type=ReceiptsAnswer)
    except (nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError) as error:
        raise ReceiptsUnavailable(
            f"the process that keeps the receipts does not answer: {error or type(error).__name__}"
        ) from error


class Follower(Struct, frozen=True, kw_only=True):
    """A registered subscriber or webhook. It is concerned by what was recorded after `registered_seq`."""

    id: str
    name: str
    transport: Literal["nats", "http", "webhook"]
    owner: str
    registered_seq: int
    registered_at: datetime
    webhook: WebhookMetadata | None = None

    @property
    def followed(self) -> bool:
        """Whether anything is sent to it: not to a webhook that its owner has disabled, or that said it is gone."""
        return self.webhook is None or self.webhook.disabled_reason in {None, "failing"}


class Registered:
    """Who is registered, by the log itself. One for each process."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._first: dict[str, tuple[int, datetime]] = {}  # of webhooks that were changed since

    async def followers(self) -> list[Follower]:
        """Everyone as of now, oldest first. Raises: LedgerUnavailable."""
        found: list[Follower] = []
        for recorded in [
            *await self._ledger.last_of(f"ledger.{TENANT}.subscriber.*"),
            *await self._ledger.last_of(f"ledger.{TENANT}.webhook.*"),
        ]:
            match recorded.event:
                case SubscriberRegistered() as event:
                    found.append(
                        Follower(
                            id=event.subscriber_id,
                            name=event.subscriber_name,
                            transport=event.transport,
                            owner=event.owner,
                            registered_seq=recorded.seq,
                            registered_at=recorded.recorded_at,
                        )
                    )
                case WebhookRegistered() | WebhookChanged() as event:
                    seq, at = recorded.seq, recorded.recorded_at
                    if isinstance(event, WebhookChanged):
                        seq, at = await self._registered(event.webhook_id, recorded.subject)
                    found.append(
                        Follower(
                            id=event.webhook_id,
                            name=event.webhook.webhook_name,
                            transport="webhook",
                            owner=event.webhook.owner,
                            registered_seq=seq,
                            registered_at=at,
                            webhook=event.webhook,
                        )
                    )
                case SubscriberRemoved() | WebhookRemoved():
                    pass
        return sorted(found, key=lambda one: one.registered_seq)

    async def _registered(self, webhook_id: str, subject: str) -> tuple[int, datetime]:
        """Where and when the first event of the webhook was recorded, which never changes."""
        known = self._first.get(webhook_id)
        if known is None:
            (first,) = await self._ledger.read(subject, events_max=1)
            if len(self._first) >= _FIRST_SEQS_MAX:
                self._first.clear()
            known = self._first[webhook_id] = (first.seq, first.recorded_at)
        return known
