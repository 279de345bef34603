"""`/v1/revocations/{ledger_seq}/propagation` and `/v1/subscribers/{id}/acknowledgements`: receipts of revocations."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from events.errors import LedgerError
from service.api.routing import Call, Nothing, operation
from service.api.wire import FeedId, Seq
from service.commands import refused
from service.errors import InvalidRequest, NotFound
from service.propagation import Propagation, acknowledge, propagation_of
from service.subscribers import acting_subscriber

LOOK = ("ledger:revoke", "ledger:audit", "ledger:subscribe")
FOLLOW = ("ledger:subscribe",)
_SEQ_DIGITS_MAX = 18


class Acknowledgement(Struct, frozen=True, forbid_unknown_fields=True):
    """The subscriber has applied everything that was revoked up to `ledger_seq`, by the feed or a snapshot.

    `feed`: which feed that is of, as positions, polls and snapshots say; refused if another log stands behind it now.
    """

    ledger_seq: Annotated[int, Meta(ge=0, le=2**53)]
    feed: FeedId | UnsetType = UNSET


class Acknowledged(Struct, frozen=True, kw_only=True):
    """It is recorded, up to `ledger_seq`: as far as revocations were announced by then."""

    subscriber_id: str
    ledger_seq: Seq


@operation(
    "GET",
    "/v1/revocations/{ledger_seq}/propagation",
    tag="revocations",
    needs=LOOK,
    answer=Propagation,
    errors=(404,),
)
async def show_propagation(call: Call[None, Nothing]) -> Propagation:
    """Say which follower has applied a revocation, when, and who has not.

    Of those who were registered when it was recorded and still are; later ones began with it. Webhooks are left out
    that are about something else, that their owner disabled, or whose receiver said that it is gone. Who holds neither
    `ledger:revoke` nor `ledger:audit` is told of its own followers only.
    """
    given = call.name
    if not (given.isascii() and given.isdecimal() and len(given) <= _SEQ_DIGITS_MAX):
        raise NotFound("there is no such ledger_seq", fix="it is a number, as a revocation's answer has it")
    return await propagation_of(call.runtime, call.caller, int(given))


@operation(
    "POST",
    "/v1/subscribers/{subscriber_id}/acknowledgements",
    tag="subscribers",
    needs=FOLLOW,
    body=Acknowledgement,
    answer=Acknowledged,
    errors=(404,),
)
async def acknowledge_revocations(call: Call[Acknowledgement, Nothing]) -> Acknowledged:
    """Say that a subscriber over HTTP has applied everything up to a position of the feed.

    Acknowledgements are cumulative, and a lower one takes nothing back. When the answer comes it is on disk.
    """
    subscriber = await acting_subscriber(call.runtime, call.caller, call.name)
    if subscriber.transport != "http":
        raise InvalidRequest(
            "the subscriber follows over NATS", fix="acknowledge the messages that its consumer delivers"
        )
    recorded = await acknowledge(call.runtime, subscriber.subscriber_id, call.body.ledger_seq, call.body.feed)
    try:
        await call.runtime.receipts.written()
    except LedgerError as error:
        raise refused(error) from error
    return Acknowledged(subscriber_id=subscriber.subscriber_id, ledger_seq=recorded)
