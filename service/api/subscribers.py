"""`/v1/subscribers`: enforcement points that follow the feed of revocations."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.asking_receipts import FollowerStanding
from service.api.routing import Call, Nothing, operation
from service.api.wire import Id, Page, Seq, cursor_of, page, position_of
from service.caller import ADMIN
from service.propagation import standing_told, standings
from service.rules.subscribers import Subscriber
from service.subscribers import (
    NewSubscriber,
    backlog,
    nats_access,
    prepare_subscriber,
    put_in_force,
    remove_subscriber,
    seen_by,
    shown_to,
)

NEEDS = (ADMIN,)
LOOK = (ADMIN, "ledger:audit", "ledger:subscribe")
_LIST = "subscribers"

Name = Annotated[
    str, Meta(min_length=1, max_length=200, description="Of the enforcement point, no person's: it is kept for ever.")
]
After = Annotated[int, Meta(ge=0, lt=2**53, description="Announcements behind this position of the ledger.")]
Transport = Literal["nats", "http"]
InForce = Annotated[bool, Meta(description="False: `to_do` says what is missing.")]


class SubscriberRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`owner`: the user or client whose tokens speak for it; left out, who asks.

    `after`, for `nats`: where its consumer begins; left out, with what is announced from now on.
    """

    name: Name
    transport: Transport
    owner: Id | UnsetType = UNSET
    after: After | UnsetType = UNSET


class SubscriberView(Struct, frozen=True, kw_only=True):
    """A subscriber. From `public_key` on: of the transport `nats`, what its client is told besides the seed.

    `acknowledged_seq`: it has applied everything up to there; `pending`: announcements behind that. `ack_pending`, when
    one over NATS is shown: those of them that were delivered. `silent`: for longer than `follower_silent_seconds_max`
    it was not heard of, or has not applied one. These are left out while nobody can say.
    """

    subscriber_id: str
    name: str
    transport: Transport
    owner: str
    created_at: datetime
    public_key: str | UnsetType = UNSET
    after: Seq | UnsetType = UNSET
    nats_url: str | UnsetType = UNSET
    stream: str | UnsetType = UNSET
    consumer: str | UnsetType = UNSET
    api_prefix: str | UnsetType = UNSET
    inbox_prefix: str | UnsetType = UNSET
    acknowledged_seq: Seq | UnsetType = UNSET
    pending: int | UnsetType = UNSET
    ack_pending: int | UnsetType = UNSET
    last_seen_at: datetime | UnsetType = UNSET
    silent: bool | UnsetType = UNSET
    ledger_seq: Seq


class SubscriberList(Struct, frozen=True):
    items: list[SubscriberView]
    next_cursor: str | UnsetType = UNSET


class SubscriberCreated(Struct, frozen=True, kw_only=True):
    """`nats_seed` is never shown again."""

    subscriber_id: str
    name: str
    transport: Transport
    owner: str
    public_key: str | UnsetType = UNSET
    after: Seq | UnsetType = UNSET
    nats_seed: str | UnsetType = UNSET
    nats_url: str | UnsetType = UNSET
    stream: str | UnsetType = UNSET
    consumer: str | UnsetType = UNSET
    api_prefix: str | UnsetType = UNSET
    inbox_prefix: str | UnsetType = UNSET
    in_force: InForce
    to_do: str | UnsetType = UNSET
    ledger_seq: Seq


class SubscriberRemovedAnswer(Struct, frozen=True, kw_only=True):
    subscriber_id: str
    in_force: InForce
    to_do: str | UnsetType = UNSET
    ledger_seq: Seq


def _view(call: Call[Any, Any], subscriber: Subscriber, standing: FollowerStanding | None) -> SubscriberView:
    more: dict[str, Any] = {}
    if subscriber.public_key is not None:
        more = {"public_key": subscriber.public_key, "after": subscriber.after}
        more |= nats_access(call.runtime, subscriber.subscriber_id)
    if standing is not None:
        more |= standing_told(standing)
    return SubscriberView(
        subscriber_id=subscriber.subscriber_id,
        name=subscriber.name,
        transport=subscriber.transport,
        owner=subscriber.owner,
        created_at=subscriber.registered_at,
        ledger_seq=subscriber.seq,
        **more,
    )


@operation(
    "POST",
    "/v1/subscribers",
    tag="subscribers",
    needs=NEEDS,
    body=SubscriberRequest,
    answer=SubscriberCreated,
    status=201,
    creates=True,
    errors=(404, 409, 410),
)
async def create_subscriber(call: Call[SubscriberRequest, Nothing]) -> dict[str, Any]:
    """Register a subscriber.

    Over NATS it gets a durable consumer of its own, and credentials that can fetch from it and acknowledge, and nothing
    else.
    """
    body = call.body
    new = NewSubscriber(
        name=body.name,
        transport=body.transport,
        owner=None if isinstance(body.owner, UnsetType) else body.owner,
        after=None if isinstance(body.after, UnsetType) else body.after,
    )
    answer = await call.create(lambda _: prepare_subscriber(call.runtime, call.asker, new))
    return answer | await put_in_force(call.runtime, answer)


@operation("GET", "/v1/subscribers", tag="subscribers", needs=LOOK, query=Page, answer=SubscriberList)
async def list_subscribers(call: Call[None, Page]) -> dict[str, Any]:
    """List subscribers, the oldest first: all for who holds `ledger:audit`, for others their own."""
    after, limit = position_of(call.query.cursor, _LIST).decode(), call.query.limit
    found = [one for one in await seen_by(call.runtime, call.caller) if one.subscriber_id > after]
    known = await standings(call.runtime)
    items = [_view(call, one, known.get(one.subscriber_id)) for one in found[:limit]]
    more = len(found) > limit
    return page(items, cursor_of(_LIST, items[-1].subscriber_id.encode()) if more else None)


@operation(
    "GET",
    "/v1/subscribers/{subscriber_id}",
    tag="subscribers",
    needs=LOOK,
    answer=SubscriberView,
    errors=(404,),
)
async def show_subscriber(call: Call[None, Nothing]) -> SubscriberView:
    """Show a subscriber, and how much it has not applied yet."""
    subscriber = await shown_to(call.runtime, call.caller, call.name)
    view = _view(call, subscriber, (await standings(call.runtime)).get(subscriber.subscriber_id))
    if subscriber.transport == "http":
        return view
    left = await backlog(call.runtime, subscriber)
    pending = left.pending + left.ack_pending
    return msgspec.structs.replace(view, pending=pending, ack_pending=left.ack_pending)


@operation(
    "DELETE",
    "/v1/subscribers/{subscriber_id}",
    tag="subscribers",
    needs=NEEDS,
    answer=SubscriberRemovedAnswer,
    errors=(404,),
)
async def delete_subscriber(call: Call[None, Nothing]) -> dict[str, Any]:
    """Remove a subscriber, for good: its connections are ended, its credentials refused, its consumer is deleted."""
    return await remove_subscriber(call.runtime, call.asker, call.name)
