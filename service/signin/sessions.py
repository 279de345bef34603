"""Sessions: a person who has signed in, in one browser. What the browser holds is an id and our signature of it."""

from __future__ import annotations

import hmac
from datetime import timedelta
from typing import Literal

from events.ledger import Append
from events.types import Reason
from projections.registry import Row, Session
from service.commands import execute, load_row, raw_id, subject
from service.endings import begun_in, end_grants
from service.grants import stamp
from service.incoming import Incoming
from service.rules.grants import Stamp
from service.rules.sessions import StartSession, decide_end, decide_start, is_live
from service.runtime import Runtime
from service.signin.browser import Cookie, drop_cookie, read_cookie, set_cookie
from service.signin.passwords import Proof
from service.tokens import is_id, new_id, now

_COOKIE = "session"
Ended = Literal["signed_out", "admin"]


async def session_of(runtime: Runtime, incoming: Incoming) -> Session | None:
    """The session that the browser is in, if it is one of ours and has not ended.

    Raises: Unavailable when the view is staler than its bound.
    """
    session_id = _opened(runtime, read_cookie(runtime, incoming, _COOKIE))
    if session_id is None:
        return None
    session = runtime.view.session(session_id)
    if session is None:
        # Begun a moment ago, perhaps on another host: we have signed it.
        await runtime.view_at_end()
        session = runtime.view.session(session_id)
    runtime.check_fresh(runtime.view.freshness())
    if session is None or not is_live(session, runtime.view.cut(session.user_id), now()):
        return None
    return session


async def begin(
    runtime: Runtime, incoming: Incoming, proof: Proof, *, replacing: Session | None
) -> tuple[Session, Cookie]:
    """A new session, in force on this host, in place of the one that the browser was in. Raises: Unavailable."""
    mark = stamp(proof.user_id, incoming.request_id, events=2)
    command = StartSession(
        stamp=mark,
        session_id=new_id("ses"),
        user_id=proof.user_id,
        user_seq=proof.user_seq,
        methods=proof.methods,
        ttl=timedelta(seconds=runtime.settings.session_ttl_seconds),
    )
    started = decide_start(command)
    ending = Stamp(mark.ids[1:], mark.at, mark.by, mark.request_id)

    async def load(fresh: bool) -> Session | None:
        return await _load(runtime, replacing.session_id, fresh=fresh) if replacing is not None else None

    def entries(old: Session | None) -> list[Append]:
        new = Append(subject("session", started.session_id), started, 0)
        ended = decide_end(ending, old, "replaced")
        return [new, *(Append(subject("session", event.session_id), event, old.seq) for event in ended if old)]

    outcome = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    session = Session(
        started.session_id,
        started.user_id,
        started.auth_time,
        started.expires_at,
        started.methods,
        started.user_seq,
        outcome.seqs[0],
    )
    return session, set_cookie(runtime, _COOKIE, _signed(runtime, session.session_id))


async def end(runtime: Runtime, session: Session, reason: Ended, *, by: str, request_id: str | None = None) -> Cookie:
    """As `end_session`, and has the browser drop its cookie. Raises: Unavailable."""
    await end_session(runtime, session, reason, by=by, request_id=request_id)
    return drop_cookie(runtime, _COOKIE)


async def end_session(
    runtime: Runtime, session: Session, reason: Ended, *, by: str, request_id: str | None = None
) -> int:
    """Ends a session and what was granted in it, but for what is to last while the person is away.

    Returns the sequence of its end. A call that was cut off is completed by the next, or by `service/endings.py`.

    Raises: Unavailable.
    """
    mark = stamp(by, request_id)

    async def load(fresh: bool) -> Session | None:
        return await _load(runtime, session.session_id, fresh=fresh)

    def entries(row: Session | None) -> list[Append]:
        events = decide_end(mark, row, reason)
        return [Append(subject("session", event.session_id), event, row.seq) for event in events if row is not None]

    outcome = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    await end_grants(
        runtime,
        session.user_id,
        begun_in(session.session_id),
        Reason.LOGOUT,
        by=by,
        request_id=request_id,
    )
    row = runtime.view.session(session.session_id)
    return row.seq if row is not None else outcome.seq


async def _load(runtime: Runtime, session_id: str, *, fresh: bool) -> Session | None:
    row: Row | None = await load_row(
        runtime, "session", raw_id(session_id), subject("session", session_id), fresh=fresh
    )
    return row if isinstance(row, Session) else None


def _signed(runtime: Runtime, session_id: str) -> str:
    return f"{session_id}.{hmac.digest(runtime.master.sessions, session_id.encode(), 'sha256').hex()}"


def _opened(runtime: Runtime, value: str | None) -> str | None:
    """The session's id, if we have signed it."""
    session_id = (value or "").partition(".")[0]
    if value is None or not is_id(session_id, "ses"):
        return None
    return session_id if hmac.compare_digest(value.encode(), _signed(runtime, session_id).encode()) else None
