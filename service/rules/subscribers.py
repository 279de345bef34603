"""The rules of subscribers: who is registered, what they are, and when one is removed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct

from events.types import LedgerEvent, Recorded, SubscriberRegistered, SubscriberRemoved
from projections.registry import Client, User
from service.caller import ADMIN, Caller
from service.errors import Gone, InvalidRequest, LimitReached, NotFound
from service.rules.grants import Stamp, head
from service.rules.registry import check_plain

SUBSCRIBERS_MAX = 200  # a nats-server takes some 10 ms for each consumer to stop, and is killed after 4 s

Transport = Literal["nats", "http"]


class Subscriber(Struct, frozen=True):
    """An enforcement point. `after`: the ledger sequence that its consumer began after; `seq`: of its last event."""

    subscriber_id: str
    name: str
    transport: Transport
    owner: str
    public_key: str | None
    after: int
    registered_at: datetime
    seq: int


class Removed(Struct, frozen=True):
    """It was one, and is none any more."""

    subscriber_id: str
    seq: int


State = Subscriber | Removed


def subscriber_of(events: Sequence[Recorded]) -> State | None:
    """The fold of a subscriber's subject, whose last event says all; None if there is no such subscriber."""
    if not events:
        return None
    recorded = events[-1]
    match recorded.event:
        case SubscriberRegistered() as event:
            return Subscriber(
                subscriber_id=event.subscriber_id,
                name=event.subscriber_name,
                transport=event.transport,
                owner=event.owner,
                public_key=event.public_key,
                after=event.after,
                registered_at=recorded.recorded_at,
                seq=recorded.seq,
            )
        case SubscriberRemoved() as event:
            return Removed(event.subscriber_id, recorded.seq)
        case _:
            return None


def may_see(caller: Caller, subscriber: Subscriber) -> bool:
    """Administrators and auditors see every subscriber, everybody else their own."""
    return caller.holds("ledger:audit") or may_act_for(caller, subscriber)


def may_act_for(caller: Caller, subscriber: Subscriber) -> bool:
    """Whether what the caller says is said by the subscriber: follows in its name, acknowledges."""
    return caller.holds(ADMIN) or subscriber.owner in (caller.subject, caller.client_id)


class RegisterSubscriber(Struct, frozen=True, kw_only=True):
    """`after` and `public_key` are those of the transport `nats`."""

    stamp: Stamp
    subscriber_id: str
    name: str
    transport: Transport
    owner: str
    public_key: str | None
    after: int


def check_registration(name: str, transport: Transport, *, after: int | None) -> None:
    """What can be said before anything is made. Raises: InvalidRequest."""
    check_plain(name, "name")
    if transport == "http" and after is not None:
        raise InvalidRequest(
            "after is for the transport nats, whose cursor is kept here",
            fix="leave after out: a follower over HTTP says where it stands with each request",
        )


def decide_register(
    command: RegisterSubscriber, owner: User | Client | None, registered_count: int
) -> SubscriberRegistered:
    """Raises: NotFound, Gone, LimitReached."""
    if owner is None:
        raise NotFound(f"there is no user or client {command.owner} to own the subscriber")
    if owner.disabled_at is not None:
        raise Gone(f"the owner {command.owner} is disabled", fix="name an active user or client")
    if registered_count >= SUBSCRIBERS_MAX:
        raise LimitReached(
            f"there are {registered_count} subscribers, and there may be {SUBSCRIBERS_MAX}",
            fix="remove those that are gone: token-ledger subscriber list, subscriber delete",
        )
    return SubscriberRegistered(
        **head(command.stamp),
        subscriber_id=command.subscriber_id,
        subscriber_name=command.name,
        transport=command.transport,
        owner=command.owner,
        public_key=command.public_key,
        after=command.after,
    )


def decide_remove(stamp: Stamp, state: State | None) -> list[LedgerEvent]:
    """Nothing if it was removed before. Raises: NotFound."""
    match state:
        case None:
            raise NotFound("there is no such subscriber")
        case Removed():
            return []
        case Subscriber():
            return [
                SubscriberRemoved(
                    **head(stamp),
                    subscriber_id=state.subscriber_id,
                )
            ]
