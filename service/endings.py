"""What a person gave ends with what it was given by: with a session, or with a consent that is withdrawn.

The event that says so comes first, and the grants are revoked one by one behind it. Whoever is killed between leaves
grants that should have ended: the same call ends them when it is repeated, and every worker looks for such grants when
it starts, and from time to time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from datetime import datetime, timedelta

import structlog
from msgspec import Struct

from events.types import Reason
from projections.grants import ActiveGrant, AuthorizedGrant, RevokedGrant, facts
from projections.registry import Consent, Row, Session
from service.errors import ServiceError
from service.grants import revoke_grant
from service.rules.grants import was_withdrawn
from service.runtime import Runtime
from service.tokens import now

log = structlog.get_logger()

_SLICE = 64
_AT_ONCE = 16
_TOKENS_MAX = 5_000_000
_ROWS_MAX = 100_000_000
_SECONDS = 900.0
_CLOCKS = timedelta(minutes=5)  # by which those of hosts may differ
_RETRY_SECONDS = 5.0

Belongs = Callable[[ActiveGrant], bool]


def left_behind(runtime: Runtime, session_ids: Collection[str], at: datetime, seq: int) -> Belongs:
    """Grants that end when the person signs out of these sessions: those that may be used while they are away do not.

    With them those that began before `seq`, in a session that had ended by then without a sign-out: it had expired by
    `at`, or another took its place in the browser. Nobody could sign out of it any more.
    """

    def belongs(grant: ActiveGrant) -> bool:
        if grant.by_code is None or grant.by_code.offline:
            return False
        session_id = grant.by_code.session_id
        if session_id in session_ids:
            return True
        # What the view has of a grant, it has of the session that the grant began in.
        return grant.first_seq < seq and not _stood(runtime.view.session(session_id), at, seq)

    return belongs


def signed_out_of(runtime: Runtime, session: Session) -> Belongs:
    """The same for one that has ended."""
    return left_behind(runtime, {session.session_id}, session.ended_at or session.expires_at, session.seq)


def _stood(session: Session | None, at: datetime, seq: int) -> bool:
    if session is None or at >= session.expires_at:
        return False
    return session.ended_at is None or session.seq > seq


def consented_before(consent: Consent) -> Belongs:
    """Grants to the client by the consent as it stood before it was last withdrawn."""
    return lambda grant: grant.client_id == consent.client_id and was_withdrawn(consent, grant)


async def end_grants(
    runtime: Runtime, user_id: str, belongs: Belongs, reason: Reason, *, by: str, request_id: str | None = None
) -> int:
    """Revokes those of a user's grants, as this host's view has them; how many there were. Raises: Unavailable."""
    waiting: list[str] = []
    ended = 0
    async for grant_id in _grants(runtime, user_id, belongs):
        waiting.append(grant_id)
        if len(waiting) == _AT_ONCE:
            ended += await _revoke(runtime, waiting, reason, by, request_id)
            waiting = []
    return ended + await _revoke(runtime, waiting, reason, by, request_id)


async def _revoke(runtime: Runtime, grant_ids: list[str], reason: Reason, by: str, request_id: str | None) -> int:
    await asyncio.gather(
        *(revoke_grant(runtime, by, grant_id, reason, None, request_id=request_id) for grant_id in grant_ids)
    )
    return len(grant_ids)


async def _grants(runtime: Runtime, user_id: str, belongs: Belongs) -> AsyncIterator[str]:
    """Grants that have not ended, each once; of codes those that may yet be redeemed.

    Others may have their turn in between.
    """
    for grant_id in runtime.view.unredeemed_of(user_id):
        grant = runtime.view.family(grant_id).grant
        if isinstance(grant, AuthorizedGrant) and grant.expires_at > now() - _CLOCKS and belongs(grant.becomes):
            yield grant_id
    seen: set[bytes] = set()
    after: str | None = None
    for _ in range(_TOKENS_MAX // _SLICE):
        token_ids = runtime.view.token_ids(subject=user_id, after=after, limit=_SLICE)
        for token_id in token_ids:
            hit = runtime.view.hit(token_id)
            if hit is None or hit.token.grant_id in seen:
                continue
            seen.add(hit.token.grant_id)
            known = facts(hit.grant)
            if known is not None and not isinstance(hit.grant, RevokedGrant) and belongs(known):
                yield "grt_" + hit.token.grant_id.hex()
        if len(token_ids) < _SLICE:
            return
        after = token_ids[-1]
        await asyncio.sleep(0)


class Finished(Struct, frozen=True):
    """How many grants were ended, and up to where in the log nothing is left behind."""

    grants: int
    position: int


async def finish(runtime: Runtime, *, after: int = 0) -> Finished:
    """Ends what was left behind by whoever was killed, of sessions and consents that ended behind the position `after`.

    Others have their turn after each of them. Raises: Unavailable; then nothing is finished.
    """
    await runtime.view_at_end()
    position = runtime.view.freshness().position
    ended = 0
    async for row in _rows(runtime, "session"):
        if isinstance(row, Session) and row.seq > after and row.reason in {"signed_out", "admin"}:
            ended += await end_grants(runtime, row.user_id, signed_out_of(runtime, row), Reason.LOGOUT, by="system")
            await asyncio.sleep(0)
    async for row in _rows(runtime, "consent"):
        if isinstance(row, Consent) and row.withdrawn_seq > after:
            reason = Reason.CONSENT_WITHDRAWN
            ended += await end_grants(runtime, row.user_id, consented_before(row), reason, by="system")
            await asyncio.sleep(0)
    return Finished(ended, position)


async def _rows(runtime: Runtime, table: str) -> AsyncIterator[Row]:
    after = b""
    for _ in range(_ROWS_MAX // _SLICE):
        rows = runtime.view.rows(table, after=after, limit=_SLICE)
        for _, row in rows:
            yield row
            await asyncio.sleep(0)
        if len(rows) < _SLICE:
            return
        after = rows[-1][0]


async def keep_finishing(runtime: Runtime) -> None:
    """For ever, beside a worker.

    Each end is looked at in two rounds: what was granted while the session ended may have come behind the first.
    """
    before = last = 0
    while True:
        seconds = _SECONDS
        try:
            done = await finish(runtime, after=before)
            before, last = last, done.position
            if done.grants:
                log.warning("grants_ended_late", grants=done.grants, why="a process died before it had ended them all")
        except ServiceError as error:
            log.warning("grants_not_ended", why=error.private or error.detail)
            seconds = _RETRY_SECONDS
        except Exception:
            log.exception("grants_not_ended")
        await asyncio.sleep(seconds)
