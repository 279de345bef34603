"""What a person gave ends with what it was given by: with a session, or with a consent that is withdrawn.

The event that says so comes first, and the grants are revoked one by one behind it. Whoever is killed between leaves
grants that should have ended. So every such event is looked at once more, some seconds later: the log's server hands it
to one worker of all, and to another one if that one dies. The same call, repeated, ends them too.

However late that is, it ends what should have ended then, and nothing else: what the view has dropped meanwhile is read
in the log. A log that nobody has looked at yet, because it was restored or an earlier release wrote it, is looked at
from some minutes before its last event on; ends before that stay as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime, timedelta
from typing import Any

import structlog

from events.errors import LedgerError, LedgerUnavailable
from events.streams import LEDGER, parse_time, stream_state
from events.types import ConsentWithdrawn, LedgerEvent, Reason, Recorded, SessionEnded
from projections.current import raw_id
from projections.grants import ActiveGrant, AuthorizedGrant, RevokedGrant, facts
from projections.registry import Session
from service.commands import load_row, refused, subject
from service.errors import ServiceError
from service.grants import revoke_grant
from service.rules.grants import was_withdrawn
from service.runtime import Runtime
from service.tokens import now
from service.webhooks.consumers import Delivered, Puller, acknowledge, give_back, make_durable, pass_over

log = structlog.get_logger()

CONSUMER = "endings"  # of the log, which keeps what was looked at, and leases the rest
_SLICE = 64
_AT_ONCE = 16
_TOKENS_MAX = 5_000_000
_CLOCKS = timedelta(minutes=5)  # by which those of hosts may differ
_LATER_SECONDS = 10.0  # whoever recorded an end has done by then what belongs to it, or will not do it any more
_LEASE_SECONDS = 30.0
_RETRY_SECONDS = 5.0
_WAITING_MAX = 10_000  # ends that are not due yet
_BATCH = 256  # most of what comes is no end, and costs little
_BEFORE = timedelta(minutes=10)  # the last event of a log that nobody has looked at

Belongs = Callable[[ActiveGrant], Awaitable[bool]]


def left_behind(runtime: Runtime, session_ids: Collection[str], at: datetime, seq: int) -> Belongs:
    """Grants that end when the person signs out of these sessions: those that may be used while they are away do not.

    With them those that began before `seq`, in a session that had ended by then without a sign-out: it had expired by
    `at`, or another took its place in the browser. Nobody could sign out of it any more. Asking it raises Unavailable.
    """
    dropped: dict[str, Session | None] = {}

    async def belongs(grant: ActiveGrant) -> bool:
        if grant.by_code is None or grant.by_code.offline:
            return False
        session_id = grant.by_code.session_id
        if session_id in session_ids:
            return True
        if grant.first_seq >= seq:
            return False
        session = runtime.view.session(session_id)
        if session is None:
            # The view drops what has expired by now; the log tells whether it had by then.
            if session_id not in dropped:
                dropped[session_id] = await _recorded(runtime, session_id)
            session = dropped[session_id]
        return session is not None and not _stood(session, at, seq)

    return belongs


def _stood(session: Session, at: datetime, seq: int) -> bool:
    return at < session.expires_at and (session.ended_at is None or session.seq > seq)


async def _recorded(runtime: Runtime, session_id: str) -> Session | None:
    """A session from the log itself. Raises: Unavailable."""
    of = subject("session", session_id)
    try:
        row = await load_row(runtime, "session", raw_id(session_id), of, fresh=True)
    except LedgerError as error:
        raise refused(error) from error
    return row if isinstance(row, Session) else None


def consented_before(client_id: str, withdrawn_seq: int) -> Belongs:
    """Grants to the client by the consent as it stood before that withdrawal."""

    async def belongs(grant: ActiveGrant) -> bool:
        return grant.client_id == client_id and was_withdrawn(withdrawn_seq, grant)

    return belongs


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

    Others may have their turn in between. Raises: Unavailable.
    """
    for grant_id in runtime.view.unredeemed_of(user_id):
        grant = runtime.view.family(grant_id).grant
        if isinstance(grant, AuthorizedGrant) and grant.expires_at > now() - _CLOCKS and await belongs(grant.becomes):
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
            if known is not None and not isinstance(hit.grant, RevokedGrant) and await belongs(known):
                yield "grt_" + hit.token.grant_id.hex()
        if len(token_ids) < _SLICE:
            return
        after = token_ids[-1]
        await asyncio.sleep(0)


async def finish(runtime: Runtime, end: Recorded) -> int:
    """Ends what belongs to the end of a session or consent and has not ended with it; how many grants that were.

    None, unless whoever recorded it was killed. Raises: Unavailable.
    """
    event = end.event
    match event:
        case SessionEnded(reason="signed_out" | "admin"):
            await runtime.applied(end.seq)
            belongs = left_behind(runtime, {event.session_id}, end.recorded_at, end.seq)
            return await end_grants(runtime, event.user_id, belongs, Reason.LOGOUT, by="system")
        case ConsentWithdrawn():
            await runtime.applied(end.seq)
            belongs = consented_before(event.client_id, end.seq)
            return await end_grants(runtime, event.user_id, belongs, Reason.CONSENT_WITHDRAWN, by="system")
        case _:
            return 0


async def keep_finishing(runtime: Runtime) -> None:
    """For ever, beside a worker: looks at what comes to its turn."""
    puller = Puller(runtime.nc, CONSUMER, stream=LEDGER, batch=_BATCH)
    made = False
    try:
        while True:
            try:
                made = made or await _make_consumer(runtime)
                message = await puller.next()
                if message is not None:
                    await _look_at(runtime, message)
            except LedgerUnavailable as error:
                made = False  # a log that was restored has none
                log.warning("endings_wait", why=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
    finally:
        await puller.close()


async def _look_at(runtime: Runtime, message: Delivered) -> None:
    try:
        end = message.recorded
        if not _is_end(end.event):
            await pass_over(runtime.nc, message)
            return
        age_seconds = max(0.0, (now() - end.recorded_at).total_seconds())
        if age_seconds < _LATER_SECONDS:
            await give_back(runtime.nc, message, _LATER_SECONDS - age_seconds)
            return
        grants = await finish(runtime, end)
        if grants:
            log.warning("grants_ended_late", grants=grants, why="a process died before it had ended them all")
        await acknowledge(runtime.nc, message)
    except ServiceError as error:
        log.warning("grants_not_ended", why=error.private or error.detail)
        await give_back(runtime.nc, message, _RETRY_SECONDS)
    except Exception:
        log.exception("grants_not_ended", alarm=True)
        await give_back(runtime.nc, message, _LEASE_SECONDS)


def _is_end(event: LedgerEvent) -> bool:
    if isinstance(event, SessionEnded):
        return event.reason != "replaced"
    return isinstance(event, ConsentWithdrawn)


async def _make_consumer(runtime: Runtime) -> bool:
    """The first worker of all makes it, from some minutes before the end of the log. Raises: LedgerUnavailable."""
    state = await stream_state(runtime.nc, LEDGER)
    begins = {"deliver_policy": "all"}
    if state["last_seq"]:
        since = parse_time(state["last_ts"]) - _BEFORE
        begins = {"deliver_policy": "by_start_time", "opt_start_time": since.isoformat()}
    config: dict[str, Any] = {
        "durable_name": CONSUMER,
        "ack_policy": "explicit",
        "ack_wait": int(_LEASE_SECONDS * 1e9),
        "max_ack_pending": _WAITING_MAX,
        "max_deliver": -1,
        "filter_subjects": [subject("session", "*"), subject("consent", "*")],
        **begins,
    }
    await make_durable(runtime.nc, LEDGER, config)
    return True
