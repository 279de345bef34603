"""`/v1/revocations/{ledger_seq}/propagation`: receipts of a revocation."""

from __future__ import annotations

from service.api.routing import Call, Nothing, operation
from service.errors import NotFound
from service.propagation import Propagation, propagation_of

LOOK = ("ledger:revoke", "ledger:audit", "ledger:subscribe")
_SEQ_DIGITS_MAX = 18


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
    that are about something else, that their owner disabled, or whose receiver said that it is gone.
    """
    given = call.name
    if not (given.isascii() and given.isdecimal() and len(given) <= _SEQ_DIGITS_MAX):
        raise NotFound("there is no such ledger_seq", fix="it is a number, as a revocation's answer has it")
    return await propagation_of(call.runtime, int(given))
