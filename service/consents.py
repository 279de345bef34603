"""What a person allows a client, so that they need not be asked again, until they withdraw it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from events.ledger import Append
from events.types import Reason
from projections.registry import Consent, Row
from projections.tables import consent_key
from service.commands import execute, load_row, subject
from service.endings import consented_before, end_grants
from service.grants import stamp
from service.rules.sessions import decide_give, decide_withdraw
from service.runtime import Runtime


async def give(
    runtime: Runtime, user_id: str, client_id: str, scope: str, *, by: str, request_id: str | None = None
) -> int:
    """Adds to what the client may be granted, in force on this host; the sequence by which it is so.

    Raises: Unavailable.
    """
    mark = stamp(by, request_id)
    return await _change(
        runtime, user_id, client_id, lambda consent: decide_give(mark, consent, user_id, client_id, scope)
    )


class Withdrawn(Struct, frozen=True):
    """`grants`: how many were revoked now. `seq`: of the withdrawal, 0 where nothing was ever allowed."""

    grants: int
    seq: int


async def withdraw(
    runtime: Runtime, user_id: str, client_id: str, *, by: str, request_id: str | None = None
) -> Withdrawn:
    """Ends all that the person ever granted the client, which must ask again.

    A call that was cut off is completed by the next, or by `service/endings.py`. Raises: Unavailable.
    """
    mark = stamp(by, request_id)
    await _change(runtime, user_id, client_id, lambda consent: decide_withdraw(mark, consent))
    consent = runtime.view.consent(user_id, client_id)
    if consent is None:
        return Withdrawn(0, 0)
    reason = Reason.CONSENT_WITHDRAWN
    belongs = consented_before(client_id, consent.withdrawn_seq)
    grants = await end_grants(runtime, user_id, belongs, reason, by=by, request_id=request_id)
    return Withdrawn(grants, consent.withdrawn_seq)


async def _change(runtime: Runtime, user_id: str, client_id: str, decide: Any) -> int:
    of, key = subject("consent", f"{user_id}_{client_id}"), consent_key(user_id, client_id)

    async def load(fresh: bool) -> Consent | None:
        row: Row | None = await load_row(runtime, "consent", key, of, fresh=fresh)
        return row if isinstance(row, Consent) else None

    def entries(consent: Consent | None) -> list[Append]:
        return [Append(of, event, consent.seq if consent is not None else 0) for event in decide(consent)]

    # Of an old view, nothing would show that what is wanted does not hold any more: it was withdrawn, or given again.
    await runtime.view_at_end()
    outcome = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    return outcome.seq or (outcome.state.seq if outcome.state is not None else 0)
